"""A checkpoint as one GGUF file that llama.cpp runs: NormHead applied, matrices unchanged or in blocks of a recipe.

This module does what `refimpl/checkpoint/gguf.py` undoes. W_pack becomes three matrices. Where llama.cpp's RoPE turns
neighbours, the rows of q and k are put side by side. A Baichuan with RoPE, but not 32 layers, is written as a llama,
whose arithmetic is the same. llama.cpp computes ALiBi only in a Baichuan of 40 layers.

The file is written matrix by matrix, under another name until it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from refimpl.blocks.importance import Importance
from refimpl.blocks.quantize import Recipe, plan, quantizing
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.gguf import FAMILY, NORMALIZED, GGUFMatrix, library, tensor_names
from refimpl.checkpoint.weights import NormHead, QuantizedWeight
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import replacing
from refimpl.text.gguf_vocabulary import vocabulary_facts
from refimpl_kernels.formats import gguf as gguf_bytes

KINDS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}


class Tensor(NamedTuple):
    """A tensor of the file: `rows` of a parameter, in a kind. `heads`: how many, if RoPE's rows are paired, else 0."""

    name: str
    parameter: str
    rows: slice
    heads: int
    kind: str
    shape: tuple[int, ...]


def write_gguf(
    checkpoint: Checkpoint, out: str | Path, recipe: Recipe | None = None, keep: Sequence[str] = (),
    importance: Importance | None = None, threads: int | None = None, **options: Any,
) -> int:  # fmt: skip
    """Writes `checkpoint` into the new file `out`; returns its size in bytes.

    `recipe`, `keep`, `importance`, `options`: see `refimpl.blocks.quantize`; without a recipe, matrices keep their
    format. Raises InputError for a file that exists, for formats that GGUF does not have, for a model that llama.cpp
    does not run, and without the library gguf.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another name, or remove it")
    gguf, config, weights = library("a GGUF file is written"), checkpoint.config, checkpoint.weights
    architecture = _architecture(config)
    planned = plan(weights, recipe, keep, **options) if recipe is not None else None
    schemes = planned.schemes if planned else {}
    for name, scheme in schemes.items():
        if scheme.format not in gguf_bytes.FORMATS:
            raise InputError(f"{name} is to be {scheme.format}, which GGUF does not have; {_formats()} are there")
    with replacing(out) as partial, quantizing(weights, schemes, importance, threads) as blocks:
        writer = gguf.GGUFWriter(partial, architecture)
        _facts(writer, checkpoint)
        tensors = list(_tensors(checkpoint, {name: scheme.format for name, scheme in schemes.items()}))
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            stored = (*tensor.shape[:-1], _row_bytes(gguf, kind, tensor.shape[-1]))
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        made: dict[str, Callable[[slice], np.ndarray]] = {}
        for tensor in tqdm(tensors, desc="writing", disable=None, leave=False):
            if tensor.parameter not in made:
                made = {tensor.parameter: _raw(weights[tensor.parameter], tensor, schemes, blocks)}
            raw = made[tensor.parameter](tensor.rows)
            writer.write_tensor_data(raw[_joined(len(raw), tensor.heads)] if tensor.heads else raw)
        writer.close()
    return out.stat().st_size


def _tensors(checkpoint: Checkpoint, formats: dict[str, str]) -> Iterator[Tensor]:
    """The tensors of the file, in order."""
    config, weights = checkpoint.config, checkpoint.weights
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, theirs in tensor_names(config).items():
        weight = weights[name]
        kind = formats[name].upper() if name in formats else _kind(name, weight)
        start = 0
        for one in theirs:
            part = one.split(".")[-2]
            rows = weight.shape[0] // len(theirs)  # a W_pack has as many rows for keys as for queries
            turned = heads.get(part, 0) if config.family != "Qwen2-7B" else 0
            yield Tensor(one, name, slice(start, start + rows), turned, kind, (rows, *weight.shape[1:]))
            start += rows


def _kind(name: str, weight: Any) -> str:
    """GGUF's name for the format of a parameter. Raises InputError for a format that GGUF does not have."""
    if len(weight.shape) == 1:
        return "F32"
    if isinstance(weight, QuantizedWeight):
        if weight.blocks.format in gguf_bytes.FORMATS:
            return weight.blocks.format.upper()
        raise InputError(f"{name} is {weight.blocks.format}, which GGUF does not have; {_formats()} are there")
    if isinstance(weight, GGUFMatrix | NormHead):  # a row divided by its length has more digits than 16 bits hold
        return "F32"
    return KINDS.get(np.dtype(weight.dtype), "F32")


def _raw(weight: Any, tensor: Tensor, schemes: Any, blocks: Any) -> Callable[[slice], np.ndarray]:
    """A function rows -> their bytes (N, bytes a row). A matrix to be quantized is made once, for all calls."""
    if tensor.parameter in schemes or isinstance(weight, QuantizedWeight):
        whole = blocks(tensor.parameter) if tensor.parameter in schemes else weight.blocks
        raw = gguf_bytes.to_bytes(whole)
        return lambda rows: raw[rows]
    dtype = {kind: dtype for dtype, kind in KINDS.items()}[tensor.kind]
    if len(weight.shape) == 1:
        return lambda rows: np.ascontiguousarray(weight.read(dtype)).view(np.uint8)
    return lambda rows: np.ascontiguousarray(weight.read(dtype, rows)).view(np.uint8)


def _joined(rows: int, heads: int) -> np.ndarray:
    """The order of rows that makes neighbours of two that RoPE turns together, one from each half of a head."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _row_bytes(gguf: Any, kind: Any, columns: int) -> int:
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if columns % weights:
        raise InputError(f"rows of {columns} are not a multiple of the {weights} weights of a block of {kind.name}")
    return columns // weights * nbytes


def _architecture(config: Config) -> str:
    """llama.cpp's name for the architecture. Raises InputError if llama.cpp cannot compute this model."""
    if config.family == "Qwen2-7B":
        return "qwen2"
    if config.alibi and config.num_hidden_layers != 40:
        layers = config.num_hidden_layers
        raise InputError(f"llama.cpp computes ALiBi in a Baichuan of 40 layers alone, this one has {layers}")
    return "baichuan" if config.num_hidden_layers == (40 if config.alibi else 32) else "llama"


def add_sizes(writer: Any, config: Config) -> None:
    """States the sizes of a model in a file of gguf's `GGUFWriter`."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _facts(writer: Any, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_name(config.family)
    add_sizes(writer, config)
    if config.rope_theta is not None:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
    writer.add_quantization_version(2)  # of ggml's blocks, the same since 2023
    writer.add_string(FAMILY, config.family)
    writer.add_bool(NORMALIZED, True)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in vocabulary_facts(checkpoint.folder, config).items():
        add[type(value)](key, value)


def _formats() -> str:
    return ", ".join(gguf_bytes.FORMATS)
