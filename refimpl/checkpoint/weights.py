"""Parameters on disk, memory-mapped, checked against the config, and resolved into what the decoder reads.

`read_checkpoint` maps a folder's files. `resolve` turns the tensors into `Weights`: it is the one place
that knows how checkpoints differ (NormHead, tied heads, buffers that are not parameters).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.checkpoint.bitsandbytes import split
from refimpl.checkpoint.doctor import broken_promise, frequencies, mismatch
from refimpl.checkpoint.quantized_files import MANIFEST, collect
from refimpl.checkpoint.torch_files import map_torch
from refimpl.config import Config
from refimpl.errors import InputError, at_most
from refimpl.files import inside, read_json
from refimpl_kernels import formats
from refimpl_kernels.formats import int8

# The names of number formats in a safetensors header.
SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)  # what parameters may be stored as
# A converted copy up to this many elements is kept: it makes small models fast and is nothing beside a large one.
KEEP_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter as stored: `array` is mapped from disk, and only what is read is touched."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The values of these rows in `dtype`: a view where nothing is to be converted."""
        if self.array.size > KEEP_ELEMENTS:
            return self._convert(self.array[rows], dtype)
        if dtype not in self._kept:
            self._kept[dtype] = self._convert(self.array, dtype)
        return self._kept[dtype][rows]

    @property
    def in_place(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The array, and the lengths (O,) float32 that its rows are divided by as they are read, or None."""
        return self.array, None

    def _convert(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return values.astype(dtype, copy=False)

    @cached_property
    def _kept(self) -> dict:
        return {}


class NormHead(Weight):
    """The head of Baichuan2: each row divided by its Euclidean length, in the format that is computed in.

    A logit is then the cosine between the hidden state and the token's row, times the hidden state's length: a rare
    token, whose row training has left short, is not held back for it. What divides is known before any token is: so
    dividing once, offline, gives a plain head that answers the same (`refimpl convert --normalize-head`).

    Source: `NormHead` in the official modeling_baichuan.py, `nn.functional.normalize(weight)`, whose length is
    rounded to the weight's format and kept from falling below 1e-12: a row of zeros stays zero. (In float16 the
    official code makes such a row NaN, because 1e-12 is zero there; here it stays zero.)
    """

    def read(self, dtype, rows=slice(None)):
        """As of any parameter, divided: the lengths are computed once for each format and kept."""
        if self.array.size <= KEEP_ELEMENTS:
            return super().read(dtype, rows)
        return self._divided(self.array[rows], dtype, self._lengths(dtype)[rows])

    @property
    def in_place(self):
        return self.array, self._lengths(np.dtype(np.float32))[:, 0]

    def _lengths(self, dtype: np.dtype) -> np.ndarray:
        if ("lengths", dtype) not in self._kept:
            step = max(1, KEEP_ELEMENTS // self.shape[1])
            tiles = [_lengths(self.array[i : i + step], dtype) for i in range(0, self.shape[0], step)]
            self._kept["lengths", dtype] = np.concatenate(tiles)
        return self._kept["lengths", dtype]

    def _convert(self, values, dtype):
        return self._divided(values, dtype, _lengths(values, dtype))

    def _divided(self, values, dtype, lengths):
        return (_wide(values, dtype) / lengths).astype(dtype, copy=False)


def _wide(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values rounded to `dtype`, in the format that PyTorch computes their length in."""
    return values.astype(dtype, copy=False).astype(np.float64 if dtype == np.float64 else np.float32, copy=False)


