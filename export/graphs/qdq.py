"""A graph that computes on grids by itself: QuantizeLinear and DequantizeLinear wherever its encodings have a grid.

onnxruntime runs it without a conversion, so it stands in for the device, and is a second opinion on the simulator. ONNX
rounds half a step to even, where AIMET rounds it up: `model.simulate(encodings, rounding="even")` is its twin.

    value       x -> QuantizeLinear -> codes -> DequantizeLinear -> under x's own name
    parameter   codes, in as many bits as they have -> DequantizeLinear, with one step for each tensor, row or block
    table       the weight that a Gather reads: codes are gathered, and only the gathered rows become floats
    8 bits      a linear's output (values) goes through 16 bits: an NPU has no product of 16 by 4 bits that gives 8

An NPU's provider computes all of such a graph. That takes two things that ONNX leaves open. INT4 codes state their zero
point, because the provider reads them as other numbers without one. And rounding a value to 16 bits before it is
rounded to 8 must not change it: 257 fine steps are a coarse one, so a value between two coarse ones never lies half a
fine step from where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graphs.data import Built, Parameter, assign_offsets
from export.graphs.ops import LINEARS
from refimpl.errors import InputError
from refimpl.grids.encodings import Encodings, Grid
from refimpl_kernels.affine import Encoding, integers, quantize
from refimpl_kernels.formats import int4

WIDE = 257  # (2^16 - 1) / (2^8 - 1)
UNSIGNED = {4: TensorProto.UINT4, 8: TensorProto.UINT8, 16: TensorProto.UINT16}
SIGNED = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}


def quantized(built: Built, own: Encodings) -> Built:
    """The graph with its values and parameters on the grids of its `own` encodings (`grids.graph_encodings`).

    Needs opset 21, the first with 16 and 4 bits and with blocks. Raises InputError for bits that ONNX lacks.
    """
    copy = _OnGrids(built, own)
    copy.initializers()
    copy.inputs()
    for node in built.proto.graph.node:
        copy.node(node)
    return copy.finished()


class _OnGrids:
    """A copy of a graph that is filled anew: `initializers`, then `inputs`, then each `node` in computing order."""

    def __init__(self, built: Built, own: Encodings):
        self.built, self.old, self.own = built, built.proto.graph, own
        self.proto = ModelProto()
        self.proto.CopyFrom(built.proto)
        self.graph = self.proto.graph
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.external: list[TensorProto] = []  # initializers in model.data
        self.tiles: dict[str, Callable[[], Iterator[np.ndarray]]] = {}  # and their values
        self.gathered: dict[str, list[str]] = {}  # a table -> its codes, scales and zero point
        self.fed: dict[str, str] = {}  # an input -> its values on the grid
        self.shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
                       for value in (*self.old.input, *self.old.value_info, *self.old.output)}  # fmt: skip

    def initializers(self) -> None:
        """Turns weights into codes. An initializer without a grid is kept unchanged."""
        tables = {node.input[0] for node in self.old.node if node.op_type == "Gather"}
        for tensor in self.old.initializer:
            name = tensor.name
            parameter, grid = self.built.parameters.get(name), self.own.parameters.get(name)
            if parameter is None or not isinstance(grid, Encoding):
                self._keep(tensor)
            elif name in tables:
                self.gathered[name] = self._parameter(tensor, parameter, grid)
            else:
                inputs = self._parameter(tensor, parameter, grid)
                self.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.dims))
                blocks = {"axis": 1, "block_size": grid.block_size}
                axis = blocks if grid.block_size else {"axis": 0} if grid.scale.ndim else {}
                self._add("DequantizeLinear", inputs, name, **axis)

    def inputs(self) -> None:
        """Inputs are put on their grids before anything reads them."""
        self.fed = {v.name: f"{v.name}.on_grid" for v in self.old.input if v.name in self.own.activations}
        for name, result in self.fed.items():
            self._pair(name, name, result, self.own.activations[name])
            self._show(result, name)

    def node(self, old: NodeProto) -> None:
        """Adds a node, and behind it the pairs that put its outputs on their grids."""
        new = NodeProto()
        new.CopyFrom(old)
        new.input[:] = [self.fed.get(name, name) for name in old.input]
        if old.op_type == "Gather" and old.input[0] in self.gathered:
            return self._gather(new)
        on_grid = [name for name in old.output if name in self.own.activations]
        new.output[:] = [f"{name}.raw" if name in on_grid else name for name in old.output]
        new.name = new.output[0]
        self.graph.node.append(new)
        linear = old.op_type in LINEARS and old.input[1] in self.own.parameters
        for name in on_grid:
            grid, source = self.own.activations[name], f"{name}.raw"
            self._show(source, name)
            if linear and isinstance(grid, Encoding) and grid.bits == 8:
                source = f"{name}.wide"
                self._pair(source, f"{name}.raw", source, widened(grid), like=name)
                self._show(source, name)
            self._pair(name, source, name, grid)

    def finished(self) -> Built:
        """The graph, once all nodes are there."""
        for tensor in self.external:
            del tensor.external_data[:]
        layout = assign_offsets(self.external)
        self.graph.initializer.extend(self.external)
        self.graph.value_info.extend(self.old.value_info)
        return Built(self.proto, layout, self.tiles, self.built.shown, {})

    def _keep(self, tensor: TensorProto) -> None:
        if tensor.name in self.built.layout:
            self.external.append(tensor)
            self.tiles[tensor.name] = self.built.tiles[tensor.name]
        else:
            self.graph.initializer.append(tensor)

    def _parameter(self, tensor: TensorProto, parameter: Parameter, grid: Encoding) -> list[str]:
        """Codes, scales and zero point of a parameter: the inputs of its DequantizeLinear."""
        name, signed = tensor.name, bool(np.all(grid.offset == -(2 ** (grid.bits - 1))))
        dtype = storage(name, grid, signed)
        if dtype in (TensorProto.INT4, TensorProto.UINT4) and tensor.dims[-1] % 2 and len(tensor.dims) == 2:
            raise InputError(f"{name} has rows of {tensor.dims[-1]} codes, but two of 4 bits share a byte")
        scales = grid.steps.astype(np.float32)
        scales = scales.reshape(*scales.shape, *[1] * (len(tensor.dims) - 2)) if grid.block_size else scales
        self._external(f"{name}.codes", dtype, tensor.dims, lambda: codes(parameter, grid, signed))
        self._external(f"{name}.scales", TensorProto.FLOAT, scales.shape, lambda: iter([np.atleast_1d(scales)]))
        inputs = [f"{name}.codes", f"{name}.scales"]
        if signed and (dtype != TensorProto.INT4 or grid.block_size):
            return inputs
        zero = np.zeros(scales.shape, int) if signed else -grid.offset.astype(int)
        return [*inputs, self._constant(f"{name}.zero_point", zero, dtype)]

    def _gather(self, new: NodeProto) -> None:
        """A Gather of codes, whose rows are turned into floats behind it."""
        name, (table, *step) = new.output[0], self.gathered[new.input[0]]
        new.input[0], new.output[0], new.name = table, f"{name}.raw", f"{name}.raw"
        self.graph.node.append(new)
        self._show(new.name, name, next(t.data_type for t in self.external if t.name == table))
        self._add("DequantizeLinear", [new.name, *step], name)

    def _pair(self, name: str, source: str, result: str, grid: Grid, like: str = "") -> None:
        """Puts `source` on a grid as `result`. New values are named after `name`, with its shape or that of `like`."""
        like = like or name
        if not isinstance(grid, Encoding):
            self._add("Cast", [source], f"{name}.float16", to=TensorProto.FLOAT16)
            self._show(f"{name}.float16", like, TensorProto.FLOAT16)
            return self._add("Cast", [f"{name}.float16"], result, to=TensorProto.FLOAT)
        dtype = storage(name, grid, False)
        step = [self._constant(f"{name}.scale", grid.scale.astype(np.float32), TensorProto.FLOAT),
                self._constant(f"{name}.zero_point", -grid.offset.astype(int), dtype)]  # fmt: skip
        self._add("QuantizeLinear", [source, *step], f"{name}.codes")
        self._show(f"{name}.codes", like, dtype)
        self._add("DequantizeLinear", [f"{name}.codes", *step], result)

    def _add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.graph.node.append(helper.make_node(op, inputs, [output], name=output, **attributes))

    def _show(self, name: str, like: str, dtype: int = TensorProto.FLOAT) -> None:
        """Lists a new value, with the shape of an old one."""
        self.graph.value_info.append(helper.make_tensor_value_info(name, dtype, self.shapes[like]))

    def _constant(self, name: str, array: np.ndarray, dtype: int) -> str:
        self.graph.initializer.append(helper.make_tensor(name, dtype, array.shape, array.ravel().tolist()))
        return name

    def _external(self, name: str, dtype: int, dims: Sequence[int], tiles: Callable[[], Iterator[np.ndarray]]) -> None:
        self.external.append(TensorProto(name=name, data_type=dtype, dims=dims))
        self.tiles[name] = tiles


def widened(grid: Encoding) -> Encoding:
    """The 16-bit grid with 257 steps for each of an 8-bit one: the same range, and each of its values."""
    return replace(grid, bits=16, scale=grid.scale / WIDE, offset=grid.offset * WIDE)


def codes(parameter: Parameter, grid: Encoding, signed: bool) -> Iterator[np.ndarray]:
    """The codes of a parameter as `model.data` has them, some rows at a time; signed ones about 0."""
    start = 0
    for tile in parameter.tiles():
        rows = grid.rows(slice(start, start + len(tile)))
        found = integers(tile, rows, "even") if signed else quantize(tile, rows, "even")
        start += len(tile)
        width = next(bits for bits in UNSIGNED if grid.bits <= bits)
        kind = f"<{'i' if signed else 'u'}{width // 8}"
        yield int4.pack(found.astype(np.int8).reshape(1, -1)) if width == 4 else found.astype(kind)


def storage(name: str, grid: Encoding, signed: bool) -> int:
    """ONNX's type for codes. A value is clipped by its type, so a type of exactly as many bits must exist."""
    kinds = SIGNED if signed else UNSIGNED
    if not signed and grid.bits not in kinds:
        raise InputError(f"the encoding of {name} has {grid.bits} bits, but ONNX has codes of 4, 8 and 16")
    return kinds[next(bits for bits in kinds if grid.bits <= bits)]
