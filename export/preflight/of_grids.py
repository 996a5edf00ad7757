"""Rules about a graph's encodings: every tensor that needs a grid has one, and the NPU can multiply on it."""

from __future__ import annotations

from export.files.graph_folder import CACHE, GraphFolder
from export.preflight.rule import rule

FLOAT = 1  # ONNX's number of float32


@rule(
    "encodings-unknown",
    "warning",
    wrong="an encoding of /layers.0/Add; the graph calls it layers.0/Add",
    source="aimet #4071",
    remedy="write the encodings of this very graph, under its names",
)
def encodings_unknown(graph: GraphFolder):
    """Every encoding names a tensor of the graph; any other has no effect, and the tensor that was meant has none."""
    known = {name for node in graph.graph.every_node() for name in (*node.inputs, *node.outputs)}
    known |= {value.name for value in graph.ends} | {tensor.name for tensor in graph.graph.every_tensor()}
    for name in graph.grids or ():
        if name not in known:
            yield name, "the graph has no tensor of this name"


@rule(
    "encodings-missing",
    "error",
    wrong="attention_mask without an encoding",
    source="zoo 0.65: fill_input_encodings_of_split",
    remedy="give both sides of a boundary its encoding",
)
def encodings_missing(graph: GraphFolder):
    """Every float input and output has an encoding, or only moves data that has one: the linker compares them."""
    if graph.grids is None:
        return
    for value in graph.ends:
        if value.dtype == FLOAT and value.name not in graph.standing:
            yield value.name, "it is an input or output without an encoding"


@rule(
    "encodings-weight-missing",
    "warning",
    wrong="q_proj.weight without an encoding",
    source="aimet #2444",
    remedy="give every weight of a MatMul, Gemm or Conv its encoding",
)
def encodings_weight_missing(graph: GraphFolder):
    """Every weight of a product has an encoding: the converter quantizes a weight without one in a way of its own."""
    if graph.grids is None:
        return
    for node in graph.graph.nodes:
        if node.op in ("MatMul", "Gemm", "Conv"):
            for name in node.inputs[:2]:
                tensor = graph.constants.get(name)
                if tensor and tensor.dtype == FLOAT and name not in graph.grids:
                    yield name, f"it is a weight of {node.op} without an encoding"


@rule(
    "encodings-gather",
    "error",
    wrong="an encoding of /embed/Gather",
    source="zoo: AISW-152612",
    remedy="delete it; what a Gather gives stands on its table's grid",
)
def encodings_gather(graph: GraphFolder):
    """The output of a Gather has no encoding of its own: it stands on the grid of its table."""
    for node in graph.graph.nodes:
        if node.op == "Gather":
            yield from ((name, "a Gather gives it") for name in node.outputs if name in (graph.grids or ()))


@rule(
    "kv-not-8-bit",
    "error",
    wrong="past_key_0_in in 8 bits with offset -120",
    source="zoo: _set_tensors_to_output_8b_sym",
    remedy="8 bits, symmetric: offset -128",
)
def kv_not_8_bit(graph: GraphFolder):
    """Keys and values are 8-bit and symmetric: the NPU multiplies 16 by 8 bits, and an empty cache is code 128."""
    for value in graph.ends:
        grid = (graph.grids or {}).get(value.name)
        if CACHE.fullmatch(value.name) and grid and not grid.floating and (grid.bits, grid.offset) != (8, -128):
            yield value.name, f"its grid is {grid}"


@rule(
    "kv-untied",
    "error",
    wrong="past_key_0_in in steps of 0.02, past_key_0_out in steps of 0.01",
    source="zoo: _tie_quantizers_for_kv_cache",
    remedy="give past_*_in the encoding of past_*_out",
)
def kv_untied(graph: GraphFolder):
    """A cache comes in as it went out, in codes, so that both ends have one grid."""
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    for key, value in came.items():
        a, b = (graph.standing.get(v.name) for v in (value, gone.get(key, value)))
        if a and b and a != b:
            yield value.name, f"it has {a}, but {gone[key].name} {b}"


@rule(
    "matmul-16x16",
    "error",
    wrong="probs in 16 bits times values in 16 bits",
    source="ORT: (u8,u8), (u8,u16), (u16,u8)",
    remedy="put the second operand (keys, values) on 8 bits",
)
def matmul_16x16(graph: GraphFolder):
    """In a product of two activations, at most one has 16 bits."""
    for node in graph.graph.nodes:
        if node.op != "MatMul" or any(name in graph.constants for name in node.inputs):
            continue
        grids = [graph.standing.get(name) for name in node.inputs[:2]]
        if len(grids) == 2 and all(grid and not grid.floating and grid.bits > 8 for grid in grids):
            yield (node.outputs or [node.name])[0], "both operands have more than 8 bits"


@rule(
    "float16-by-8-bit",
    "error",
    wrong="probs in float16 times values in 8 bits",
    source="aimet #4090",
    remedy="put both operands on grids, or both in float16",
)
def float16_by_8_bit(graph: GraphFolder):
    """In a product of two activations, a float16 operand has no 8-bit one: the converter refuses the pair."""
    for node in graph.graph.nodes:
        if node.op != "MatMul" or any(name in graph.constants for name in node.inputs):
            continue
        a, b = (graph.standing.get(name) for name in (*node.inputs, "", "")[:2])
        for half, narrow in ((a, b), (b, a)):
            if half and narrow and half.floating and not narrow.floating and narrow.bits == 8:
                yield (node.outputs or [node.name])[0], "one operand is float16, the other has 8 bits"
