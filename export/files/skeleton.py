"""A graph's folder without its weights: the structure of the ONNX file, and the grids of the encodings file.

Neither file is trusted. ONNX's own parser reads a whole file, weights included, and two hostile bytes of it can take a
hundred bytes of memory; the same holds for `json`. So the ONNX file is mapped and read field by field; a page of code
reads protobuf's wire format. Weights are skipped. What is kept is counted, and a file with more than any real graph
has is refused, so memory and time are bounded. In an encodings file, the thousands of steps of a weight's rows are cut
out of the text before JSON is parsed.

**Source**: `onnx.proto3` for the numbers of fields; `export/files/encodings.py` for encodings.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.files.encodings import VERSIONS, named_entries
from export.files.wire import FLOAT32, INTEGER, DamagedError, Wire, mapped
from refimpl.errors import InputError

RAW = {1: "<f", 2: "<B", 3: "<b", 4: "<H", 5: "<h", 6: "<i", 7: "<q", 10: "<e"}  # elements as raw bytes
SMALL = 1 << 20  # bytes of a tensor's elements that are looked at
NESTED = 8  # graphs within graphs

# How many bits an element has, by ONNX's number of its type.
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
        17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}  # fmt: skip


@dataclass(slots=True)
class TensorInfo:
    """An initializer, or the value of a Constant, without its elements. `external` tells where those are.

    `value`: the element of a tensor of one element. `zeros`: whether all are 0. Both are None if they lie elsewhere.
    """

    name: str = ""
    dtype: int = 0
    dims: tuple[int, ...] = ()
    external: dict[str, str] | None = None
    value: float | None = None
    zeros: bool | None = None

    @property
    def nbytes(self) -> int:
        """The size of its elements, 4-bit ones packed."""
        return -(-math.prod(self.dims) * BITS.get(self.dtype, 8) // 8)


@dataclass(slots=True)
class ValueInfo:
    """A name with its type. `dtype` is 0 if it is not a tensor or has no type; `shape` is None if it is not stated."""

    name: str = ""
    dtype: int = 0
    shape: tuple[int | str | None, ...] | None = None


@dataclass(slots=True)
class NodeInfo:
    """One operator. `ints` are its attributes that are one integer; tensors and graphs are those of any attribute."""

    op: str = ""
    domain: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    ints: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    graphs: list[GraphInfo] = field(default_factory=list)


@dataclass(slots=True)
class GraphInfo:
    """A graph: nodes in their order, and everything that it gives a name."""

    name: str = ""
    nodes: list[NodeInfo] = field(default_factory=list)
    initializers: list[TensorInfo] = field(default_factory=list)
    inputs: list[ValueInfo] = field(default_factory=list)
    outputs: list[ValueInfo] = field(default_factory=list)
    values: list[ValueInfo] = field(default_factory=list)

    def every_node(self) -> Iterator[NodeInfo]:
        """The nodes, and those of the graphs within them."""
        for node in self.nodes:
            yield node
            for inner in node.graphs:
                yield from inner.every_node()

    def every_tensor(self) -> Iterator[TensorInfo]:
        """Initializers, and the values of Constants, of this graph and of those within it."""
        yield from self.initializers
        for node in self.nodes:
            yield from node.tensors
            for inner in node.graphs:
                yield from inner.every_tensor()


@dataclass(slots=True)
class ModelInfo:
    """An ONNX file. `functions` are how many operators it defines itself."""

    graph: GraphInfo
    ir_version: int = 0
    opsets: list[tuple[str, int]] = field(default_factory=list)
    functions: int = 0


def read_onnx(path: Path) -> ModelInfo:
    """The structure of an ONNX file. Raises InputError, in one line, for a file that is damaged or too large."""
    try:
        with mapped(path) as data:
            return _Reader(data).model()
    except DamagedError as error:
        raise InputError(f"{path.name} is not an ONNX model: {error}; export it again") from None


class _Reader(Wire):
    """Reads ONNX's messages. The number of a field belongs to the message that is being read."""

    def model(self) -> ModelInfo:
        graph, found = None, ModelInfo(GraphInfo())
        for number, value, stop in self.fields(0, len(self.data)):
            if number == 1:
                found.ir_version = self.integer(value, stop)
            elif number == 7:
                if graph is not None:
                    raise DamagedError("it holds two graphs")
                graph = found.graph = self.graph(*self.message(value, stop), depth=0)
            elif number == 8:
                found.opsets.append(self.opset(*self.message(value, stop)))
            elif number == 25:
                found.functions += 1
        if graph is None:
            raise DamagedError("it holds no graph")
        return found

    def opset(self, start: int, stop: int) -> tuple[str, int]:
        domain, version = "", 0
        for number, value, end in self.fields(start, stop):
            if number == 1:
                domain = self.text(value, end)
            elif number == 2:
                version = self.integer(value, end)
        return domain, version

    def graph(self, start: int, stop: int, depth: int) -> GraphInfo:
        if depth == NESTED:
            raise DamagedError(f"graphs lie {NESTED} deep within graphs")
        found = GraphInfo()
        for number, value, end in self.fields(start, stop):
            if number == 1:
                found.nodes.append(self.node(*self.message(value, end), depth))
            elif number == 2:
                found.name = self.text(value, end)
            elif number == 5:
                found.initializers.append(self.tensor(*self.message(value, end)))
            elif number in (11, 12, 13):
                part = (found.inputs, found.outputs, found.values)[number - 11]
                part.append(self.value(*self.message(value, end)))
            elif number == 15:  # a sparse initializer: its values, which have the name
                for inner, at, last in self.fields(*self.message(value, end)):
                    if inner == 1:
                        found.initializers.append(self.tensor(*self.message(at, last)))
        return found

    def node(self, start: int, stop: int, depth: int) -> NodeInfo:
        self.fields_left -= 8  # a node costs as much memory as so many names
        found = NodeInfo()
        for number, value, end in self.fields(start, stop):
            if number == 1:
                found.inputs.append(self.text(value, end))
            elif number == 2:
                found.outputs.append(self.text(value, end))
            elif number == 3:
                found.name = self.text(value, end)
            elif number == 4:
                found.op = self.text(value, end)
            elif number == 5:
                self.attribute(*self.message(value, end), found, depth)
            elif number == 7:
                found.domain = self.text(value, end)
        return found

    def attribute(self, start: int, stop: int, node: NodeInfo, depth: int) -> None:
        name, integer = "", None
        for number, value, end in self.fields(start, stop):
            if number == 1:
                name = self.text(value, end)
            elif number == 3:
                integer = self.integer(value, end)
            elif number in (5, 10):
                node.tensors.append(self.tensor(*self.message(value, end)))
            elif number in (6, 11):
                node.graphs.append(self.graph(*self.message(value, end), depth + 1))
        if integer is not None:
            node.ints[name] = integer

    def tensor(self, start: int, stop: int) -> TensorInfo:
        found, dims, external = TensorInfo(), [], False
        elements: list[tuple[int, int, int]] = []
        places: dict[str, str] = {}
        for number, value, end in self.fields(start, stop):
            if number == 1:
                dims += self.integers(value, end)
            elif number == 2:
                found.dtype = self.integer(value, end)
            elif number == 8:
                found.name = self.text(value, end)
            elif number == 13:
                key, said = self.pair(*self.message(value, end))
                if key in places:
                    raise DamagedError(f"a tensor says its {key!a:.40} twice")
                places[key] = said
            elif number == 14:
                external = self.integer(value, end) == 1
            elif number in (4, 5, 7, 9, 11):
                elements.append((number, value, end))
        if any(size < 0 for size in dims):
            raise DamagedError(f"the tensor {found.name!a:.80} has a negative size")
        found.dims = tuple(dims)
        found.external = places if external else None
        if not external and len(elements) == 1:
            self.elements(*elements[0], found)
        return found

    def elements(self, number: int, value: int, stop: int, found: TensorInfo) -> None:
        """Keeps two facts about a tensor's elements: whether all are 0, and the value if there is only one."""
        single = math.prod(found.dims) == 1
        if stop == INTEGER:
            found.zeros, found.value = value == 0, float(value) if single else None
        elif stop == FLOAT32:
            found.value = self.number(value, stop) if single else None
        elif stop >= 0 and stop - value <= SMALL:
            data = bytes(self.data[value:stop])
            found.zeros = not data.strip(b"\0")
            kind = RAW.get(found.dtype) if number in (4, 9) else None
            if single and kind and len(data) == struct.calcsize(kind):
                found.value = float(struct.unpack(kind, data)[0])
            elif single and number in (5, 7) and data:
                found.value = float(self.integer(self.varint(value, stop)[0], INTEGER))

    def pair(self, start: int, stop: int) -> tuple[str, str]:
        both = ["", ""]
        for number, value, end in self.fields(start, stop):
            if number in (1, 2):
                both[number - 1] = self.text(value, end)
        return both[0], both[1]

    def value(self, start: int, stop: int) -> ValueInfo:
        found = ValueInfo()
        for number, value, end in self.fields(start, stop):
            if number == 1:
                found.name = self.text(value, end)
            elif number == 2:
                for kind, at, last in self.fields(*self.message(value, end)):
                    if kind == 1:
                        self.tensor_type(*self.message(at, last), found)
        return found

    def tensor_type(self, start: int, stop: int, found: ValueInfo) -> None:
        for number, value, end in self.fields(start, stop):
            if number == 1:
                found.dtype = self.integer(value, end)
            elif number == 2:
                at, last = self.message(value, end)
                found.shape = tuple(self.axis(*self.message(v, e)) for n, v, e in self.fields(at, last) if n == 1)

    def axis(self, start: int, stop: int) -> int | str | None:
        size: int | str | None = None
        for number, value, end in self.fields(start, stop):
            if number == 1:
                size = self.integer(value, end)
            elif number == 2:
                size = self.text(value, end)
        return size


