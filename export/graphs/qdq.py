"""A graph that computes on grids by itself: pairs of QuantizeLinear and DequantizeLinear where the encodings say so.

onnxruntime runs it as it stands, so it is a stand-in for the device, and a second opinion on the simulator. ONNX
rounds half a step to even, where AIMET rounds it up: `model.simulate(encodings, rounding="even")` is its twin.

    value       x -> QuantizeLinear -> codes -> DequantizeLinear -> under x's own name
    parameter   codes, in as many bits as they have, -> DequantizeLinear, a step for each tensor, row or block
    table       what a Gather takes: it gathers codes, and those rows alone become floats
    8 bits      what a linear gives (values) goes through 16: an NPU has no product of 16 by 4 bits that gives 8

A NPU's provider computes all of such a graph, with two things that ONNX leaves open: INT4 codes state their zero point,
for without one it reads them as other numbers, and the two roundings of values come to the same as one: 257 fine steps
are a coarse one, so what lies between two coarse ones is never half a fine one from where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graphs.data import Built, Parameter, assign_offsets
from refimpl.errors import InputError
from refimpl.grids.encodings import Encodings, Grid
from refimpl_kernels.affine import Encoding, integers, quantize
from refimpl_kernels.formats import int4

UNSIGNED = {4: TensorProto.UINT4, 8: TensorProto.UINT8, 16: TensorProto.UINT16}
LINEARS = ("Gemm", "Conv", "MatMul")
WIDE = 257  # (2^16 - 1) / (2^8 - 1)
SIGNED = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}


def quantized(built: Built, own: Encodings) -> Built:
    """The graph with its values and parameters on the grids of its `own` encodings (`graph_encodings`).

    Needs opset 21, the first with 16 and 4 bits and with blocks. Raises InputError for bits that ONNX lacks.
    """
    old = built.proto.graph
    proto = ModelProto()
    proto.CopyFrom(built.proto)
    graph = proto.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    tiles: dict[str, Callable[[], Iterator[np.ndarray]]] = {}
    external: list[TensorProto] = []
    tables = {node.input[0] for node in old.node if node.op_type == "Gather"}

    def constant(name: str, array: np.ndarray, dtype: int) -> str:
        graph.initializer.append(helper.make_tensor(name, dtype, array.shape, array.ravel().tolist()))
        return name

    def parameter(proto: TensorProto, of: Parameter, grid: Encoding) -> list[str]:
        """Codes, scales and zero point of a parameter: the inputs of its DequantizeLinear."""
        name, signed = proto.name, bool(np.all(grid.offset == -(2 ** (grid.bits - 1))))
        dtype = storage(name, grid, signed)
        if dtype in (TensorProto.INT4, TensorProto.UINT4) and proto.dims[-1] % 2 and len(proto.dims) == 2:
            raise InputError(f"{name} has rows of {proto.dims[-1]} codes, but two of 4 bits share a byte")
        external.append(TensorProto(name=f"{name}.codes", data_type=dtype, dims=proto.dims))
        tiles[f"{name}.codes"] = lambda: codes(of, grid, signed)
        scales = grid.steps.astype(np.float32)
        scales = scales.reshape(*scales.shape, *[1] * (len(proto.dims) - 2)) if grid.block_size else scales
        inputs = [f"{name}.codes", f"{name}.scales"]
        external.append(TensorProto(name=inputs[1], data_type=TensorProto.FLOAT, dims=scales.shape))
        tiles[inputs[1]] = lambda: iter([np.atleast_1d(scales)])
        if signed and (dtype != TensorProto.INT4 or grid.block_size):
            return inputs
        zero = np.zeros(scales.shape, int) if signed else -grid.offset.astype(int)
        return [*inputs, constant(f"{name}.zero_point", zero, dtype)]

    def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        graph.node.append(helper.make_node(op, inputs, [output], name=output, **attributes))

    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*old.input, *old.value_info, *old.output)}  # fmt: skip

    def shown(name: str, like: str, dtype: int = TensorProto.FLOAT) -> None:
        graph.value_info.append(helper.make_tensor_value_info(name, dtype, shapes[like]))

    def pair(name: str, source: str, result: str, grid: Grid, like: str = "") -> None:
        like = like or name
        if not isinstance(grid, Encoding):
            node("Cast", [source], f"{name}.float16", to=TensorProto.FLOAT16)
            shown(f"{name}.float16", like, TensorProto.FLOAT16)
            return node("Cast", [f"{name}.float16"], result, to=TensorProto.FLOAT)
        scale = constant(f"{name}.scale", grid.scale.astype(np.float32), TensorProto.FLOAT)
        step = [scale, constant(f"{name}.zero_point", -grid.offset.astype(int), storage(name, grid, False))]
        node("QuantizeLinear", [source, *step], f"{name}.codes")
        shown(f"{name}.codes", like, storage(name, grid, False))
        node("DequantizeLinear", [f"{name}.codes", *step], result)

    gathered: dict[str, list[str]] = {}
    for initializer in old.initializer:
        name = initializer.name
        of, grid = built.parameters.get(name), own.parameters.get(name)
        if of is None or not isinstance(grid, Encoding):
            (external if name in built.layout else graph.initializer).append(initializer)
            tiles.update({name: built.tiles[name]} if name in built.layout else {})
            continue
        inputs = parameter(initializer, of, grid)
        if name in tables:
            gathered[name] = inputs
            continue
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, initializer.dims))
        axis = {"axis": 1, "block_size": grid.block_size} if grid.block_size else {"axis": 0} if grid.scale.ndim else {}
        node("DequantizeLinear", inputs, name, **axis)
    fed = {value.name: f"{value.name}.on_grid" for value in old.input if value.name in own.activations}
    for name, result in fed.items():
        pair(name, name, result, own.activations[name])
        shown(result, name)
    for each in old.node:
        new = NodeProto()
        new.CopyFrom(each)
        new.input[:] = [fed.get(name, name) for name in each.input]
        codes_of = gathered.get(each.input[0]) if each.op_type == "Gather" else None
        raw = [name for name in each.output if name in own.activations or codes_of]
        new.output[:] = [f"{name}.raw" if name in raw else name for name in each.output]
        new.name = new.output[0]
        if codes_of:
            new.input[0] = codes_of[0]
            graph.node.append(new)
            shown(new.output[0], each.output[0], next(p.data_type for p in external if p.name == codes_of[0]))
            node("DequantizeLinear", [new.output[0], *codes_of[1:]], each.output[0])
            continue
        graph.node.append(new)
        for name in raw:
            shown(f"{name}.raw", name)
            grid, source = own.activations[name], f"{name}.raw"
            linear = each.op_type in LINEARS and each.input[1] in own.parameters
            if linear and isinstance(grid, Encoding) and grid.bits == 8:
                source = f"{name}.wide"
                pair(source, f"{name}.raw", source, widened(grid), like=name)
                shown(source, name)
            pair(name, source, name, grid)
    for initializer in external:
        del initializer.external_data[:]
    layout = assign_offsets(external)
    graph.initializer.extend(external)
    graph.value_info.extend(old.value_info)
    return Built(proto, layout, tiles, built.shown, {})


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
    """ONNX's type for codes. A value that is rounded on the way needs one of exactly so many bits, to be clipped."""
    kinds = SIGNED if signed else UNSIGNED
    if not signed and grid.bits not in kinds:
        raise InputError(f"the encoding of {name} has {grid.bits} bits, but ONNX has codes of 4, 8 and 16")
    return kinds[next(bits for bits in kinds if grid.bits <= bits)]
