"""Writing a quantized model into a folder: `refimpl quantize MODEL --out DIR`, or `model.save(DIR)` from memory.

Matrices are read from the mapped checkpoint tile by tile, quantized on all cores, and written in the model's order.
Memory holds two quantized matrices and some tiles, whatever the size of the model. The same model and recipe give the
same bytes: at any number of threads, after an interruption, and from memory as from a folder. The layout is described
in `refimpl.checkpoint.quantized_files`; `refimpl.checkpoint.shards` writes the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.blocks.importance import Importance
from refimpl.blocks.quantize import Recipe, Scheme, plan, quantizing
from refimpl.checkpoint import shards
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.pages import read_ahead
from refimpl.checkpoint.quantized_files import MANIFEST, VERSION, describe_matrix
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.checkpoint.weights import QuantizedWeight, Weight, rounded_by
from refimpl.config import OURS
from refimpl.errors import InputError
from refimpl.files import read_json

SHARD_BYTES = 500_000_000  # at most so many bytes are done again after an interruption


class Stored(Weight):
    """An array that is written unchanged."""

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order, a few MiB at a time."""
        rows = np.atleast_1d(self.array)
        step = max(1, shards.TILE_BYTES * len(rows) // max(1, rows.nbytes))
        for start in range(0, len(rows), step):
            read_ahead(rows[start : start + 2 * step])
            yield np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Pending:
    """An array of a matrix that is quantized only when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    arrays: Callable[[], Mapping[str, np.ndarray]]
    part: str

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order, a few MiB at a time."""
        return Stored(self.arrays()[self.part]).tiles()


def quantize_checkpoint(
    source: str | Path, out: str | Path, recipe: Recipe, keep: Sequence[str] = (),
    importance: Importance | None = None, shard_size: int | str = SHARD_BYTES, threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Quantizes the checkpoint in `source` into the new folder `out`; returns the manifest's entries.

    `recipe`, `keep`, `importance` and `options`: see `blocks.quantize`. `threads`: all cores if not given; the bytes
    do not depend on them. If a run is interrupted, the next one goes on after its last complete file.

    Raises InputError if the source cannot be loaded, the recipe does not fit it, a weight is NaN or infinite, `out`
    exists, or the disk is too small.
    """
    limit = shards.byte_count(shard_size)
    checkpoint = Checkpoint.read(source)
    planned = plan(checkpoint.weights, recipe, keep, **options)
    with quantizing(checkpoint.weights, planned.schemes, importance, threads) as blocks:
        return _write(checkpoint, Path(out), planned.schemes, blocks, planned.provenance(importance), limit)


def save(checkpoint: Checkpoint, out: str | Path, shard_size: int | str = SHARD_BYTES) -> dict[str, Any]:
    """Writes a checkpoint into the new folder `out`, its weights unchanged; returns the manifest's entries.

    An interrupted run leaves nothing. Raises InputError if `out` exists or the disk is too small.
    """
    return _write(checkpoint, Path(out), {}, None, checkpoint.weights.provenance, shards.byte_count(shard_size))


def _write(
    checkpoint: Checkpoint,
    out: Path,
    schemes: Mapping[str, Scheme],
    blocks: Any,
    provenance: Mapping[str, Any],
    limit: int,
) -> dict[str, Any]:
    folder, out = checkpoint.folder, Path(os.path.realpath(out))
    if folder.is_file():
        said = "whose folder has no config.json and tokenizer to go with the weights"
        raise InputError(f"the model comes from {folder}, {said}; save the model that the file was made of")
    if folder.resolve() in out.parents:
        raise InputError(f"{out} is inside {folder}, which is only read; choose another place")
    before = shards.stamps(folder)
    files, matrices = _shards(checkpoint, schemes, blocks, limit)
    report: dict[str, Any] = {
        "version": VERSION,
        "family": checkpoint.config.family,
        **provenance,
        "source": {name: size for name, (size, _, _) in before.items()},
        "bytes": sum(shards.size_of(entry) for shard in files.values() for entry in shard.values()),
        "tensors": matrices,
    }
    changed = [time for _, time, _ in before.values()]
    with shards.workplace(out, files, {**report, "changed": changed}, resumable=bool(schemes)) as work:
        shards.copy_others(folder, work)
        sums = shards.write_shards(work, files, "quantizing" if schemes else "saving")
        shards.expect_unchanged(folder, before)
        keys = read_json(folder / "config.json")
        keys.pop("quantization_config", None)
        if matrices:
            keys["quantization_config"] = OURS
            shards.write_json(work / MANIFEST, {**report, "files": sums})
        shards.write_json(work / "config.json", keys)
        shards.write_sums(work, sums)
    return report


def _shards(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], blocks: Any, limit: int
) -> tuple[shards.Shards, dict[str, dict[str, Any]]]:
    """The files and their entries, and the manifest's entry of each quantized matrix."""
    weights, order = checkpoint.weights, list(expected_shapes(checkpoint.config))
    entries: dict[str, Any] = {}
    matrices: dict[str, dict[str, Any]] = {}

    @lru_cache(maxsize=1)  # the arrays of a matrix stand one after the other
    def made(name: str) -> Mapping[str, np.ndarray]:
        return blocks(name).arrays()

    for name in [*order, *(name for name in weights if name not in order)]:
        weight = weights[name]
        if name in schemes:
            header, arrays = schemes[name].layout(weight.shape)
            matrices[name] = describe_matrix(header, rounded_by(header["format"]))
            for part, (size, dtype) in arrays.items():
                entries[f"{name}.{part}"] = Pending(size, dtype, partial(made, name), part)
        elif isinstance(weight, QuantizedWeight):
            matrices[name] = describe_matrix(weight.blocks.header(), weight.rounded)
            entries |= {f"{name}.{part}": Stored(array) for part, array in weight.blocks.arrays().items()}
        elif name in order:
            entries[name] = Stored(weight.array)
        # a tied head is the embedding
    return shards.cut(entries, limit), matrices