@dataclass(frozen=True)
class GridInfo:
    """An encoding without the steps of rows. `scale` and `offset` are None unless the tensor has a single step.

    `offset` belongs to unsigned codes, real = (code + offset) * scale: it is -128 for uint8 with a zero point of 128,
    and also for int8 with a zero point of 0.
    """

    bits: int
    scale: float | None = None
    offset: int | None = None
    floating: bool = False

    def __str__(self) -> str:
        if self.floating:
            return f"float{self.bits}"
        step = "" if self.scale is None else f", scale {self.scale:.6g}, offset {self.offset}"
        return f"{self.bits} bits{step}"


# The steps of rows or blocks, also as 0.6.1 writes them, an object for each row. The pattern repeats some hundred times
# at most, because a match keeps every repetition in memory.
_OBJECT = rb'\{\s*"bitwidth"[^\[\]{}]*\}'
_LONG = re.compile(rb"\[[-+.0-9eE,\s]{200,}\]|(" + _OBJECT + rb")(?:\s*,\s*" + _OBJECT + rb"){20,400}")
STRUCTURE = 16 << 20  # bytes of an encodings file without those steps; a part with its heads apart has 3 MB


def read_grids(path: Path) -> dict[str, GridInfo]:
    """Name -> grid of everything in an encodings file of 0.6.1, 1.0.0 or 2.0.0.

    Raises InputError, in one line, for another kind of file, one that is too large, and a tensor with two encodings.
    """
    try:
        with mapped(path) as data:
            content = json.loads(_without_rows(data))
        if not isinstance(content, dict) or content.get("version") not in VERSIONS:
            said = content.get("version") if isinstance(content, dict) else content
            raise InputError(f"its version is {said!a:.40}, expected one of {', '.join(VERSIONS)}")
        version, found = content["version"], dict[str, GridInfo]()
        for name, entry in named_entries(content, version):
            if name in found:
                raise InputError(f"{name!a:.80} has two encodings")
            try:
                found[name] = _GRIDS[version](entry)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
                raise InputError(f"the encoding of {name!a:.80} does not follow version {version}") from None
        return found
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not an encodings file: {error!s:.200}; write it again") from None


