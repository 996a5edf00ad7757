"""The outputs of a device as traces, however they were stored and named.

    read_device("parts", "outputs")         Trace of {graph}/{isolated or chained}/{tap}: the names of `verify`'s report

`outputs` is a file or a folder, or a mapping of names to arrays:

    .h5             a dataset of AI Hub: /data/{i}, with the attributes `name` and `order`, and in it batch_0
    .npz            arrays by name
    .pb             one ONNX tensor
    a folder        .npy, .raw, .bin and .pb files by name, also in Result_0, as qnn-net-run leaves them; or files
                    and folders that have the graphs' names, also in isolated/ and chained/

Outputs are fitted to the manifest, never the other way round. Names may be those of the graph or of the tap; compilers
write `.` and `/` as `_` and put a `_` in front; or names are output_0, output_1 … in the graph's order. Numbers may be
floats of another width, or codes, which the encodings turn into values. Arrays may lack axes of length 1, or have their
axes in another order; keys and values may be the whole right-aligned cache; padding may have been cut off.

All outputs are untrusted: `entries.py` says what is there, and an array is read only if its size is the manifest's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import numpy as np

from export.files.entries import Entry, by_graph
from export.folder.manifest import read_manifest
from export.graphs.naming import sanitised
from export.graphs.plan import GraphSpec, Plan, Value, Way, unpadded
from refimpl.errors import InputError, at_most
from refimpl.names import taps
from refimpl.trace import Trace
from refimpl_kernels.affine import Encoding, dequantize

Grids = Mapping[str, Any]  # tap -> Encoding, or whatever else `refimpl.grids.encodings.grid_of` gives


@dataclass(frozen=True)
class Answer:
    """The outputs of a device for one graph.

    `arrays`: name of an output, or of a probed tap -> float32 in the shape of the graph, padding included.
    `values`: what the manifest says of each. `remarks`: how the arrays had to be changed to fit it.
    """

    spec: GraphSpec
    way: Way
    arrays: Mapping[str, np.ndarray]
    values: Mapping[str, Value]
    remarks: tuple[str, ...] = ()

    @property
    def in_order(self) -> list[tuple[str, Value]]:
        """Tap and value of all that the answer should hold, in computing order."""
        shown = {value.tap or name: value for name, value in self.values.items()}
        return [(tap, shown[tap]) for tap in taps(self.spec.config) if tap in shown]

    @property
    def probed(self) -> list[str]:
        """The taps that are not outputs of the graph."""
        outputs = {value.name for value in self.spec.outputs}
        return [name for name in self.values if name not in outputs]

    @property
    def trace(self) -> Trace:
        """The arrays as the taps that they show, in computing order, without padding."""
        return Trace((tap, unpadded(value, self.arrays[value.name], self.spec)) for tap, value in self.in_order
                     if value.name in self.arrays)  # fmt: skip


def read_device(
    folder: str | Path, outputs: Any, grids: Grids | None = None, way: Way = "isolated", graph: str | None = None
) -> Trace:
    """A device's outputs as one Trace: `{graph}/{way}/{tap}` -> float32 in the tap's layout, without padding.

    Arguments and errors are those of `read_answers`.
    """
    trace = Trace()
    for answer in read_answers(folder, outputs, grids, way, graph):
        trace |= {f"{answer.spec.name}/{answer.way}/{tap}": array for tap, array in answer.trace.items()}
    return trace


def read_answers(
    folder: str | Path, outputs: Any, grids: Grids | None = None, way: Way = "isolated", graph: str | None = None
) -> list[Answer]:
    """A device's outputs for each graph of the export in `folder`, in the order in which the graphs run.

    `outputs`: a path or a mapping, see above. `grids`: tap -> Encoding, where outputs may be codes. `way`: how the
    graphs were fed, where no folder says it. `graph`: whose outputs they are, where no name says it.

    Raises InputError, in one line, for whatever does not fit the manifest, is damaged, or is not what it seems.
    """
    plan, _ = read_manifest(Path(folder), weights=False)
    return fit_answers(plan, outputs, grids, way, graph)


def fit_answers(
    plan: Plan, outputs: Any, grids: Grids | None = None, way: Way = "isolated", graph: str | None = None
) -> list[Answer]:
    """`read_answers` for an export whose plan has been read."""
    specs = {spec.name: spec for run in plan.runs for spec in run}
    if way not in get_args(Way):
        raise InputError(f"way is {way!r}, expected {' or '.join(get_args(Way))}")
    if graph is not None and graph not in specs:
        raise InputError(f"there is no graph {graph!a:.99}; the export has {at_most(specs)}")
    found: dict[tuple[str, Way], Answer] = {}
    for name, how, entries in by_graph(outputs, specs, largest(specs), way, graph):
        spec = specs[name] if name else _whose(entries, specs)
        if (spec.name, how) in found:
            raise InputError(f"{spec.name} has {how} outputs twice, in {entries[0].source} as well; remove one")
        found[spec.name, how] = fit(spec, how, entries, grids or {})
    return [found[name, how] for how in get_args(Way) for name in specs if (name, how) in found]


# Which graph the outputs are of


def _whose(entries: list[Entry], specs: Mapping[str, GraphSpec]) -> GraphSpec:
    """The only graph whose outputs these can be, by names and then by shapes."""
    fitting = []
    for spec in specs.values():
        try:
            matched = _matched(spec, entries)
            for entry, value in matched.values():
                _fitted(entry, value, spec, None, strict=False)
        except InputError:
            continue
        fitting.append(spec)
    if len(fitting) == 1:
        return fitting[0]
    if len(specs) == 1:
        return next(iter(specs.values()))  # fitting them to it raises an error that says more
    names = at_most([entry.name for entry in entries], 3) or "nothing"
    of = at_most([spec.name for spec in fitting] or specs, 4)
    kind = f"may be of {len(fitting)} graphs, {of}" if fitting else f"fit none of the {len(specs)} graphs, {of}"
    raise InputError(f"the outputs {names} {kind}; name the file or folder after its graph")


def largest(specs: Mapping[str, GraphSpec]) -> int:
    """The count of numbers in the largest tensor that any graph may give."""
    return max(math.prod(value.shape) for spec in specs.values() for value in probes(spec).values())


# Fitting the entries to the manifest


def probes(spec: GraphSpec) -> dict[str, Value]:
    """Everything that a graph may give, by name: its outputs, and the taps inside it that a probe may show."""
    values = {value.name: value for value in spec.outputs}
    given = {value.tap for value in spec.outputs}
    return values | {name: spec.value(name) for name in spec.taps if name not in given and name not in values}


def fit(spec: GraphSpec, way: Way, entries: list[Entry], grids: Grids) -> Answer:
    """The entries as a graph's outputs. Raises InputError that says how they do not fit."""
    matched = _matched(spec, entries)
    values = {value.name: value for value in spec.outputs}
    values |= {name: value for name, (_, value) in matched.items()}
    arrays, remarks = {}, []
    for name in values:
        if name in matched:
            entry, value = matched[name]
            arrays[name], remark = _fitted(entry, value, spec, grids.get(value.tap or name))
            remarks += [f"{name}: {remark}"] if remark else []
    return Answer(spec, way, arrays, values, tuple(remarks))


