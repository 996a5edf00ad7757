"""Rules about all graphs together: parts follow one another, and graphs of one part share weights and grids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from export.files.graph_folder import GraphFolder
from export.preflight.of_names import STARTS, as_compiled
from export.preflight.rule import readable, rule
from refimpl.errors import at_most

SAMPLES, SAMPLE_BYTES = 64, 4096  # of two weight files that should be the same


@rule(
    "encodings-file-missing",
    "error",
    wrong="model.encodings in 9 of 10 folders",
    source="zoo: one for each part",
    remedy="write model.encodings for each graph, or for none",
)
def encodings_file_missing(graphs: list[GraphFolder]):
    """Either every graph has encodings or none has."""
    lacking = [graph for graph in graphs if graph.grids is None]
    if len(lacking) < len(graphs):
        yield from ((graph, "", f"it has no .encodings, {len(graphs) - len(lacking)} others have") for graph in lacking)


@rule(
    "chain-broken",
    "error",
    wrong="parts 1, 2 and 4 of 4",
    source="zoo: split_onnx",
    remedy="export all parts in one go",
)
def chain_broken(graphs: list[GraphFolder]):
    """Parts 1 to N are all there. Each reads what the part before it gives, and has the layers that come next."""
    for run in _runs(graphs):
        numbers, totals = [graph.part.number for graph in run], {graph.part.total for graph in run}
        if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
            yield run[0], "", f"there are parts {at_most(numbers, 12)} of {at_most(sorted(totals))}"
            continue
        if run[0].reads and run[0].reads.name not in STARTS:
            yield run[0], run[0].reads.name, f"part 1 reads it, expected {STARTS[0]}"
        if run[-1].gives and run[-1].gives.name != "logits":
            yield run[-1], run[-1].gives.name, "the last part gives it, expected logits"
        for giver, taker in pairwise(run):
            a, b = giver.gives, taker.reads
            if a and b and as_compiled(a.name) != as_compiled(b.name):
                yield taker, b.name, f"{giver.name} gives {readable(a.name)} instead"
            elif a and b and (a.shape, a.dtype) != (b.shape, b.dtype):
                yield taker, b.name, f"its shape is {b.shape}, but {giver.name} gives {a.shape}"
        layers = [layer for part in run for layer in sorted({layer for layer, _ in part.cache(part.graph.inputs)})]
        if layers != list(range(len(layers))):
            wrong = next(place for place, layer in enumerate(layers) if place != layer)
            yield run[0], "", f"the parts have layer {layers[wrong]} where {wrong} comes next"


@rule(
    "encodings-boundary-differs",
    "error",
    wrong="part 2 gives it in steps of 0.010, part 3 reads it in steps of 0.011",
    source="zoo 0.65: 'Non-identical quantization parameters'",
    remedy="copy the giver's encoding",
)
def encodings_boundary_differs(graphs: list[GraphFolder]):
    """Both sides of a boundary have the same grid, number for number."""
    for run in _runs(graphs):
        for giver, taker in pairwise(run):
            if giver.gives and taker.reads and as_compiled(giver.gives.name) == as_compiled(taker.reads.name):
                a, b = giver.standing.get(giver.gives.name), taker.standing.get(taker.reads.name)
                if a and b and a != b:
                    yield taker, taker.reads.name, f"it has {b}, but {giver.name} gives {a}"


@rule(
    "encodings-graphs-differ",
    "error",
    wrong="attention_mask in steps of 0.010 for the prompt, 0.011 for a token",
    source="zoo: one quantizer for both",
    remedy="calibrate once, and write one set for both graphs",
)
def encodings_graphs_differ(graphs: list[GraphFolder]):
    """Prompt and token graphs share weights and cache: inputs, outputs and weights have one grid in both."""
    for first, other in _siblings(graphs):
        shared = {value.name for value in first.ends} | {tensor.name for tensor in first.graph.initializers}
        for name in shared & set(first.grids or ()) & set(other.grids or ()):
            a, b = (first.grids or {})[name], (other.grids or {})[name]
            if a != b:
                yield other, name, f"it has {b}, but in {first.name} {a}"


@rule(
    "weights-not-shared",
    "error",
    wrong="q_proj.weight at another offset in the prompt's model.data than in the token's",
    source="zoo: link job, weight_sharing_enabled",
    remedy="export both graphs of a part from one model",
)
def weights_not_shared(graphs: list[GraphFolder]):
    """A part's graphs have the same weights at the same places, so that linking keeps one copy."""
    for first, other in _siblings(graphs):
        files = [graph.of_kind(".data")[:1] for graph in (first, other)]
        places: list[dict] = [
            {t.name: (t.dtype, t.dims, t.external) for t in graph.graph.initializers if t.external is not None}
            for graph in (first, other)
        ]
        differ = sorted(name for name in {**places[0], **places[1]} if places[0].get(name) != places[1].get(name))
        for name in differ:
            yield other, name, f"it has another shape or offset than in {first.name}"
        if not differ and all(files) and not _alike(files[0][0], files[1][0]):
            yield other, files[1][0].name, f"its bytes differ from those of {first.name}"


def _runs(graphs: list[GraphFolder]) -> Iterator[list[GraphFolder]]:
    """The graphs of each length and context, in the order of their parts; nothing for a folder with one graph."""
    runs: dict[tuple, list[GraphFolder]] = {}
    for graph in graphs:
        if graph.called:
            runs.setdefault(graph.called[:3], []).append(graph)
    for run in runs.values():
        if len(graphs) > 1:
            yield sorted(run, key=lambda graph: graph.part.number)


def _siblings(graphs: list[GraphFolder]) -> Iterator[tuple[GraphFolder, GraphFolder]]:
    """Pairs of graphs of the same part: the first of them with each other one."""
    parts: dict[tuple[int, int], list[GraphFolder]] = {}
    for graph in graphs:
        if graph.called:
            parts.setdefault(graph.called[3:], []).append(graph)
    for first, *others in parts.values():
        yield from ((first, other) for other in others)


def _alike(a: Path, b: Path) -> bool:
    """Whether two files have the same size, and the same bytes at SAMPLES places: weights are too large to be read."""
    sizes = a.stat().st_size, b.stat().st_size
    if sizes[0] != sizes[1]:
        return False
    if os.path.samefile(a, b):
        return True
    with open(a, "rb") as one, open(b, "rb") as other:
        for place in range(SAMPLES):
            offset = max(sizes[0] - SAMPLE_BYTES, 0) * place // (SAMPLES - 1)
            one.seek(offset)
            other.seek(offset)
            if one.read(SAMPLE_BYTES) != other.read(SAMPLE_BYTES):
                return False
    return True
