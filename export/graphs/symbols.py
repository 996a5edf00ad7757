"""Symbols that leave a graph behind: to compute with a `Tensor` is to write a node.

Weights stay where they are: a `Parameter` enters the graph as a place in `model.data`, which `write_data` fills tile
by tile. The protobuf holds no weight, so neither its limit of 2 GiB nor a computer's memory limits the model.

>>> graph = Graph()
>>> x = graph.input("x", (1, 3, 8))
>>> y = graph.tap("half", (x * 0.5).reshape(3, 8))
>>> [node.op_type + " -> " + node.output[0] for node in graph.build("g", [x], [y]).proto.graph.node]
['Mul -> Mul_0', 'Reshape -> half']
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any, BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from export.graphs.heads import Stack, apply
from refimpl.checkpoint.weights import let_go, read_ahead
from refimpl_kernels.ops import TILE_BYTES, Readable

ALIGNMENT = 4096  # of a weight in model.data: a page, so that a runtime can map it
BITS: dict[int, int] = {  # of an element in model.data; of all others 32
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8,
    TensorProto.INT16: 16, TensorProto.UINT16: 16,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """Some rows of a parameter, or all, as an initializer of a graph: its name there, and that `of` the parameter."""

    name: str
    of: str
    weight: Readable
    rows: range

    @classmethod
    def whole(cls, name: str, weight: Readable) -> Parameter:
        """All of a parameter, under its own name."""
        return cls(name, name, weight, range(weight.shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.weight.shape[1:])

    def part(self, start: int, stop: int, suffix: str) -> Parameter:
        """Some of its rows: `W_pack.weight` and "0.7" make `W_pack.0.7.weight`."""
        module, _, kind = self.name.rpartition(".")
        return Parameter(f"{module}.{suffix}.{kind}", self.of, self.weight, self.rows[start:stop])

    def tiles(self) -> Iterator[np.ndarray]:
        """The values in float32, TILE_BYTES of rows at a time."""
        step = max(1, TILE_BYTES // 4 // math.prod(self.shape[1:]))
        for i in range(0, len(self.rows), step):
            rows, more = self.rows[i : i + step], self.rows[i + step : i + 2 * step]
            stored = getattr(self.weight, "array", np.empty(0))  # read ahead while this tile is written, then let go
            read_ahead(stored[more.start : more.stop])
            yield self.weight.read(np.dtype(np.float32), slice(rows.start, rows.stop)).astype("<f4", copy=False)
            let_go(stored[rows.start : rows.stop])


@dataclass(eq=False)
class Node:
    """One ONNX operator, with the tensors that it takes and gives."""

    op: str
    inputs: Sequence[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""


@dataclass(eq=False)
class Tensor:
    """A value of a graph: its shape, its node if one computes it, and its name if it was tapped or is an input.

    `features(start, stop, suffix)`, of what a linear gives: some of its features, by a linear of their own, which is
    then one of its `parts`.
    """

    graph: Graph
    shape: tuple[int, ...]
    name: str = ""
    dtype: int = TensorProto.FLOAT
    node: Node | None = None
    features: Callable[[int, int, str], Tensor] | None = None
    parts: list[Tensor] = field(default_factory=list)

    def __add__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Add", self, other)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Sub", self, other)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Mul", self, other)

    def reshape(self, *shape: int) -> Any:
        """The same values in another shape; or a `Stack` of the heads of a linear, where they are to be single."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        per_head = len(shape) == 4 and shape[:2] == self.shape[:2] and shape[2] > 1
        if per_head and self.features and "heads" in self.graph.forms:
            size, features = shape[3], self.features
            heads = (features(head * size, (head + 1) * size, str(head)) for head in range(shape[2]))
            return Stack(tuple(head.reshape(*shape[:2], 1, size) for head in heads), axis=2)
        source = self.behind("Reshape")
        if source.shape == shape:
            return source
        return self.graph.add("Reshape", (source, self.graph.constant(np.array(shape, np.int64))), shape)

    def transpose(self, *axes: int) -> Tensor:
        """The axes in this order."""
        source = self.behind("Transpose")
        if source is not self and self.node:
            axes = tuple(self.node.attributes["perm"][axis] for axis in axes)
        if axes == tuple(range(len(axes))):
            return source
        return self.graph.add("Transpose", (source,), tuple(source.shape[axis] for axis in axes), perm=axes)

    def cut(self, axis: int, start: int, stop: int | None = None) -> Tensor:
        """What lies from one place of an axis to another, or at one place; the axis stays."""
        stop = start + 1 if stop is None else stop
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        numbers = [self.graph.constant(np.array([n], np.int32)) for n in (start, stop, axis)]
        return self.graph.add("Slice", (self, *numbers), shape)

    def behind(self, op: str) -> Tensor:
        """The input of the node that computed the tensor, if it is of this kind and nobody named what it gave."""
        return self.node.inputs[0] if self.node and self.node.op == op and not self.name else self