def _matched(spec: GraphSpec, entries: list[Entry]) -> dict[str, tuple[Entry, Value]]:
    """Output -> its entry. Names that a compiler has changed are turned back into the manifest's."""
    if not entries:
        raise InputError(f"there are no outputs for {spec.name}")
    known = probes(spec)
    outputs = [value.name for value in spec.outputs]
    called: dict[str, str] = {f"output_{i}": name for i, name in enumerate(outputs)}
    for name, value in known.items():
        for alias in {name, value.tap or name} | {sanitised(name), sanitised(value.tap or name)}:
            if alias in called and called[alias] != name and alias != name:
                continue
            called[alias] = name
    matched: dict[str, tuple[Entry, Value]] = {}
    for entry in entries:
        name = called.get(entry.name) or called.get(sanitised(entry.name)) or ""
        if not name:
            raise InputError(f"{entry.source} is not an output of {spec.name}, which gives {at_most(outputs)}")
        if name in matched:
            raise InputError(f"{entry.source} and {matched[name][0].source} are both {name} of {spec.name}")
        matched[name] = entry, known[name]
    return matched


def _fitted(entry: Entry, value: Value, spec: GraphSpec, grid: Any, strict: bool = True) -> tuple[np.ndarray, str]:
    """The array of an entry in the manifest's shape and dtype, and how it was changed.

    Without `strict`, it is only checked whether the entry may fit, and nothing is read.
    """
    dtype, dims = entry.dtype, entry.shape
    if dims is None or dtype is None:
        count = math.prod(value.shape)
        wide = {1: "u1", 2: "u2" if isinstance(grid, Encoding) else "f2", 4: "f4", 8: "f8"}
        size, rest = divmod(entry.nbytes, count)
        if rest or size not in wide:
            raise InputError(
                f"{entry.source} has {entry.nbytes} bytes, but {value.name} of {spec.name} is {value.shape}: "
                f"{4 * count} as float32, {2 * count} as 16 bits, {count} as 8"
            )
        dims, dtype = value.shape, np.dtype(f"<{wide[size]}")
    arrange, moved = _arrangement(dims, value, spec, entry.source)
    if dtype.kind in "iub" and not isinstance(grid, Encoding) and strict:
        raise InputError(
            f"{entry.source} holds {dtype}, but {value.name} is float32 and has no encoding that would turn codes "
            "into values; give the encodings of the model"
        )
    if not strict:
        return np.empty(0, np.float32), ""
    array = entry.read()
    array = arrange(array.view(dtype).reshape(dims) if entry.shape is None else array)
    changes = [moved]
    if dtype.kind in "iub":
        bare = "; a .npy would say so if they are float16" if entry.shape is None and dtype.itemsize == 2 else ""
        array = dequantize(_codes(array, grid, entry.source, bare), grid)
        changes.append(f"{dtype} codes, as values{bare}")
    elif dtype != np.float32:
        changes.append(f"stored as {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    return array, ", ".join(filter(None, changes))


def _codes(array: np.ndarray, grid: Encoding, source: str, hint: str = "") -> np.ndarray:
    """Unsigned or signed codes, as codes from 0 on. Raises InputError for codes beyond those of the grid."""
    codes, last = array.astype(np.int64), 2**grid.bits - 1
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if array.dtype.kind == "i" and (low < 0 or array.dtype.itemsize * 8 == grid.bits):
        codes, low, high = codes + (last + 1) // 2, low + (last + 1) // 2, high + (last + 1) // 2
    if low < 0 or high > last:
        raise InputError(
            f"{source} has codes from {low} to {high}, expected 0 to {last}: its grid has {grid.bits} bits{hint}"
        )
    return codes


def _arrangement(
    dims: tuple[int, ...], value: Value, spec: GraphSpec, source: str
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function that brings an array of these dimensions into the shape of the value, and its meaning in words."""
    axis, S = value.token_axis, value.shape[value.token_axis]
    lengths = {S: ""}
    if value.name.startswith("past_"):
        known = "" if value.shape.count(spec.context) == 0 else (
            f", whose slots are taken to be on axis {axis}, for another one has {spec.context} as well")  # fmt: skip
        lengths.setdefault(spec.context, f"the last {S} of a cache of {spec.context}{known}")
    lengths.setdefault(spec.real, f"padding was cut off, {spec.real} tokens of {S}")
    for length, cut in lengths.items():
        target = (*value.shape[:axis], length, *value.shape[axis + 1 :])
        order, said = _order(dims, target)
        if order is None:
            continue

        def arrange(array: np.ndarray, order=order, target=target, length=length) -> np.ndarray:
            full = tuple(size for size in dims if size != 1)
            array = array.reshape(full).transpose(order).reshape(target)
            if length > S:
                return np.moveaxis(np.moveaxis(array, axis, 0)[-S:], 0, axis)
            pads = [(0, 0)] * len(target)
            pads[axis] = (S - length, 0)
            return np.pad(array, pads) if length < S else array

        return arrange, ", ".join(filter(None, (said, cut)))
    raise InputError(f"{source} has the shape {dims}, but {value.name} of {spec.name} is {value.shape}")


def _order(dims: tuple[int, ...], target: tuple[int, ...]) -> tuple[tuple[int, ...] | None, str]:
    """The order of axes that turns `dims` into `target`, apart from axes of length 1, with the fewest that move."""
    have, want = ([size for size in sizes if size != 1] for sizes in (dims, target))
    if have == want:
        return tuple(range(len(have))), "" if dims == target else f"{dims}, without or with other axes of 1"
    if sorted(have) != sorted(want) or len(have) > 4:
        return None, ""
    orders = [p for p in permutations(range(len(have))) if [have[i] for i in p] == want]
    moves = [sum(i != at for at, i in enumerate(order)) for order in orders]
    if moves.count(min(moves)) > 1:
        return None, ""
    return orders[moves.index(min(moves))], f"transposed from {dims}"
