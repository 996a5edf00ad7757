"""A model in llama.cpp's GGUF as a checkpoint: its config, its weights where they lie, and its tokenizer.

What llama.cpp changes is undone here, by name:

    W_pack is cut into attn_q, attn_k and attn_v       read as one matrix again, whatever kinds the three have
    rows of q and k: pairs of RoPE lie side by side    put back into halves (Qwen2's stay unchanged)
    the architecture is the only word on the family    llama.cpp's own rule (32 layers: RoPE, 40: ALiBi), the
                                                       vocabulary, and `refimpl.family` where this package wrote it
    NormHead is forgotten by its converter             detected by the lengths of the head's rows, and applied

**Source**: llama.cpp's convert_hf_to_gguf.py: BaichuanModel, LlamaModel, Qwen2Model; its models' baichuan.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.checkpoint.resolve import HEAD, expected_shapes
from refimpl.checkpoint.weights import Weight, Weights, row_lengths
from refimpl.config import FAMILIES, Config
from refimpl.errors import InputError, Remark, at_most
from refimpl.gguf_files import GGUF, Stored, read_gguf
from refimpl_kernels import formats
from refimpl_kernels.formats import gguf as gguf_bytes

FAMILY, NORMALIZED = "refimpl.family", "refimpl.lm_head_normalized"  # facts that this package writes
FLOATS = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
LIBRARY = "pip install 'refimpl[gguf]'"
NEAR_ONE = 0.03  # even in 4 bits, the rows of a normalised head differ less than this from length 1, on average


def read_model(path: Path) -> tuple[Config, Weights]:
    """The config and the weights in a GGUF file; warns where llama.cpp would compute something else.

    Raises InputError for a file that is damaged, or holds another model.
    """
    file = read_gguf(path)
    config, weights = read_weights(file, read_config(file))
    if config.norm_head:
        said = "its converter forgot NormHead, which is applied here: llama.cpp's answers to this file differ"
        warnings.warn(f"{path}: {said}", Remark, stacklevel=4)
    return config, weights


def read_config(file: GGUF) -> Config:
    """The Config of a GGUF model. Raises InputError for one of another architecture, or without its sizes."""
    facts = file.facts
    architecture = facts.get("general.architecture")
    if architecture not in ("baichuan", "llama", "qwen2"):
        raise InputError(f"{file.path} is of the architecture {architecture!r:.40}, expected baichuan, llama or qwen2")

    def fact(name: str, default: Any = None) -> Any:
        found = facts.get(f"{architecture}.{name}", default)
        if found is None:
            raise InputError(f"{file.path} lacks {architecture}.{name}; convert it again")
        return found

    heads = fact("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    sizes = {
        "hidden_size": fact("embedding_length"), "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": fact("attention.head_count_kv", heads),
        "vocab_size": embedding.shape[0] if embedding else fact("vocab_size"),
        "max_position_embeddings": fact("context_length"),
        "rms_norm_eps": round(fact("attention.layer_norm_rms_epsilon"), 12),  # stored in float32
    }  # fmt: skip
    family = _family(file, architecture, sizes)
    values = dict(FAMILIES[family])
    if architecture == "qwen2":
        values["rope_theta"] = float(fact("rope.freq_base", 10000.0))
    for name in ("bos", "eos", "padding"):
        if (id := facts.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            sizes["pad_token_id" if name == "padding" else f"{name}_token_id"] = id
        elif architecture == "qwen2":
            sizes["pad_token_id" if name == "padding" else f"{name}_token_id"] = None
    scaling = facts.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{file.path} scales RoPE by {scaling!r:.40}, which no family here does")
    tied = "output.weight" not in file.tensors
    return Config(family=family, **{**values, **sizes}, tie_word_embeddings=tied)


def _family(file: GGUF, architecture: str, sizes: Mapping[str, Any]) -> str:
    """The family. Raises InputError if nothing in the file tells it."""
    if (said := file.facts.get(FAMILY)) is not None:
        if said not in FAMILIES:
            raise InputError(f"{file.path} has the {FAMILY} {said!r:.40}, expected one of {', '.join(FAMILIES)}")
        return str(said)
    if architecture == "qwen2":
        return "Qwen2-7B"
    generation = {64000: "", 125696: "2"}.get(sizes["vocab_size"])
    size = {32: "7B", 40: "13B"}.get(sizes["num_hidden_layers"])
    if architecture == "llama":  # RoPE, whatever the size
        size = "7B"
    if generation is None or size is None or sizes["num_key_value_heads"] != sizes["num_attention_heads"]:
        layers, words = sizes["num_hidden_layers"], sizes["vocab_size"]
        raise InputError(
            f"{file.path} is a {architecture} of {layers} layers and {words} words; of Baichuan are those of 32 or 40 "
            f"layers and 64000 or 125696 words, or with the fact {FAMILY}"
        )
    return f"Baichuan{generation}-{size}"


@dataclass(frozen=True)
class Piece:
    """Rows of a stored matrix. `heads`: the number of heads if the rows of RoPE's pairs lie side by side, else 0."""

    stored: Stored
    heads: int = 0

    @property
    def rows(self) -> int:
        return self.stored.shape[0]

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """The bytes (N, bytes a row) of rows by their numbers in Hugging Face's order."""
        if not self.heads:
            return self.stored.data[rows]
        pairs = self.rows // self.heads // 2
        head, rest = np.divmod(rows, 2 * pairs)
        half, pair = np.divmod(rest, pairs)
        return self.stored.data[head * 2 * pairs + pair * 2 + half]

    def values(self, rows: np.ndarray) -> np.ndarray:
        return dequantize(self.raw(rows), self.stored.kind)


