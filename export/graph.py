"""The ONNX backend: the decoder's vocabulary over symbols, and the graph that they leave behind.

`OnnxOps` has the functions of `kernels.ops.NumPyOps`. Its tensors know their shape and nothing else: to compute with
them is to write a node. So the graph that a phone runs is `refimpl/decoder.py`, and there is no second forward.

Weights stay where they are: a `Parameter` enters the graph as a place in `model.data`, which `write_data` fills tile
by tile. The protobuf holds no weight, so neither its limit of 2 GiB nor a computer's memory limits the model.

>>> graph = Graph()
>>> x = graph.input("x", (1, 3, 8))
>>> y = graph.tap("halves", OnnxOps(graph).sigmoid(x * 0.5).reshape(3, 8))
>>> [node.op_type + " -> " + node.output[0] for node in graph.build("g", [x], [y]).proto.graph.node]
['Mul -> Mul_0', 'Sigmoid -> Sigmoid_0', 'Reshape -> halves']
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from kernels import int4
from kernels.ops import TILE_BYTES, Readable
from refimpl.errors import InputError

ALIGNMENT = 4096  # of a weight in model.data: a page, so that a runtime can map it
INT4_OPSET = 21  # the first with INT4 and with DequantizeLinear in blocks


@dataclass(frozen=True)
class Parameter:
    """What `OnnxOps` reads: a parameter's name, which becomes the initializer's, and its values."""

    name: str
    weight: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape


@dataclass(eq=False)
class Node:
    """One ONNX operator, with the tensors that it takes and gives."""

    op: str
    inputs: Sequence[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Tensor:
    """A value of a graph: its shape, its node if one computes it, and its name if it was tapped or is an input."""

    graph: Graph
    shape: tuple[int, ...]
    name: str = ""
    dtype: int = TensorProto.FLOAT
    node: Node | None = None

    def __add__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Add", self, other)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Sub", self, other)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return self.graph.elementwise("Mul", self, other)

    def reshape(self, *shape: int) -> Tensor:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        return self.graph.add("Reshape", (self, self.graph.constant(np.array(shape, np.int64))), shape)

    def transpose(self, *axes: int) -> Tensor:
        """The axes in this order. Where the tensor is itself a transpose, and nobody named it, one does for both."""
        source = self
        if self.node and self.node.op == "Transpose" and not self.name:
            source, axes = self.node.inputs[0], tuple(self.node.attributes["perm"][axis] for axis in axes)
        shape = tuple(source.shape[axis] for axis in axes)
        return self.graph.add("Transpose", (source,), shape, perm=axes)


@dataclass(frozen=True)
class Built:
    """A finished graph: the ONNX model without its weights, and where in `model.data` each weight lies."""

    proto: ModelProto
    layout: dict[str, tuple[int, int]]  # initializer -> (offset, length) in bytes
    tiles: dict[str, Callable[[], Iterator[np.ndarray]]]  # initializer -> its values, a few rows at a time


class Graph:
    """Collects nodes, constants and parameters; `build` makes an ONNX model of those that an output needs."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
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

    def parameter(self, name: str, shape: tuple[int, ...], dtype: int, tiles: Callable[[], Iterator[np.ndarray]]):
        """A value that is kept in `model.data`, which `tiles()` gives from first row to last."""
        if name not in self.parameters:
            self.parameters[name], self.tiles[name] = Tensor(self, shape, name, dtype), tiles
        return self.parameters[name]

    def add(self, op: str, inputs: Sequence[Tensor], *shapes: Sequence[int], **attributes: Any) -> Any:
        """A node; returns its output, or the list of them if there are several shapes."""
        node = Node(op, inputs, attributes=attributes)
        node.outputs += [Tensor(self, tuple(shape), node=node) for shape in shapes]
        self.nodes.append(node)
        return node.outputs if len(shapes) > 1 else node.outputs[0]

    def elementwise(self, op: str, a: Tensor, b: Tensor | float) -> Tensor:
        """`a op b` with NumPy's broadcasting; a Python number becomes a float32 scalar."""
        second = b if isinstance(b, Tensor) else self.constant(np.array(b, np.float32))
        return self.add(op, (a, second), np.broadcast_shapes(a.shape, second.shape))

    def tap(self, name: str, x: Tensor) -> Tensor:
        """Names the value, so that the graph speaks of tensors as every other trace of the model does."""
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
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outputs):
                needed.update(node.inputs)
                nodes.insert(0, node)
        number: dict[str, Iterator[int]] = defaultdict(count)
        for node in nodes:
            for tensor in node.outputs:
                tensor.name = tensor.name or f"{node.op}_{next(number[node.op])}"

        def info(tensor: Tensor) -> ValueInfoProto:
            return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)

        protos = []
        for node in nodes:
            takes, gives = ([t.name for t in tensors] for tensors in (node.inputs, node.outputs))
            protos.append(helper.make_node(node.op, takes, gives, name=gives[0], **node.attributes))
        initializers = [numpy_helper.from_array(a, t.name) for t, a in self.arrays.items() if t in needed]
        parameters = [t for t in self.parameters.values() if t in needed]
        layout = place(parameters)
        initializers += [external(t, *layout[t.name]) for t in parameters]
        inner = [info(t) for node in nodes for t in node.outputs if t not in set(outputs)]
        graph = helper.make_graph(protos, name, [info(t) for t in inputs], [info(t) for t in outputs], initializers,
                                  value_info=inner)  # fmt: skip
        opsets = [helper.make_opsetid("", opset)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="refimpl")
        return Built(proto, layout, {t.name: self.tiles[t.name] for t in parameters})


