"""Symbols that leave a graph behind: to compute with a `Tensor` is to write a node.

A `Tensor` is one value of the graph. A `Stack` is a value in pieces, one for each attention head, where a device wants
its heads apart. The graph does not hold its weights: see `data.py`.

>>> graph = Graph()
>>> x = graph.input("x", (1, 3, 8))
>>> y = graph.tap("half", (x * 0.5).reshape(3, 8))
>>> [node.op_type + " -> " + node.output[0] for node in graph.build("g", [x], [y]).proto.graph.node]
['Mul -> Mul_0', 'Reshape -> half']
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

from export.graphs.data import Built, Parameter, assign_offsets
from export.graphs.profiles import heads_together


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
    """A value of a graph: its shape, the node that computes it, if one does, and the name of its tap or input, if any.

    The output of a linear has `features(start, stop, suffix)`: it makes a linear of its own for some of the features.
    That linear's output is then one of the `parts`.
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
        """The same values in another shape. If the form keeps heads apart, a linear's heads become a `Stack`."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        many = self.graph.heads_together
        per_head = many and len(shape) == 4 and shape[:2] == self.shape[:2] and shape[2] > many
        if per_head and self.features:
            size, features, count = shape[3], self.features, shape[2] // many
            pieces = (features(i * many * size, (i + 1) * many * size, str(i)) for i in range(count))
            return Stack(tuple(piece.reshape(*shape[:2], many, size) for piece in pieces), axis=2)
        source = self.behind("Reshape")
        if source.shape == shape:
            return source
        return self.graph.add("Reshape", (source, self.graph.constant(np.array(shape, np.int64))), shape)

    def transpose(self, *axes: int) -> Tensor:
        """The axes in this order."""
        source = self.behind("Transpose")
        if source is not self and self.node:
            axes = tuple(self.node.attributes["perm"][axis] for axis in axes)
        order = [axis for axis in axes if source.shape[axis] > 1]
        shape = tuple(source.shape[axis] for axis in axes)
        if order == sorted(order) and shape == source.shape:  # nothing moves
            return source
        return self.graph.add("Transpose", (source,), shape, perm=axes)

    def cut(self, axis: int, start: int, stop: int | None = None) -> Tensor:
        """A slice of an axis from `start` to `stop`, or of one element; the axis stays."""
        stop = start + 1 if stop is None else stop
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        numbers = [self.graph.constant(np.array([n], np.int32)) for n in (start, stop, axis)]
        return self.graph.add("Slice", (self, *numbers), shape)

    def heads(self, axis: int, piece: int, many: int) -> Tensor:
        """The heads of one piece, `many` of those along an axis. One head is a Slice; a group is an output of a Split.

        An NPU's compiler refuses a Slice of a cache of 16 MB, and a Split of it along the first axis.
        """
        if many == 1:
            return self.cut(axis, piece)
        count, shape = self.shape[axis] // many, list(self.shape)
        if count == 1:
            return self
        shape[axis] = many
        if axis == 0 and shape[1] == 1:  # (K, 1, …) is (1, K, …)
            inner = self.reshape(1, self.shape[0], *shape[2:])
            return inner.heads(1, piece, many).reshape(*shape)
        sizes = self.graph.constant(np.array([many] * count, np.int64))
        return self.graph.add("Split", (self, sizes), *[shape] * count, axis=axis)[piece]

    def behind(self, op: str) -> Tensor:
        """The input of the `op` that computed this tensor, if the tensor has no name; otherwise the tensor itself."""
        return self.node.inputs[0] if self.node and self.node.op == op and not self.name else self


class Graph:
    """Collects nodes, constants and parameters; `build` makes an ONNX model of those that the outputs need.

    `forms`: how operations are lowered, in words of `export.graphs.profiles.FORMS`.
    """

    def __init__(self, forms: Iterable[str] = ()) -> None:
        self.forms = frozenset(forms)
        self.heads_together = heads_together(self.forms)
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
        """A small value that is part of the graph itself. Equal values share one tensor."""
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
        """Adds a node; returns its output, or a list of outputs for several shapes. Equal nodes are added only once."""
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
        nodes, needed = self._needed(outputs)
        protos = []
        for node in nodes:
            takes, gives = ([t.name for t in tensors] for tensors in (node.inputs, node.outputs))
            protos.append(helper.make_node(node.op, takes, gives, gives[0], domain=node.domain, **node.attributes))
        initializers = [numpy_helper.from_array(a, t.name) for t, a in self.arrays.items() if t in needed]
        parameters = [TensorProto(name=t.name, data_type=t.dtype, dims=t.shape)
                      for t in self.parameters.values() if t in needed]  # fmt: skip
        layout = assign_offsets(parameters)
        ends = set(outputs)
        inner = [_info(t) for node in nodes for t in node.outputs if t not in ends]
        graph = helper.make_graph(protos, name, list(map(_info, inputs)), list(map(_info, outputs)),
                                  initializers + parameters, value_info=inner)  # fmt: skip
        domains = sorted({node.domain for node in nodes} - {""})
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="refimpl")
        values = {tensor.name for tensor in needed}
        shown = {name: tap for name, tap in self.shown.items() if name in values}
        sources = {name: parameter for name, parameter in self.sources.items() if name in layout}
        return Built(proto, layout, {name: self.tiles[name] for name in layout}, shown, sources)

    def _needed(self, outputs: Sequence[Tensor]) -> tuple[list[Node], set[Tensor]]:
        """The nodes that outputs need, in computing order, and all tensors of these nodes. Each tensor gets a name."""
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
        return nodes, needed


def _info(tensor: Tensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)


@dataclass(frozen=True)
class Stack:
    """A tensor in pieces along `axis`, each of one head or several: batched attention as a graph of single heads.

    Qualcomm's converter wants attention head by head: one projection and two products for each. The decoder writes it
    once for all heads, on (1, H, T, D). In a graph of the form "heads" such a tensor is a `Stack` of H tensors
    (1, 1, T, D) that no node joins, and each operation is done to every piece. All pieces share an operand that is the
    same for all heads (cos, the mask); an operand with a slice for each head (the past keys) is cut.

    The decoder computes the H / K query heads that share a key head as rows of one product. Here they stay single
    heads, each with its key head: `group` of them count as the rows of one head.

    In the form "heads=16" a piece has 16 heads, (1, 16, T, D): fewer nodes, and products of a size that an NPU's
    memory holds. There, each head has a key head of its own.
    """

    pieces: tuple[Tensor, ...]
    axis: int
    group: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.axis] *= len(self.pieces)
        shape[self.axis] //= self.group
        shape[self.axis + 1] *= self.group
        return tuple(shape)

    @property
    def graph(self) -> Any:
        return self.pieces[0].graph

    def __add__(self, other: Any) -> Stack:
        return apply(lambda a, b: a + b, self, other)

    def __sub__(self, other: Any) -> Stack:
        return apply(lambda a, b: a - b, self, other)

    def __mul__(self, other: Any) -> Stack:
        return apply(lambda a, b: a * b, self, other)

    def transpose(self, *axes: int) -> Stack:
        pieces = tuple(piece.transpose(*axes) for piece in self.pieces)
        return Stack(pieces, axes.index(self.axis), self.group)

    def reshape(self, *shape: int) -> Any:
        """Heads in groups, (B, H, T, D) -> (B, K, H/K*T, D), or single again; or (B, T, H, D) -> (B, T, H*D).

        Raises ValueError for another shape: the decoder asks for no other.
        """
        many = self.pieces[0].shape[self.axis]
        heads = len(self.pieces) * many
        if len(shape) == 4 and heads % shape[self.axis] == 0 and self.axis == 1:
            return Stack(self.pieces, 1, heads // shape[1])
        if len(shape) == 3 and self.axis == 2:
            return self.graph.concat(self.pieces, 3 if many == 1 else 2).reshape(*shape)
        raise ValueError(f"cannot reshape heads {self.shape} to {shape}")


def joined(x: Any) -> Tensor:
    """One tensor: the joined pieces of a `Stack`, the joined parts of a linear, or the tensor itself."""
    if isinstance(x, Stack):
        return x.graph.concat(x.pieces, x.axis)
    return x.graph.concat([joined(part) for part in x.parts], len(x.shape) - 1) if x.parts else x


def apply(function: Callable[..., Tensor], *operands: Any) -> Stack:
    """`function` of the pieces of each head. The first `Stack` says which heads there are."""
    first = next(operand for operand in operands if isinstance(operand, Stack))
    heads = range(len(first.pieces))
    pieces = tuple(function(*(piece(operand, first, head) for operand in operands)) for head in heads)
    return Stack(pieces, first.axis, first.group)


def piece(operand: Any, stack: Stack, head: int) -> Any:
    """The operand for one piece of `stack`: its own piece, its slice, or all of an operand that the heads share."""
    if isinstance(operand, Stack):
        return operand.pieces[head * len(operand.pieces) // len(stack.pieces)]
    rank, many = len(stack.pieces[0].shape), stack.pieces[0].shape[stack.axis]
    shape: Sequence[int] = getattr(operand, "shape", ())
    axis = stack.axis - rank + len(shape)
    return operand if axis < 0 or shape[axis] == 1 else operand.heads(axis, head, many)
