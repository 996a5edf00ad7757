"""A checkpoint in any layout becomes safetensors: `refimpl convert SRC --out DST`.

The weights are written unchanged, in another format, with NormHead applied, or with a LoRA adapter merged in. They are
read and written tile by tile, so memory stays small whatever the size. The same tensors and options give the same
files, byte for byte, whatever the layout of the source. `conversion.json` records the source, `SHA256SUMS` the sums.

Everything is written into `DST.part`, which becomes DST when it is complete. If a conversion is interrupted or the disk
is full, the next one goes on where it stopped, provided that the options, the adapter's sha256 and the sizes and times
of the source's files are the same. The source is only read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint import shards
from refimpl.checkpoint.folder import read_checkpoint
from refimpl.checkpoint.foreign import adapter_beside
from refimpl.checkpoint.layout import APART, config_keys, in_layout
from refimpl.checkpoint.lora import adapter_files, made_for, merge
from refimpl.checkpoint.pages import read_ahead
from refimpl.checkpoint.resolve import expected_shapes, resolve
from refimpl.checkpoint.weights import FLOATS, NormHead, Weight, row_lengths
from refimpl.config import Config, read_config
from refimpl.errors import InputError, Remark
from refimpl.files import read_json, sha256
from refimpl_kernels.ops import DTYPES

SHARD_BYTES = 5_000_000_000
AHEAD = 4  # tiles that the disk is asked for at a time
REPORT = "conversion.json"


@dataclass(frozen=True)
class Converted:
    """A tensor to be written: its rows, read in `dtype`."""

    weight: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order, a few MiB at a time. The disk fetches the next ones meanwhile."""
        rows = self.weight.shape[0]
        step = max(1, shards.TILE_BYTES * rows // max(1, shards.size_of(self)))
        for start in range(0, rows, step):
            if (array := getattr(self.weight, "array", None)) is not None:
                read_ahead(array[start : start + AHEAD * step])
            block = self.weight.read(self.dtype, slice(start, start + step))
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def convert(
    source: str | Path, out: str | Path, dtype: str | None = None, shard_size: int | str = SHARD_BYTES,
    normalize_head: bool = False, lora: str | Path | None = None, layout: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the checkpoint in `source` as safetensors into the new folder `out`; returns what `conversion.json` says.

    `dtype`: "float32", "bfloat16" or "float16" for all parameters; without it, formats stay. `shard_size`: the most
    bytes of tensors in a file, such as 5_000_000_000 or "5GB"; a larger tensor gets a file of its own. `lora`: the
    folder of a peft adapter to merge (`checkpoint.lora`). Other files of the folder are copied, but not its subfolders,
    and links only if they lead into the folder or Hugging Face's cache. `sha256sum -c SHA256SUMS` checks the result.

    `normalize_head` applies NormHead, so that software for Baichuan 1 runs a Baichuan2. It divides each row of lm_head
    by its length, in the format that is written; the official README's script does it in the format of the source. In
    bfloat16, the length and the quotient are rounded, so that a row's length is within 0.4 % of 1 (`row lengths` in
    the result); with `dtype="float32"` it is within 1e-7. The config then says `lm_head_normalized`, which this
    package reads and checks. The official Baichuan2 code would normalise, and round, once more.

    `layout`: "llama" splits W_pack and applies NormHead, "baichuan" is the way back (`checkpoint.layout`).

    Raises InputError if the source cannot be loaded, changes meanwhile or has links that lead elsewhere, if `out`
    exists, cannot be written or is being written by another conversion, if a number does not fit the format, and if
    the adapter is not understood.

    Source: the head as in README.md of baichuan-inc/Baichuan2, "migrating Baichuan 1 optimisations".
    """
    source, out = Path(source), Path(os.path.realpath(out))
    if source.resolve() in out.parents:
        raise InputError(f"{out} is inside {source}, which is only read; choose another place")
    config = read_config(source)
    before = shards.stamps(source)
    tensors = read_checkpoint(source)
    resolve(config, tensors)  # everything is there and fits
    if (beside := adapter_beside(source)) and (lora is None or Path(lora).resolve() != source.resolve()):
        warnings.warn(beside, Remark, stacklevel=2)
    normalize_head |= layout == "llama" and config.norm_head
    entries = _entries(config, tensors, dtype, normalize_head)
    # An adapter of either layout is merged in its own: one that was trained on W_pack, or on q, k and v apart.
    other = layout is not None and lora is not None and config.qkv_packed == bool({*APART} & made_for(Path(lora)))
    if lora is not None and not other:
        entries = _merged(entries, Path(lora))
    if layout is not None:
        kinds = {name: entry.dtype for name, entry in entries.items()}
        weights = in_layout(layout, config, {name: entry.weight for name, entry in entries.items()})
        usual = kinds[f"model.layers.0.self_attn.{config.qkv_modules[0]}.weight"]
        entries = {name: Converted(weight, kinds.get(name, usual)) for name, weight in weights.items()}
    if lora is not None and other:
        entries = _merged(entries, Path(lora))
    files = shards.cut(entries, shards.byte_count(shard_size))
    adapter = {path.name: sha256(path) for path in adapter_files(Path(lora))} if lora else None
    report: dict[str, Any] = {
        "family": config.family,
        "options": {"dtype": dtype, "normalize_head": normalize_head, "lora": adapter, "layout": layout},
        "source": {name: size for name, (size, _, _) in before.items()},
        "tensors": len(entries),
        "bytes": sum(map(shards.size_of, entries.values())),
    }
    changed = [time for _, time, _ in before.values()]
    with shards.workplace(out, files, {**report, "changed": changed}) as work:
        shards.copy_others(source, work)
        _write_config(source, work, dtype, normalize_head, config, layout)
        sums = shards.write_shards(work, files, "converting")
        shards.expect_unchanged(source, before)
        if normalize_head:
            report["row lengths"] = _shortest_and_longest(entries["lm_head.weight"])
        shards.write_json(work / REPORT, report)
        shards.write_sums(work, sums)
    return report


def _entries(
    config: Config, tensors: Mapping[str, Any], dtype: str | None, normalize_head: bool
) -> dict[str, Converted]:
    """The tensors to write, in the model's own order, which does not depend on the source's layout."""
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    if normalize_head and not config.norm_head:
        raise InputError(f"this {config.family} has no NormHead to apply; leave --normalize-head out")
    order = {name: place for place, name in enumerate(expected_shapes(config))}
    entries = {}
    for name in sorted(tensors, key=lambda name: (order.get(name, len(order)), name)):
        array = tensors[name]
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS or not array.ndim:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise InputError(f"{name} is {found}, expected floats; is it quantized? convert what it was made of")
        # Buffers such as the rotary frequencies of Baichuan 1 are not parameters; they keep their format.
        wanted = DTYPES[dtype] if dtype and name in order else array.dtype
        head = normalize_head and name == "lm_head.weight"
        entries[name] = Converted((NormHead if head else Checked)(array), wanted)
    return entries


def _merged(entries: dict[str, Converted], adapter: Path) -> dict[str, Converted]:
    """The tensors to write, with an adapter merged."""
    found = merge(adapter, {name: entry.weight for name, entry in entries.items()})
    return entries | {name: Converted(weight, entries[name].dtype) for name, weight in found.items()}


class Checked(Weight):
    """A weight that is refused if its conversion makes numbers infinite."""

    def _convert(self, values, dtype):
        with np.errstate(over="ignore"):
            converted = super()._convert(values, dtype)
        if converted.dtype != values.dtype and np.isinf(converted).any() and not np.isinf(values).any():
            largest = np.abs(values.astype(np.float64)).max()
            raise InputError(f"a weight of magnitude {largest:g} is beyond {dtype}; convert to bfloat16 or float32")
        return converted


def _shortest_and_longest(entry: Converted) -> list[float]:
    """The lengths of the shortest and the longest row of the head as written, without rows of zeros."""
    step = max(1, shards.TILE_BYTES // entry.weight.shape[1])
    lengths = np.concatenate([
        row_lengths(entry.weight.read(entry.dtype, slice(start, start + step)).astype(np.float64))
        for start in range(0, entry.weight.shape[0], step)
    ])  # fmt: skip
    lengths = lengths[lengths > 0]
    return [float(lengths.min(initial=1)), float(lengths.max(initial=1))]


def _write_config(
    source: Path, work: Path, dtype: str | None, normalize_head: bool, config: Config, layout: str | None
) -> None:
    keys = read_json(source / "config.json")
    if dtype is not None:
        keys["dtype" if "dtype" in keys else "torch_dtype"] = dtype  # transformers 5 renamed it
    if normalize_head:
        keys["lm_head_normalized"] = True
    shards.write_json(work / "config.json", config_keys(layout, config, keys) if layout else keys)
