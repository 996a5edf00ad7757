"""A context binary: what the compiler made of graphs for one NPU, and what it says of itself.

    binary = read_binary("part_2_of_5.bin")
    binary.graphs[0].inputs[1]        # attention_mask: (1, 1, 128, 4096) ufixed16, scale 0.000763, zero point 65535
    differences(binary, "build/b2-7b") # where its names, shapes and grids are not those of the export

AI Hub's binaries are such files, too. Qualcomm's own library reads them, in a process of its own (`qnn_system.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.files.graph_folder import GraphFolder, read_folders
from export.files.skeleton import ValueInfo
from export.graphs.borders import read_borders
from export.graphs.naming import sanitised
from export.run.library import library
from export.run.process import Process
from export.run.socs import soc_called, soc_numbered
from refimpl.errors import InputError, at_most

LIMIT = 60.0  # seconds; a description is read in milliseconds
# The compiler's name of a graph: our name, our name again, a hash, two numbers.
_SUFFIX = re.compile(r"(?P<name>.+)_(?P=name)_\d+(_\d+)*")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a compiled graph: real = (code - zero_point) * scale, if it is on a grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def __str__(self) -> str:
        grid = "" if self.scale is None else f", scale {self.scale:.6g}, zero point {self.zero_point}"
        return f"{self.name}: {self.shape} {self.dtype}{grid}"

    @property
    def bits(self) -> int:
        """How many bits an element has: the number in its dtype."""
        return int(re.sub(r"\D", "", self.dtype) or 0)


@dataclass(frozen=True)
class CompiledGraph:
    """One graph of a binary."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def called(self) -> str:
        """The name that was exported: without what ONNX Runtime adds to it, if it adds anything."""
        found = _SUFFIX.fullmatch(self.name)
        return found["name"] if found else self.name


@dataclass(frozen=True)
class Binary:
    """What a context binary says of itself. `soc_model` is QNN's number of the SoC, where the binary says it."""

    path: Path
    size: int
    backend: str
    build: str
    core: str
    blob: str
    soc: str
    soc_model: int | None
    graphs: tuple[CompiledGraph, ...]

    @property
    def made_for(self) -> str:
        """The SoC by name and number, or what is known of it."""
        if self.soc_model is None:
            return self.soc or "an SoC that it does not name"
        return soc_numbered(self.soc_model) + (f", {self.soc}" if self.soc else "")

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.size / 1e6:.2f} MB for {self.backend} of {self.made_for}",
            f"  QNN {self.build}, core API {self.core}, format {self.blob}",
        ]
        for graph in self.graphs:
            lines.append(f"{graph.called}" + (f"   (inside: {graph.name})" if graph.called != graph.name else ""))
            for kind, tensors in (("input ", graph.inputs), ("output", graph.outputs)):
                lines += [f"  {kind} {tensor}" for tensor in tensors]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same, for a machine."""
        return json.dumps({**asdict(self), "path": str(self.path)}, ensure_ascii=False)


def read_binary(path: str | Path) -> Binary:
    """What a context binary says of itself.

    Raises InputError for another kind of file, a damaged one, and if the package with Qualcomm's library is missing.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file; expected a context binary")
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} is empty; expected a context binary: copy or compile it again")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; mend its permissions") from None
    library("QnnSystem")
    try:
        with Process("export.phone.qnn_system", LIMIT) as child:
            found = child.ask("read", path=str(path.resolve()))
    except InputError as error:
        raise InputError(
            f"{path} is not a context binary, or damaged: Qualcomm's library says: {error}; copy or compile it again"
        ) from None
    graphs = tuple(
        CompiledGraph(graph["name"], tuple(map(_tensor, graph["inputs"])), tuple(map(_tensor, graph["outputs"])))
        for graph in found.pop("graphs")
    )
    return Binary(path, size, graphs=graphs, **found)


def _tensor(found: dict[str, Any]) -> Tensor:
    scale, offset = found.get("scale"), found.get("offset")
    return Tensor(found["name"], tuple(found["shape"]), found["dtype"], scale, None if offset is None else -offset)