def _without_rows(data: Any) -> bytes:
    """The JSON text, with a short list in the place of every long one of numbers or rows."""
    pieces, at, size = [], 0, 0
    for match in _LONG.finditer(data):
        size += match.start() - at
        if size > STRUCTURE:
            break
        pieces += [data[at : match.start()], match[1] + b',"many"' if match[1] else b'["many"]']
        at = match.end()
    if size + len(data) - at > STRUCTURE:
        raise InputError(f"it has more than {STRUCTURE >> 20} MiB beside the steps of weights")
    return b"".join([*pieces, data[at:]])


def _grid_0(rows: list[Any]) -> GridInfo:
    first = rows[0]
    if first["dtype"] == "float":
        return GridInfo(_bits(first["bitwidth"]), floating=True)
    one = rows if len(rows) == 1 else [{}]
    return _checked(first["bitwidth"], one[0].get("scale"), one[0].get("offset"), len(rows) == 1)


def _grid_1(entry: dict[str, Any]) -> GridInfo:
    if entry["dtype"] == "FLOAT":
        return GridInfo(_bits(entry["bw"]), floating=True)
    scale, offset = entry["scale"], entry["offset"]
    single = entry.get("enc_type", "PER_TENSOR") == "PER_TENSOR"
    return _checked(entry.get("compressed_bw", entry["bw"]), scale[0], offset[0], single)


def _grid_2(entry: dict[str, Any]) -> GridInfo:
    kind = str(entry["output_dtype"])
    if kind.startswith(("float", "bfloat")):
        return GridInfo(_bits(int(kind.lstrip("bfloat"))), floating=True)
    bits, signed = _bits(int(kind.removeprefix("u").removeprefix("int"))), kind.startswith("int")
    scale, zero_point = (_single(entry.get(key)) for key in ("y_scale", "y_zero_point"))
    if not isinstance(scale, int | float):
        return GridInfo(bits)
    return _checked(bits, scale, -(zero_point or 0) - (2 ** (bits - 1) if signed else 0), True)


def _single(value: Any) -> Any:
    """The item of a list of one; any other value is returned unchanged."""
    return value[0] if isinstance(value, list) and len(value) == 1 and value != ["many"] else value


_GRIDS: dict[str, Callable[[Any], GridInfo]] = dict(zip(VERSIONS, (_grid_0, _grid_1, _grid_2), strict=True))


def _checked(bits: Any, scale: Any, offset: Any, single: bool) -> GridInfo:
    """A grid, if its numbers make sense. Raises ValueError or TypeError otherwise."""
    if not single:
        return GridInfo(_bits(bits))
    if isinstance(scale, bool) or not 0 < float(scale) < math.inf or int(offset) != offset:
        raise ValueError("no grid")
    return GridInfo(_bits(bits), float(scale), int(offset))


def _bits(value: Any) -> int:
    if type(value) is not int or not 2 <= value <= 32:
        raise ValueError("no bits")
    return value