def place(parameters: Iterable[Tensor]) -> dict[str, tuple[int, int]]:
    """Where each parameter lies in `model.data`: name -> (offset, length) in bytes, one after the other."""
    layout, end = {}, 0
    for tensor in parameters:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        bits = 4 if tensor.dtype == TensorProto.INT4 else 32
        layout[tensor.name] = (offset, -(-math.prod(tensor.shape) * bits // 8))
        end = sum(layout[tensor.name])
    return layout


def external(tensor: Tensor, offset: int, length: int) -> TensorProto:
    """An initializer whose bytes are in `model.data`."""
    proto = TensorProto(name=tensor.name, data_type=tensor.dtype, dims=tensor.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.data"), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def write_data(file: BinaryIO, built: Built) -> str:
    """Fills `model.data` tile by tile, and returns its sha256. Equal weights give equal bytes."""
    digest, end = hashlib.sha256(), 0

    def write(data) -> int:
        digest.update(data)
        return file.write(data)

    for name, (offset, length) in built.layout.items():
        end += write(bytes(offset - end))
        written = sum(write(np.ascontiguousarray(tile).data.cast("B")) for tile in built.tiles[name]())
        if written != length:
            raise ValueError(f"{name} has {written} bytes, the graph says {length}")
        end += written
    return digest.hexdigest()


def row_tiles(weight: Readable) -> Iterator[np.ndarray]:
    """The parameter in float32, TILE_BYTES of rows at a time."""
    step = max(1, TILE_BYTES // 4 // math.prod(weight.shape[1:]))
    for start in range(0, weight.shape[0], step):
        yield weight.read(np.dtype(np.float32), slice(start, start + step)).astype("<f4", copy=False)


class OnnxOps:
    """The operations of `kernels.ops.NumPyOps`, each as the ONNX nodes that compute it in float32.

    Raises InputError for 4-bit weights in an opset that cannot say them.
    """

    def __init__(self, graph: Graph, opset: int = 21):
        self.graph, self.opset = graph, opset

    def upcast(self, x: Tensor) -> Tensor:
        """The same: everything is float32."""
        return x

    def type_as(self, x: Tensor, other: Tensor) -> Tensor:
        """The same: everything is float32."""
        return x

    def parameter(self, weight: Parameter) -> Tensor:
        """An initializer in float32; or codes, scales and zero points, where DequantizeLinear knows the format.

        That is INT4 in blocks along the rows. Any other format goes out as the values that it stands for.
        """
        graph, blocks = self.graph, getattr(weight.weight, "blocks", None)
        if blocks is None or (blocks.format, blocks.axis) != ("int4", 1) or blocks.shape[1] % 2:
            return graph.parameter(weight.name, weight.shape, TensorProto.FLOAT, lambda: row_tiles(weight.weight))
        if self.opset < INT4_OPSET:
            raise InputError(f"{weight.name} is in 4-bit blocks, which opset {self.opset} lacks; use {INT4_OPSET}")
        names = [f"{weight.name}.{part}" for part in ("codes", "scales", "zero_points")]
        inputs = [
            graph.parameter(names[0], blocks.shape, TensorProto.INT4, lambda: iter([blocks.packed])),
            graph.parameter(names[1], blocks.scales.shape, TensorProto.FLOAT, lambda: iter([blocks.scales])),
        ]
        if blocks.zero_points is not None:
            packed = int4.pack(blocks.zero_points.reshape(1, -1))
            inputs.append(graph.parameter(names[2], blocks.scales.shape, TensorProto.INT4, lambda: iter([packed])))
        form = dict(axis=1, block_size=blocks.block_size)
        return graph.tap(weight.name, graph.add("DequantizeLinear", inputs, blocks.shape, **form))

    def take(self, weight: Parameter, ids: Tensor) -> Tensor:
        return self.graph.add("Gather", (self.parameter(weight), ids), (*ids.shape, weight.shape[1]), axis=0)

    def linear(self, x: Tensor, weight: Parameter, bias: Parameter | None = None) -> Tensor:
        """Gemm, which takes a weight as the checkpoint has it, (O, I), and nobody has to transpose it."""
        out_features, in_features = weight.shape
        rows = math.prod(x.shape[:-1])
        inputs = [x.reshape(rows, in_features), self.parameter(weight)] + ([self.parameter(bias)] if bias else [])
        out = self.graph.add("Gemm", inputs, (rows, out_features), transB=1)
        return out.reshape(*x.shape[:-1], out_features)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.graph.add("MatMul", (a, b), (*batch, a.shape[-2], b.shape[-1]))

    weighted_sum = matmul

    def mean(self, x: Tensor) -> Tensor:
        """Over the last axis, which stays as 1. (Since opset 18 the axes are an input.)"""
        axes, shape = np.array([-1], np.int64), (*x.shape[:-1], 1)
        if self.opset < 18:
            return self.graph.add("ReduceMean", (x,), shape, axes=axes.tolist())
        return self.graph.add("ReduceMean", (x, self.graph.constant(axes)), shape)

    def rsqrt(self, x: Tensor) -> Tensor:
        return self.graph.add("Reciprocal", (self.graph.add("Sqrt", (x,), x.shape),), x.shape)

    def sigmoid(self, x: Tensor) -> Tensor:
        return self.graph.add("Sigmoid", (x,), x.shape)

    def softmax(self, x: Tensor) -> Tensor:
        return self.graph.add("Softmax", (x,), x.shape, axis=-1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        shapes = [(*x.shape[:-1], size) for size in sizes]
        return self.graph.add("Split", (x, self.graph.constant(np.array(sizes, np.int64))), *shapes, axis=-1)

    def concat(self, pieces: Sequence[Tensor], axis: int = -1) -> Tensor:
        shape = list(pieces[0].shape)
        shape[axis] = sum(piece.shape[axis] for piece in pieces)
        return self.graph.add("Concat", pieces, shape, axis=axis)