@dataclass(frozen=True)
class Differences:
    """Where a binary is not what was exported: lines, each with the graph and the tensor. False if there are any."""

    lines: tuple[str, ...]
    compared: int

    def __bool__(self) -> bool:
        return not self.lines

    def __str__(self) -> str:
        if self.lines:
            count = f"{len(self.lines)} difference{'s' * (len(self.lines) > 1)}"
            return "\n".join([*self.lines, f"{count} in {self.compared} tensors"])
        return f"agrees: {self.compared} tensors have the names, shapes, types and grids of the export"

    def to_json(self) -> str:
        """The same, for a machine."""
        return json.dumps({"agrees": bool(self), "compared": self.compared, "differences": self.lines})


def differences(binary: Binary, folder: str | Path, soc: str | None = None) -> Differences:
    """Compares a binary's graphs with those of an export: names, shapes, types and grids, and the SoC if one is given.

    A compiler may turn `.` and `/` in names into `_`; that does not count as a difference. Raises InputError for a
    folder without graphs, and if the binary has none of its graphs.
    """
    exported = {graph.name.removesuffix(".aimet"): graph for graph in read_folders(folder)}
    lines: list[str] = []
    if soc is not None and binary.soc_model not in (None, soc_called(soc).model):
        lines.append(f"{binary.path.name} is made for {binary.made_for}, not for {soc}; compile it for that")
    compared = 0
    known = [graph for graph in binary.graphs if graph.called in exported]
    if not known:
        raise InputError(
            f"{binary.path.name} has the graphs {at_most([graph.called for graph in binary.graphs])}, {folder} has "
            f"{at_most(exported)}; give the export that it was compiled from"
        )
    lines += [f"{graph.called} is not a graph of the export" for graph in binary.graphs if graph.called not in exported]
    for graph in known:
        one = exported[graph.called]
        borders = _borders(one)
        for kind, tensors, values in (
            ("input", graph.inputs, one.graph.inputs),
            ("output", graph.outputs, one.graph.outputs),
        ):
            compared += len(values)
            lines += [f"{graph.called}: {line}" for line in _compared(kind, tensors, values, borders)]
    return Differences(tuple(lines), compared)


def _compared(kind: str, tensors: Sequence[Tensor], values: Sequence[ValueInfo], borders: dict) -> Iterator[str]:
    there = {sanitised(tensor.name): tensor for tensor in tensors}
    wanted = {sanitised(value.name): value for value in values}
    if extra := [there[name].name for name in there if name not in wanted]:
        yield f"the binary has the {kind}s {at_most(extra)}, which the export lacks"
    for name, value in wanted.items():
        tensor = there.get(name)
        if tensor is None:
            yield f"the {kind} {value.name} is not in the binary"
            continue
        if value.shape != tensor.shape:
            yield f"{value.name} has the shape {tensor.shape}, exported as {value.shape}"
        if value.name not in borders:
            continue
        scale, zero_point, bits = borders[value.name]
        if tensor.scale is None:
            yield f"{value.name} is {tensor.dtype} without a grid, exported with scale {scale:.6g}"
        elif not math.isclose(tensor.scale, scale, rel_tol=1e-6) or tensor.zero_point != zero_point:
            yield (
                f"{value.name} has the grid scale {tensor.scale:.6g}, zero point {tensor.zero_point}; exported with "
                f"scale {scale:.6g}, zero point {zero_point}"
            )
        if tensor.scale is not None and tensor.bits != bits:
            yield f"{value.name} has {tensor.bits} bits, exported with {bits}"


def _borders(graph: GraphFolder) -> dict[str, tuple[float, int, int]]:
    """Name -> scale, zero point and bits of the inputs and outputs that are on grids, by encodings or by the graph."""
    found = {}
    for value in graph.ends:
        grid = graph.standing.get(value.name)
        if grid is not None and not grid.floating and grid.scale is not None:
            found[value.name] = (grid.scale, -int(grid.offset or 0), 8 if grid.bits <= 8 else 16)
    if not found:
        borders = read_borders(graph.of_kind(".onnx")[0])
        found = {name: (grid.scale, grid.zero_point, grid.bits) for name, grid in borders.items()}
    return found
