"""One graph, run three ways: on symbols (the ONNX graph), on arrays (its golden), on grids (a quantized device).

build(model, spec, profile)              -> Built       the graph itself
oracle(model, spec, inputs)              -> outputs     in float64
simulate_graph(simulation, spec, inputs) -> outputs     as a device with these encodings answers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from export.graphs.borders import coded
from export.graphs.cut import substituting
from export.graphs.data import Built, Parameter
from export.graphs.fuse import fusing
from export.graphs.grids import graph_encodings
from export.graphs.naming import tap_of
from export.graphs.ops import OnnxOps
from export.graphs.plan import Arrays, GraphSpec
from export.graphs.profiles import Profile
from export.graphs.qdq import quantized
from export.graphs.symbols import Graph, joined
from refimpl.grids.encodings import EMBED, Encodings
from refimpl.grids.simulate import on_grid
from refimpl.model import Model, SimulatedModel
from refimpl.trace import Tap, feeding, silent
from refimpl_kernels.ops import NumPyOps

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def build(model: Model, spec: GraphSpec, profile: Profile, encodings: Encodings | None = None) -> Built:
    """One graph: the decoder's own code, run on symbols."""
    graph = Graph(profile.forms)
    ops = OnnxOps(graph, profile.opset, profile.weights)
    symbols = {v.name: graph.input(v.name, v.shape, ONNX_TYPES[v.dtype]) for v in [*spec.whole.inputs, *spec.inputs]}
    inputs = [symbols[v.name] for v in spec.inputs]
    weights = {name: Parameter.whole(name, weight) for name, weight in model.weights.items()}
    tap = substituting(symbols, then=graph.tap)
    tap = fusing(graph, then=tap) if profile.forms & {"fused", "norm"} else tap
    outputs = {name: joined(x) for name, x in spec.computed(weights, ops, symbols, tap).items()}
    for name, tensor in outputs.items():
        tensor.name = name
    built = graph.build(spec.name, inputs, list(outputs.values()), profile.opset, profile.ir_version)
    if encodings and profile.on_grids:
        built = quantized(built, graph_encodings(encodings, spec, built))
    return replace(built, proto=coded(built.proto)) if profile.coded else built


def oracle(model: Model, spec: GraphSpec, inputs: Arrays, tap: Tap = silent) -> Arrays:
    """The outputs that NumPy computes in float64 from a graph's inputs, rounded to their types."""
    computed = spec.computed(model.weights, NumPyOps("float64"), spec.filled(inputs), feeding(inputs, then=tap))
    return {v.name: np.ascontiguousarray(computed[v.name], v.dtype) for v in spec.outputs}


def simulate_graph(
    model: SimulatedModel, spec: GraphSpec, inputs: Mapping[str, np.ndarray], tap: Tap = silent
) -> dict[str, np.ndarray]:
    """The outputs that a quantized device should give for the inputs of one graph: float32 on the grids, by ONNX name.

    Inputs are put on their grids first, as a device does with floats that it is given. `tap` gets the tensor of each
    tap.
    """
    known = model.encodings.activations
    table = model.encodings.parameters.get(EMBED)
    fed = {}
    for value in spec.inputs:
        name, x = value.name, inputs[value.name]
        grid = table if f"{value.tap}.weight" == EMBED else known.get(tap_of(value.tap or name))
        fed[name] = on_grid(x, grid, model.rounding) if grid and x.dtype == np.float32 else x
    ops = model.operations()
    computed = spec.computed(model.weights, ops, spec.filled(fed), feeding(fed, then=ops.quantizing(then=tap)))
    return {value.name: np.ascontiguousarray(computed[value.name], value.dtype) for value in spec.outputs}