@dataclass(frozen=True, eq=False)
class GGUFMatrix:
    """A matrix (O, I) from one tensor of a GGUF file, or from several one below the other. It reads as its values."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(piece.rows for piece in self.pieces), self.pieces[0].stored.shape[1]

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The dequantized values of these rows: float32 by the format's definition, then converted to `dtype`."""
        wanted = np.arange(self.shape[0])[rows]
        out = np.empty((len(wanted), self.shape[1]), dtype)
        start = 0
        for piece in self.pieces:
            here = (wanted >= start) & (wanted < start + piece.rows)
            if here.any():
                out[here] = piece.values(wanted[here] - start)
            start += piece.rows
        return out

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of its tensors."""
        return {piece.stored.kind for piece in self.pieces}


class GGUFBlocks(GGUFMatrix):
    """A matrix whose tensors all have one format of the table, so that Numba's kernels can read its blocks."""

    @cached_property
    def blocks(self) -> formats.Blocks:
        """The matrix as blocks, copied from the file once, when they are first asked for."""
        raw = [piece.raw(np.arange(piece.rows)) for piece in self.pieces]
        (kind,) = self.kinds
        return gguf_bytes.from_bytes(raw[0] if len(raw) == 1 else np.concatenate(raw), kind)

    rounded: np.dtype | None = None


class NormedMatrix(GGUFMatrix):
    """Baichuan2's head as llama.cpp's converter leaves it. Reading divides each row by its length."""

    def read(self, dtype, rows=slice(None)):
        """These rows, each divided by its length; computed in float64 for float64, else in float32."""
        values = super().read(np.dtype(np.float64 if dtype == np.float64 else np.float32), rows)
        length = np.sqrt((values * values).sum(-1, keepdims=True))
        return (values / np.maximum(length, 1e-12)).astype(dtype, copy=False)


