"""A model's inputs and outputs as AI Hub lists them, and the outputs that it gives, by the graph's own names.

**Source**: the files of outputs as qai-hub 0.56 writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from export.files.entries import of_file
from export.graphs.naming import sanitised
from export.graphs.plan import Arrays
from export.phone.source import Source
from refimpl.errors import InputError


def io_spec(spec: Mapping[str | None, Iterable]) -> dict[str, list]:
    """A model's inputs or outputs as the server lists them: graph -> [name, dtype, shape, scale, zero point]."""
    return {graph or "": [list(tensor) for tensor in tensors] for graph, tensors in (spec or {}).items()}


def of_graph(told: Mapping[str, list] | None, graph: str) -> list:
    """The inputs or outputs of one graph, in such a list."""
    told = told or {}
    return told.get(graph) or told.get("") or []


def named_outputs(path: Path, source: Source, samples: int, grids: Sequence = ()) -> list[Arrays]:
    """The samples in a file of outputs, under the graph's names; if the file has other names, their order decides.

    Raises InputError for another kind of file, or one that does not have the graph's outputs.
    """
    entries = list(of_file(path, max(map(math.prod, source.outputs.values())), samples))
    tensors = [entries[i : i + samples] for i in range(0, len(entries), samples)]
    if len(tensors) != len(source.outputs):
        raise InputError(f"AI Hub gave {len(tensors)} outputs of {source.name}, the graph has {len(source.outputs)}")
    theirs, mine = [sanitised(first.name) for first, *_ in tensors], {sanitised(name): name for name in source.outputs}
    own = [mine[name] for name in theirs] if set(theirs) == set(mine) else list(source.outputs)
    steps = {sanitised(name): (scale, zero) for name, _, _, scale, zero in grids if scale}
    columns: dict[str, list[np.ndarray]] = {}
    for called, name, column in zip(theirs, own, tensors, strict=True):
        if odd := [entry.shape for entry in column if entry.shape != source.outputs[name]]:
            raise InputError(f"AI Hub gave {name} of {source.name} as {odd[0]}, expected {source.outputs[name]}")
        arrays = [entry.read() for entry in column]
        if arrays[0].dtype.kind == "u" and called in steps:
            scale, zero = steps[called]
            arrays = [((array - np.float64(zero)) * scale) for array in arrays]
        columns[name] = [array.astype(np.float32) for array in arrays]
    return [dict(zip(columns, sample, strict=True)) for sample in zip(*columns.values(), strict=True)]
