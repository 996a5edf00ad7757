"""The grids of one graph: the encodings of the model, by the names of the graph's own values and initializers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from export.graphs.data import Built, Parameter
from export.graphs.naming import tap_of
from export.graphs.plan import GraphSpec
from refimpl.grids.encodings import COS, EMBED, MASK, SIN, Encodings, Grid, feature_grids
from refimpl_kernels.affine import Encoding, from_range

MOVES = {"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Identity", "Cast", "Pad", "Expand"}


def graph_encodings(encodings: Encodings, spec: GraphSpec, built: Built) -> Encodings:
    """The encodings of one graph, by the names of its own values and initializers, as its `model.encodings` has them.

    A value that shows a tap has the tap's grid. Other values get theirs from their neighbours:

    - Keys and values come in on the grid of those that go out. The hidden state comes in on the grid of the part
      before. If that part is the embedding, this is the grid of its table, because a Gather's output has none.
    - An operation that only moves data hands on the grid of its input, or takes the grid of its output if the input has
      none. So does a Concat whose inputs share a grid. A product with a constant has the other factor's grid times the
      constant.
    - A product with cos or sin has the range of the other factor. A sum of scores and mask has the sum of both ranges.
    - The output of a sigmoid is in [0, 1].
    - A head of W_pack that is only moved to become a value (or, without RoPE, a key) has the grid of that value from
      the start.

    Two kinds of values have no grid: those inside of an RMSNorm, and the output of a Gather.
    """
    graph = built.proto.graph
    infos = [*graph.input, *graph.value_info, *graph.output]
    floats = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    taps_of = built.shown | {value.name: tap_of(value.tap or value.name) for value in [*spec.inputs, *spec.outputs]}
    taps_of = {name: taps_of.get(name, name) for name in floats}
    known = {n: encodings.activations[tap] for n, tap in taps_of.items() if tap in encodings.activations} | {
        value.name: encodings.parameters[EMBED]
        for value in spec.inputs
        if f"{value.tap}.weight" == EMBED and EMBED in encodings.parameters
    }
    for name, tap in built.shown.items():
        if tap.endswith(".W_pack") and name in floats:
            which = int(name.removeprefix(f"{tap}.").split(".")[0])
            if grid := feature_grids(encodings, spec.config, tap)[which][1]:
                known[name] = grid
    scalars = {i.name: float(numpy_helper.to_array(i)) for i in graph.initializer if not i.dims and i.data_type == 1}
    _spread(graph, known, floats, scalars)
    ordered = {name: known[name] for name in dict.fromkeys(info.name for info in infos) if name in known}
    parameters = {
        name: _rows(encodings.parameters[parameter.of], parameter)
        for name, parameter in built.parameters.items()
        if parameter.of in encodings.parameters
    }
    return Encodings(ordered, parameters)


def bias_encodings(own: Encodings, built: Built) -> dict[str, Encoding]:
    """The grids of a graph's biases: 32 bits, row by row in steps of the sums of products to which a device adds them.

    Without an encoding, the converter's options would decide how a bias is quantized.

    **Source**: aimet discussion 3902 (a maintainer: "almost always" 32 bits), 2444; AIMET's `export_int32_bias`.
    """
    found = {}
    for node in built.proto.graph.node:
        if node.op_type in ("Gemm", "Conv") and len(node.input) > 2:
            x, weight = own.activations.get(node.input[0]), own.parameters.get(node.input[1])
            if isinstance(x, Encoding) and isinstance(weight, Encoding) and weight.scale.ndim == 1:
                scale = x.scale * weight.scale
                found[node.input[2]] = Encoding(32, scale, np.full(scale.shape, -(2.0**31)), symmetric=True)
    return found


def _rows(encoding: Grid, parameter: Parameter) -> Grid:
    rows = slice(parameter.rows.start, parameter.rows.stop)
    return encoding.rows(rows) if isinstance(encoding, Encoding) else encoding


def _spread(graph: Any, known: dict[str, Grid], floats: set[str], scalars: Mapping[str, float]) -> None:
    """Adds the grids that follow from the `known` ones: once forward through the graph, and once backward."""
    moved: dict[str, str] = {}  # a value that was only moved -> the value that it was
    for node in graph.node:
        if node.op_type in MOVES:
            moved.update(dict.fromkeys(node.output, moved.get(node.input[0], node.input[0])))
        new = _forward(node, known, [moved.get(name, name) for name in node.input], scalars)
        known.update({name: new for name in node.output if new and name in floats and name not in known})
    for node in reversed(graph.node):
        new = known.get(node.output[0])
        sources = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        if node.op_type == "Mul" and isinstance(new, Encoding) and node.input[1] in scalars:
            new = replace(new, scale=new.scale / scalars[node.input[1]])
        elif node.op_type not in MOVES | {"Concat"}:
            continue
        known.update({name: new for name in sources if new and name in floats and name not in known})


def _forward(node: Any, known: Mapping[str, Grid], origins: Sequence[str], scalars: Mapping[str, float]) -> Grid | None:
    """The grid of a node's outputs, as it follows from the grids of its inputs; None if it does not follow.

    `origins`: what the inputs were before they were moved.
    """
    grids = [known.get(name) for name in node.input]
    first = grids[0]
    if node.op_type in MOVES:
        return first
    if node.op_type == "Concat":
        return first if all(grid == first for grid in grids) else None
    if not isinstance(first, Encoding):
        return None
    if node.op_type == "Sigmoid":
        return from_range(0.0, 1.0, first.bits)
    second = grids[1] if len(grids) > 1 else None
    if node.op_type == "Mul" and node.input[1] in scalars:
        return replace(first, scale=first.scale * scalars[node.input[1]])
    if node.op_type == "Mul" and origins[1] in (COS, SIN) and second:
        largest = max(-float(first.low), float(first.high))
        return from_range(-largest, largest, first.bits)
    if node.op_type == "Add" and origins[1] == MASK and isinstance(second, Encoding):
        return from_range(first.low + second.low, first.high + second.high, first.bits)
    return None