def library(what: str) -> Any:
    """The library gguf. If it is not installed, raises InputError, which says `what` needs it."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"{what} by the library gguf, which is missing: {LIBRARY}") from None
    return gguf


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """The values (N, I) of rows (N, bytes a row) of a kind: in float32, or in their own format if they are floats.

    This package reads the formats of its table, and the library gguf all others. Raises InputError if it is missing.
    """
    if kind in FLOATS:
        return np.ascontiguousarray(raw).view(FLOATS[kind])
    if kind in gguf_bytes.FORMATS:
        try:
            return formats.dequantize(gguf_bytes.from_bytes(raw, kind))
        except ValueError as error:
            raise InputError(str(error)) from None
    gguf = library(f"{kind} is read")
    return gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[kind.upper()])


def read_weights(file: GGUF, config: Config) -> tuple[Config, Weights]:
    """The config, in which `norm_head` fits the file's head, and the weights as the file stores them: floats or blocks.

    Raises InputError for tensors that are missing, unknown, or of another shape.
    """
    known = tensor_names(config)
    allowed = {"rope_freqs.weight"}
    missing = sorted(name for names in known.values() for name in names if name not in file.tensors)
    unknown = sorted(file.tensors.keys() - {name for names in known.values() for name in names} - allowed)
    if missing or unknown:
        said = [f"lacks {at_most(missing, 3)}"] * bool(missing) + [f"has unknown {at_most(unknown, 3)}"] * bool(unknown)
        raise InputError(f"{file.path} {' and '.join(said)}; it describes a {config.family}")
    entries: dict[str, Any] = {}
    turned = config.family != "Qwen2-7B"  # rows of q and k, which llama.cpp's RoPE takes in pairs
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, theirs in known.items():
        stored = [file.tensors[one] for one in theirs]
        if len(stored[0].shape) == 1:
            entries[name] = Weight(dequantize(stored[0].data, stored[0].kind))
            continue
        kinds = [one.split(".")[-2] for one in theirs]
        pieces = tuple(Piece(one, heads.get(kind, 0) if turned else 0) for one, kind in zip(stored, kinds, strict=True))
        entries[name] = _matrix(pieces)
    for name, shape in expected_shapes(config).items():
        if entries[name].shape != shape:
            raise InputError(f"{file.path}: {name} has shape {entries[name].shape}, expected {shape}")
    if HEAD not in entries:
        entries[HEAD] = entries["model.embed_tokens.weight"]
    if config.norm_head and (file.facts.get(NORMALIZED) is True or normalized(entries[HEAD])):
        return replace(config, norm_head=False), Weights(entries)
    if config.norm_head:
        head = file.tensors["output.weight" if "output.weight" in file.tensors else "token_embd.weight"]
        entries[HEAD] = NormedMatrix((Piece(head),))
    return config, Weights(entries)


def normalized(head: Any) -> bool:
    """Whether the rows of a head have length 1. A few hundred are read, and rows of zeros left out."""
    rows = np.arange(0, head.shape[0], max(1, head.shape[0] // 256))
    lengths = row_lengths(head.read(np.dtype(np.float32), rows))
    lengths = lengths[lengths > 0]
    return bool(len(lengths) and np.abs(lengths - 1).mean() < NEAR_ONE)


def _matrix(pieces: tuple[Piece, ...]) -> Any:
    kinds = {piece.stored.kind for piece in pieces}
    if len(pieces) == 1 and not pieces[0].heads and kinds <= FLOATS.keys():
        return Weight(dequantize(pieces[0].stored.data, pieces[0].stored.kind))  # a view of the file
    return (GGUFBlocks if len(kinds) == 1 and kinds <= {*gguf_bytes.FORMATS} else GGUFMatrix)(pieces)


def tensor_names(config: Config) -> dict[str, list[str]]:
    """Our parameter -> llama.cpp's tensors, whose rows one below the other make it up."""
    names = {"model.embed_tokens.weight": ["token_embd.weight"], "model.norm.weight": ["output_norm.weight"]}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ["output.weight"]
    parts = ("q", "k", "v")
    for i in range(config.num_hidden_layers):
        at, to = f"model.layers.{i}", f"blk.{i}"
        if config.qkv_packed:
            names[f"{at}.self_attn.W_pack.weight"] = [f"{to}.attn_{part}.weight" for part in parts]
        else:
            for part in parts:
                for what in ("weight", "bias") if config.qkv_bias else ("weight",):
                    names[f"{at}.self_attn.{part}_proj.{what}"] = [f"{to}.attn_{part}.{what}"]
        names[f"{at}.self_attn.o_proj.weight"] = [f"{to}.attn_output.weight"]
        for part in ("gate", "up", "down"):
            names[f"{at}.mlp.{part}_proj.weight"] = [f"{to}.ffn_{part}.weight"]
        names[f"{at}.input_layernorm.weight"] = [f"{to}.attn_norm.weight"]
        names[f"{at}.post_attention_layernorm.weight"] = [f"{to}.ffn_norm.weight"]
    return names