def _lengths(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The lengths (O, 1) of rows, rounded to `dtype` and at least 1e-12."""
    wide = _wide(values, dtype)
    length = np.sqrt((wide * wide).sum(-1, keepdims=True)).astype(dtype).astype(wide.dtype)
    return np.maximum(length, 1e-12)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix in blocks of a number format. It reads like any other: as the values that the blocks stand for."""

    blocks: formats.Blocks
    rounded: np.dtype | None = None  # what they are rounded to: bitsandbytes reads a matrix back in its own format

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The dequantized values of these rows: float32 by definition of the format, then converted to `dtype`."""
        values = formats.dequantize(self.blocks, rows)
        if self.rounded is not None:
            values = values.astype(self.rounded, copy=False)
        return values.astype(dtype, copy=False)


class Int8Weight(QuantizedWeight):
    """A matrix of LLM.int8, which quantizes what it is multiplied with, too. It reads as its own values alone."""

    def linear(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """x (..., I) @ weight.T + bias -> (..., O) in the format of x, outliers of 6.0 and more apart."""
        return int8.linear(x, self.blocks.packed, self.blocks.scales, bias=bias)


def quantized_weight(blocks: formats.Blocks, rounded: np.dtype | None = None) -> QuantizedWeight:
    """The weight that reads blocks as their engine does; `rounded`: to what, if not to what is usual."""
    return (Int8Weight if blocks.format == "int8" else QuantizedWeight)(blocks, rounded or rounded_by(blocks.format))


def rounded_by(format: str) -> np.dtype | None:
    """What the engine of a format rounds a matrix to as it reads it back; None where float32 is the format's answer."""
    return np.dtype(np.float16) if formats.FORMATS[format].engine == "bitsandbytes" else None


class Weights(Mapping[str, Any]):
    """Parameter name -> what `ops` reads. Immutable; `replace` makes another with some entries changed.

    `provenance`: how the quantized ones were made (`recipe`, `importance`: see `blocks.quantize`), where it is known.
    """

    def __init__(self, entries: Mapping[str, Any], provenance: Mapping[str, Any] | None = None):
        self._entries = dict(entries)
        self.provenance: dict[str, Any] = dict(provenance or {})

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, entries: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> Weights:
        return Weights({**self._entries, **entries}, self.provenance if provenance is None else provenance)

    def without(self, prefixes: tuple[str, ...]) -> Weights:
        """These, less those whose names begin like that."""
        kept = {name: weight for name, weight in self._entries.items() if not name.startswith(prefixes)}
        return Weights(kept, self.provenance)


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter that a checkpoint of this config must hold."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = {"W_pack": q + 2 * kv} if config.qkv_packed else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        for module, rows in qkv.items():
            shapes[f"{at}.self_attn.{module}.weight"] = (rows, hidden)
            if config.qkv_bias:
                shapes[f"{at}.self_attn.{module}.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _unread(config: Config, tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of those of the tensors that a checkpoint may hold, and that the official code does not use.

    v1 saved RoPE's frequencies, which are read back into a buffer that was computed just the same; and where the head
    is the embedding, a file may have a head all the same.
    """
    shapes: dict[str, tuple[int, ...]] = {name: (config.head_dim // 2,) for name in frequencies(config)}
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return {name: shape for name, shape in shapes.items() if name in tensors}


def resolve(config: Config, tensors: Mapping[str, Any]) -> Weights:
    """What the decoder reads, from a checkpoint's tensors; matrices that are quantized stay so.

    Raises InputError for missing, unknown and wrongly shaped tensors, and for formats that are not floating point.
    """
    entries: dict[str, Any] = {n: weight for n, weight in tensors.items() if isinstance(weight, QuantizedWeight)}
    tensors = {name: array for name, array in tensors.items() if name not in entries}
    ours = set(entries)
    tensors, quantized = split(tensors)
    entries |= {name: quantized_weight(blocks, dtype) for name, (blocks, dtype) in quantized.items()}
    shapes = {**expected_shapes(config), **_unread(config, {**tensors, **entries})}
    if lists := [name for name in shapes if isinstance(tensors.get(name), list)]:
        raise InputError(f"{lists[0]} is a list, expected a tensor of shape {shapes[lists[0]]}")
    known = {name: getattr(value, "shape", ()) for name, value in {**tensors, **entries}.items()}
    if strange := mismatch(config, known):
        raise InputError(f"config.json describes a {config.family}, but {strange}")
    missing, unknown = [name for name in shapes if name not in known], sorted(known.keys() - shapes.keys())
    if missing or unknown:
        said = [f"lacks {at_most(missing, 3)}"] * bool(missing) + [f"has unknown {at_most(unknown, 3)}"] * bool(unknown)
        raise InputError(f"the checkpoint {' and '.join(said)}; config.json describes a {config.family}")
    for name, shape in shapes.items():
        found: Any = tensors.get(name, entries.get(name))
        if found.shape != shape:
            raise InputError(f"{name} has shape {found.shape}, config.json ({config.family}) says {shape}")
        if name in tensors:
            if found.dtype not in FLOATS:
                raise InputError(f"{name} is {found.dtype}, expected float32, float16 or bfloat16")
            entries[name] = Weight(found)
        elif name not in ours and not name.startswith("model.layers."):
            raise InputError(f"{name} is quantized, expected the matrices of the layers alone to be")
    if config.quantized and not entries.keys() - tensors.keys():
        raise InputError("config.json has a quantization_config, but no matrix is quantized; remove it, or quantize()")
    if broken := broken_promise(config, tensors):
        raise InputError(broken)
    for name in _unread(config, tensors):
        del entries[name]
    head = entries.get("lm_head.weight") or entries["model.embed_tokens.weight"]
    if config.norm_head and isinstance(head, Weight):  # blocks are of the head as it is used
        head = NormHead(head.array)
    return Weights({**entries, "lm_head.weight": head})


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """All tensors of a folder, mapped and unread: of `model.safetensors`, else of `pytorch_model.bin`.

    Either may be cut into shards, whose names stand in an index beside them. A `.bin` is parsed and never executed
    (see `checkpoint.torch_files`); with safetensors beside it, it is not looked at. Matrices that a manifest says to be
    quantized (see `refimpl.checkpoint.quantized_files`) come as a `QuantizedWeight`.

    Raises InputError for what is missing, damaged, or not understood.
    """
    folder = Path(folder)
    tensors = _read_tensors(folder)
    if not (folder / MANIFEST).exists():
        return tensors
    tensors, quantized = collect(folder / MANIFEST, tensors)
    return {**tensors, **{name: quantized_weight(*found) for name, found in quantized.items()}}


def _read_tensors(folder: Path) -> dict[str, Any]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).exists():
            return map_tensors(folder, single)
        index = folder / f"{single}.index.json"
        if index.exists():
            return _map_shards(index)
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index; expected weights")


def map_tensors(folder: Path, file: str) -> dict[str, Any]:
    """The tensors of a folder's file (see `refimpl.files.inside`), by its suffix `.safetensors` or another."""
    inside(folder, file)
    mapped = map_safetensors(folder / file) if file.endswith(".safetensors") else map_torch(folder / file)
    for name in mapped:
        if not name.isprintable() or len(name) > 200:
            raise InputError(f"{folder / file} has a tensor called {name!a:.80}, which is no parameter's name")
    return mapped


def _map_shards(index: Path) -> dict[str, Any]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map, which says the file of each tensor; download it again")
    folder = index.parent
    shards: dict[str, dict[str, Any]] = {}
    tensors = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index} places {name} in {file!r}, expected the name of a file beside it")
        if file not in shards:
            if not (folder / file).exists():
                raise InputError(f"the shard {folder / file} is missing, but {index.name} names it; download it again")
            shards[file] = map_tensors(folder, file)
        if name not in shards[file]:
            raise InputError(f"{folder / file} lacks {name}, which {index.name} places there; download both again")
        tensors[name] = shards[file][name]
    return tensors


def read_ahead(array: np.ndarray) -> None:
    """Asks the system to fetch a mapped array from the disk by now, where it can be asked; else nothing happens.

    Pages that are fetched one by one, as they are touched, take several times as long.
    """
    _advise(array, getattr(mmap, "MADV_WILLNEED", None))


def let_go(array: np.ndarray) -> None:
    """Tells the system that a mapped array has been read, so that it does not count as this process's memory."""
    _advise(array, getattr(mmap, "MADV_DONTNEED", None))


def _advise(array: np.ndarray, advice: int | None) -> None:
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    mapped = base.base.obj if isinstance(base.base, memoryview) else base.base
    if isinstance(mapped, mmap.mmap) and advice is not None and array.flags.c_contiguous and array.nbytes:
        start = array.ctypes.data - base.ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= 0 and start + array.nbytes <= len(mapped):
            mapped.madvise(advice, first, start + array.nbytes - first)


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file as read-only arrays mapped from disk; opening reads the header alone.

    The safetensors library validates the file (lengths that lie, overlaps, holes, truncation); it would copy the
    tensors, so their places are then read from the header that it has accepted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}; download it again") from None
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=0)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{name} in {path} has the format {entry['dtype']}, which is not known here")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        # `frombuffer` cannot take an empty buffer or a misaligned one; a view of the bytes can be both.
        tensors[name] = data[start:stop].view(np.ndarray).view(dtype).reshape(entry["shape"])
    return tensors