@dataclass(frozen=True)
class Built:
    """A finished graph: the ONNX model without its weights, and where in `model.data` each weight lies."""

    proto: ModelProto
    layout: dict[str, tuple[int, int]]  # initializer -> (offset, length) in bytes
    tiles: dict[str, Callable[[], Iterator[np.ndarray]]]  # initializer -> its values, a few rows at a time
    shown: dict[str, str]  # a head's value -> the tap that it is a piece of
    parameters: dict[str, Parameter]  # initializer in float32 -> whose rows it has


class Graph:
    """Collects nodes, constants and parameters; `build` makes an ONNX model of those that an output needs.

    `forms`: how operations are lowered, in words of `export.graphs.profiles.FORMS`.
    """

    def __init__(self, forms: Iterable[str] = ()) -> None:
        self.forms = frozenset(forms)
        self.nodes: dict[tuple, Node] = {}
        self.shown: dict[str, str] = {}
        self.sources: dict[str, Parameter] = {}
        self.constants: dict[tuple, Tensor] = {}
        self.arrays: dict[Tensor, np.ndarray] = {}
        self.parameters: dict[str, Tensor] = {}
        self.tiles: dict[str, Callable[[], Iterator[np.ndarray]]] = {}

    def input(self, name: str, shape: tuple[int, ...], dtype: int = TensorProto.FLOAT) -> Tensor:
        """A value that comes from outside."""
        return Tensor(self, shape, name, dtype)

    def constant(self, array: np.ndarray) -> Tensor:
        """A small value that is part of the graph itself; equal ones are one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            tensor = Tensor(self, array.shape, f"constant_{len(self.constants)}")
            self.constants[key], self.arrays[tensor] = tensor, array
        return self.constants[key]

    def number(self, tensor: Tensor) -> float:
        """The value of a constant of one element."""
        return float(self.arrays[tensor])

    def parameter(self, name: str, shape: tuple[int, ...], dtype: int, tiles: Callable[[], Iterator[np.ndarray]]):
        """A value that is kept in `model.data`, which `tiles()` gives from first row to last."""
        if name not in self.parameters:
            self.parameters[name], self.tiles[name] = Tensor(self, shape, name, dtype), tiles
        return self.parameters[name]

    def add(self, op: str, inputs: Sequence[Tensor], *shapes: Sequence[int], domain="", **attributes: Any) -> Any:
        """A node; returns its output, or the list of them if there are several shapes. Equal ones are one."""
        words = ((name, tuple(value) if isinstance(value, list) else value) for name, value in attributes.items())
        key = (op, *inputs, *map(tuple, shapes), *words)
        if key not in self.nodes:
            node = self.nodes[key] = Node(op, inputs, attributes=attributes, domain=domain)
            node.outputs += [Tensor(self, tuple(shape), node=node) for shape in shapes]
        outputs = self.nodes[key].outputs
        return outputs if len(shapes) > 1 else outputs[0]

    def elementwise(self, op: str, a: Tensor, b: Tensor | float) -> Tensor:
        """`a op b` with NumPy's broadcasting; a Python number becomes a float32 scalar."""
        if not isinstance(b, Tensor):
            if op == "Mul" and "scale-on-key" in self.forms and a.node and a.node.op == "MatMul" and not a.name:
                query, key = a.node.inputs
                return self.add("MatMul", (query, key * b), a.shape)
            b = self.constant(np.array(b, np.float32))
        wide = b.behind("Reshape")
        if len(b.shape) < len(wide.shape) and a.shape == wide.shape[-1:]:  # a norm's gain, on its side of the reshape
            return self.elementwise(op, a, wide).reshape(*b.shape)
        return self.add(op, (a, b), np.broadcast_shapes(a.shape, b.shape))

    def concat(self, pieces: Sequence[Any], axis: int) -> Any:
        """Tensors side by side, or each head's."""
        if any(isinstance(piece, Stack) for piece in pieces):
            return apply(lambda *heads: self.concat(heads, axis), *pieces)
        shape = list(pieces[0].shape)
        shape[axis] = sum(piece.shape[axis] for piece in pieces)
        return self.add("Concat", tuple(pieces), shape, axis=axis)

    def tap(self, name: str, x: Any) -> Any:
        """Names the value, so that the graph speaks of tensors as every other trace of the model does."""
        if isinstance(x, Stack):
            pieces = tuple(self.tap(f"{name}.{head}", piece) for head, piece in enumerate(x.pieces))
            self.shown.update({piece.name: name for piece in pieces})
            return Stack(pieces, x.axis, x.group)
        if x.name:  # one value under two names
            x = self.add("Identity", (x,), x.shape)
        x.name = name
        return x

    def build(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], opset: int = 21, ir_version: int = 10
    ) -> Built:
        """The ONNX model `name` of everything that `outputs` need, in the order in which it was computed.

        Every value is listed with its shape (ONNX's value_info), which the checker holds against its own inference.
        """
        needed: set[Tensor] = set(outputs)
        nodes: list[Node] = []
        for node in reversed(self.nodes.values()):
            if not needed.isdisjoint(node.outputs):
                needed.update(node.inputs)
                nodes.append(node)
        nodes.reverse()
        number: dict[str, Iterator[int]] = defaultdict(count)
        for node in nodes:
            for tensor in node.outputs:
                tensor.name = tensor.name or f"{node.op}_{next(number[node.op])}"

        def info(tensor: Tensor) -> ValueInfoProto:
            return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)

        protos = []
        for node in nodes:
            takes, gives = ([t.name for t in tensors] for tensors in (node.inputs, node.outputs))
            protos.append(helper.make_node(node.op, takes, gives, gives[0], domain=node.domain, **node.attributes))
        initializers = [numpy_helper.from_array(a, t.name) for t, a in self.arrays.items() if t in needed]
        parameters = [TensorProto(name=t.name, data_type=t.dtype, dims=t.shape)
                      for t in self.parameters.values() if t in needed]  # fmt: skip
        layout = place(parameters)
        initializers += parameters
        last = set(outputs)
        inner = [info(t) for node in nodes for t in node.outputs if t not in last]
        graph = helper.make_graph(protos, name, [info(t) for t in inputs], [info(t) for t in outputs], initializers,
                                  value_info=inner)  # fmt: skip
        opsets = [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in nodes} - {""})]
        opsets.insert(0, helper.make_opsetid("", opset))
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="refimpl")
        values = {tensor.name for tensor in needed}
        shown = {name: tap for name, tap in self.shown.items() if name in values}
        sources = {name: parameter for name, parameter in self.sources.items() if name in layout}
        return Built(proto, layout, {name: self.tiles[name] for name in layout}, shown, sources)


def place(parameters: Iterable[TensorProto]) -> dict[str, tuple[int, int]]:
    """Gives initializers their places in `model.data`, one after the other: name -> (offset, length) in bytes."""
    layout, end = {}, 0
    for proto in parameters:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        length = -(-math.prod(proto.dims) * BITS.get(proto.data_type, 32) // 8)
        layout[proto.name] = (offset, length)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        end = offset + length
    return layout


def write_data(file: BinaryIO, built: Built) -> str:
    """Fills `model.data` tile by tile, and returns its sha256. Equal weights give equal bytes.

    One tile is hashed while it is written and the next one computed.
    """
    digest, end = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as other:
        hashed = other.submit(digest.update, b"")

        def write(data) -> int:
            nonlocal hashed
            hashed.result()
            hashed = other.submit(digest.update, data)
            return file.write(data)

        for name, (offset, length) in built.layout.items():
            end += write(bytes(offset - end))
            written = sum(write(np.ascontiguousarray(tile).data.cast("B")) for tile in built.tiles[name]())
            if written != length:
                raise ValueError(f"{name} has {written} bytes, the graph says {length}")
            end += written
    return digest.hexdigest()
