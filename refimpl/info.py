"""A checkpoint in a few lines: its family and sizes, its memory in each format, and what is wrong with it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.checkpoint import doctor
from refimpl.checkpoint.folder import folder_remarks, read_checkpoint
from refimpl.checkpoint.gguf import read_model
from refimpl.checkpoint.quantized_files import provenance
from refimpl.checkpoint.resolve import expected_shapes, resolve
from refimpl.checkpoint.weights import QuantizedWeight, Weights
from refimpl.config import Config, read_config
from refimpl.errors import InputError, Remark, one_line
from refimpl.gguf_files import read_gguf
from refimpl.text.tokenizer import load_tokenizer
from refimpl_kernels import formats

if TYPE_CHECKING:
    from refimpl.forward import Forward

# GPU memory in GiB that the official README gives for Baichuan2: in bfloat16, 8 bits (LLM.int8) and 4 bits (NF4).
OFFICIAL_GIB = {
    "Baichuan2-7B": {"bfloat16": 14.0, "int8": 8.0, "nf4": 5.1},
    "Baichuan2-13B": {"bfloat16": 25.9, "int8": 14.2, "nf4": 8.6},
}


def describe(model: Forward) -> dict[str, Any]:
    """The facts of a model that its config tells, in reading order: family, sizes, parameters, memory."""
    return _facts(model.config)


def _facts(config: Config) -> dict[str, Any]:
    c = config
    official = doctor.official_sizes(c) and doctor.official_heads(c)
    head = "NormHead" if c.norm_head else "plain"
    facts: dict[str, Any] = {
        "family": c.family,
        "sizes": "the official ones" if official else "its own",
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "intermediate": c.intermediate_size,
        "heads": f"{c.num_attention_heads} of {c.head_dim}, {c.num_key_value_heads} for keys and values",
        "vocabulary": c.vocab_size,
        "context": c.max_position_embeddings,
        "positions": "ALiBi" if c.alibi else f"RoPE, theta {c.rope_theta:g}",
        "head": f"{head}, tied to the embedding" if c.tie_word_embeddings else head,
        "parameters": sum(math.prod(shape) for shape in expected_shapes(c).values()),
        "memory GiB": memory(config),
    }
    return facts | ({"official GiB": OFFICIAL_GIB[c.family]} if official and c.family in OFFICIAL_GIB else {})


def examine(folder: str | Path) -> dict[str, Any]:
    """The facts of a checkpoint's folder; `remarks` and `problems`, lists of lines, come last.

    A checkpoint with a problem does not load; its facts are then those that its config tells. A folder with a
    checkpoint in each subfolder, such as the intermediate ones or a model's folder in Hugging Face's cache, gives
    `checkpoints`, a list of facts.

    Raises InputError if there is no config, or one that is not understood.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf":
        return _examine_gguf(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with config.json and weights")
    if not (folder / "config.json").exists():
        depths = ("*", "snapshots/*", "snapshots/*/*")
        if steps := sorted(path.parent for depth in depths for path in folder.glob(f"{depth}/config.json")):
            return {"checkpoints": [_examine_step(step) for step in steps]}
    config = read_config(folder)
    facts = {"revision": _revision(folder), **_facts(config)}
    problems = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", Remark)
            tensors = read_checkpoint(folder)
        weights = resolve(config, tensors)
    except InputError as error:
        problems.append(str(error))
    else:
        arrays = [part for value in tensors.values() for part in _arrays(value)]
        stored = {str(w.dtype) for w in weights.values() if hasattr(w, "dtype")}
        stored |= {w.blocks.format for w in weights.values() if hasattr(w, "blocks")}
        facts["stored as"] = ", ".join(sorted(stored))
        facts |= _quantization(weights, provenance(folder))
        facts["files"] = _files(folder)
        facts["bytes"] = sum(array.nbytes for array in arrays)
        facts["shared storage"] = _shared(tensors)
        wrapped = [str(one.message) for one in said]
        facts["remarks"] = wrapped + folder_remarks(folder, config, tensors) + doctor.not_finite(tensors)
    try:
        tokenizer = load_tokenizer(folder, config)
        facts["tokenizer"] = (
            "none" if tokenizer is None else f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens"
        )
    except InputError as error:
        problems.append(str(error))
    return {**facts, "remarks": facts.pop("remarks", []), "problems": problems}


def _examine_gguf(path: Path) -> dict[str, Any]:
    """The facts of a GGUF file, and the kinds of its tensors. Raises InputError for one that is not understood."""
    file = read_gguf(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", Remark)
        config, _ = read_model(path)
        tokenizer = load_tokenizer(path, config)
    kinds = Counter(one.kind for one in file.tensors.values())
    return {
        **_facts(config), "architecture": file.facts["general.architecture"],
        "stored as": ", ".join(f"{count} tensors {kind}" for kind, count in kinds.most_common()),
        "bytes": sum(one.data.nbytes for one in file.tensors.values()),
        "tokenizer": "none" if tokenizer is None else f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens",
        "remarks": [str(one.message) for one in said], "problems": [],
    }  # fmt: skip


def _examine_step(folder: Path) -> dict[str, Any]:
    """The facts of one checkpoint of several. If `examine` fails, its error becomes the checkpoint's problem."""
    try:
        return examine(folder)
    except InputError as error:
        return {"revision": _revision(folder), "remarks": [], "problems": [str(error)]}


def table(facts: dict[str, Any]) -> str:
    """What `examine` found of one checkpoint, one line for each fact. The caller prints the problems."""
    rows = []
    for name, value in facts.items():
        if name == "problems":
            continue
        for said in value if isinstance(value, list) else [value]:
            if isinstance(said, dict):
                said = ", ".join(f"{format} {size:.3g}" for format, size in said.items())
            rows.append(f"{name:16} {said:,}" if isinstance(said, int) else f"{name:16} {one_line(str(said))}")
    return "\n".join(rows)


def memory(config: Config) -> dict[str, float]:
    """GiB that the parameters take in each format, as `Model.quantize` makes it.

    The formats of bitsandbytes leave the embedding, the head and the norms in 16 bits; INT4 takes the head, too.
    """
    shapes = expected_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    layers = {name: s for name, s in shapes.items() if len(s) == 2 and name.startswith("model.layers.")}
    linears = layers | {name: s for name, s in shapes.items() if name == "lm_head.weight"}

    def quantized(matrices: Mapping[str, tuple[int, ...]], bits: Callable[[tuple[int, ...]], float]) -> float:
        inside = sum(math.prod(shape) for shape in matrices.values())
        return 2 * (total - inside) + sum(math.prod(shape) * bits(shape) / 8 for shape in matrices.values())

    sizes = {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "int8": quantized(layers, lambda shape: 8 + 32 / shape[1]),
        "nf4": quantized(layers, lambda shape: 4 + 8 / 64 + 32 / (64 * formats.dynamic8.BLOCK_SIZE)),
        "int4": quantized(linears, lambda shape: 4 + 32 / 32),
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def _quantization(weights: Weights, made: Mapping[str, Any]) -> dict[str, Any]:
    """The formats of quantized matrices, with bits a weight as their engines store them, and how they were made."""
    found: dict[str, list[formats.Blocks]] = {}
    for weight in weights.values():
        if hasattr(weight, "blocks"):
            found.setdefault(weight.blocks.format, []).append(weight.blocks)
    if not found:
        return {}
    lines = []
    for format, matrices in sorted(found.items()):
        sizes = ", ".join(map(str, sorted({blocks.block_size for blocks in matrices})))
        bits = f"{_bits(matrices):.3g} bits a weight"
        lines.append(f"{len(matrices)} matrices in {format}, blocks of {sizes}, {bits}")
    facts: dict[str, Any] = {"quantized": lines}
    facts["bits a weight"] = round(_bits([blocks for matrices in found.values() for blocks in matrices]), 4)
    if made.get("recipe"):
        facts["recipe"] = json.dumps(made["recipe"], ensure_ascii=False)
    if made.get("importance"):
        facts["importance"] = json.dumps(made["importance"], ensure_ascii=False)
    return facts


def _bits(matrices: Sequence[formats.Blocks]) -> float:
    """Bits a weight, over all of them."""
    sizes = [blocks.shape[0] * blocks.shape[1] for blocks in matrices]
    return sum(b.bits_per_weight * size for b, size in zip(matrices, sizes, strict=True)) / sum(sizes)


def _revision(folder: Path) -> str:
    """The revision by the folder's name: a commit of Hugging Face's cache, or how many tokens it was trained on."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return f"commit {folder.name}"
    step = re.search(r"(\d+)B$", folder.name)
    return f"{folder.name}: after {int(step[1])} billion tokens" if step and "train" in folder.name else folder.name


def _files(folder: Path) -> str:
    kinds = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin")}
    files = kinds[".safetensors"] or kinds[".bin"]
    return files[0].name if len(files) == 1 else f"{len(files)} of {files[0].suffix[1:]}"


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, list):
        return [array for item in value for array in _arrays(item)]
    if isinstance(value, QuantizedWeight):
        return list(value.blocks.arrays().values())
    return [value] if isinstance(value, np.ndarray) else []


def _shared(tensors: dict[str, Any]) -> str:
    """The names of tensors that are the same bytes of the file, as tied ones are."""
    seen: dict[tuple, str] = {}
    pairs = []
    for name, array in tensors.items():
        if isinstance(array, np.ndarray) and array.size:
            key = (array.__array_interface__["data"][0], array.shape, array.strides)
            if key in seen:
                pairs.append(f"{name} is {seen[key]}")
            seen.setdefault(key, name)
    return ", ".join(pairs) or "none"
