"""Rules about the model: ONNX's versions, operators, shapes and types, as the NPU's compiler takes them."""

from __future__ import annotations

from export.files.graph_folder import GraphFolder
from export.files.skeleton import BITS
from export.preflight.rule import readable, rule
from refimpl.errors import at_most

FLOAT64, STRING, INT64, BOOL, UINT64 = 11, 8, 7, 9, 13  # ONNX's numbers of types
PROVEN_OPSETS = (17, 18)
LATEST_IR = 10

# The operators in ORT's table, and those that a converter folds away.
HTP_OPS = (
    "Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Constant Conv "
    "ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather "
    "GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid "
    "HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax "
    "LpNormalization MatMul Max MaxPool Mean Min Mod Mul Neg Not Or PRelu Pad Pow QuantizeLinear RMSNormalization "
    "Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize RotaryEmbedding "
    "Round ScatterElements ScatterND Sigmoid Sign Sin Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum "
    "Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Where Xor "
)
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
GIVES_BOOL = {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
# The inputs of an operator that are shapes and axes: int64 by ONNX's definition, and gone once the graph is compiled.
SHAPES = {
    "ConstantOfShape": {0}, "CumSum": {1}, "Expand": {1}, "Pad": {1, 3}, "ReduceL2": {1}, "ReduceMax": {1},
    "ReduceMean": {1}, "ReduceMin": {1}, "ReduceProd": {1}, "ReduceSum": {1}, "Reshape": {1}, "Resize": {3},
    "Slice": {1, 2, 3, 4}, "Split": {1}, "Squeeze": {1}, "Tile": {1}, "TopK": {1}, "Unsqueeze": {1},
}  # fmt: skip


@rule(
    "invalid",
    "error",
    wrong="a MatMul that reads x where no node before it gives x",
    source="ONNX: IR.md",
    remedy="run onnx.checker.check_model(path, full_check=True), and mend the exporter",
)
def invalid(graph: GraphFolder):
    """Each tensor is computed once, before it is used, and so is every output of the graph."""
    given = {"", *(value.name for value in graph.graph.inputs), *(t.name for t in graph.graph.initializers)}
    for node in graph.graph.nodes:
        for name in node.inputs:
            if name not in given:
                yield name, f"{node.op} {readable(node.name)} takes it before any node gives it"
        for name in node.outputs:
            if name in given and name:
                yield name, "two nodes, or a node and an input, give it"
            given.add(name)
    for value in graph.graph.outputs:
        if value.name not in given:
            yield value.name, "it is an output, and no node gives it"
    if not graph.graph.outputs:
        yield "", "it has no outputs"


@rule(
    "opset-unproven",
    "warning",
    wrong="opset 21",
    source="zoo: 17 until 0.46, 18 in 0.65",
    remedy="export with opset 17",
    hub=True,
)
def opset_unproven(graph: GraphFolder):
    """The opset is one that AI Hub's own language models have. It may take others; nobody documents that."""
    versions = [version for domain, version in graph.model.opsets if domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in PROVEN_OPSETS:
        said = at_most(versions) if versions else "none"
        yield "", f"the opset is {said}; proven are {' and '.join(map(str, PROVEN_OPSETS))}"


@rule(
    "ir-version-new",
    "error",
    wrong="IR version 11",
    source="zoo: onnx<=1.18, IR clamped to 10",
    remedy="write the model with ir_version=10 or less",
    hub=True,
)
def ir_version_new(graph: GraphFolder):
    """The version of ONNX's file format is at most 10, the newest that AI Hub takes."""
    if not 3 <= graph.model.ir_version <= LATEST_IR:
        yield "", f"the IR version is {graph.model.ir_version}, expected at most {LATEST_IR}"


@rule(
    "operator-foreign",
    "error",
    wrong="com.microsoft.MatMulNBits",
    source="ports",
    remedy="export with operators of ONNX itself (--profile aihub)",
)
def operator_foreign(graph: GraphFolder):
    """Every operator is one of ONNX itself: the converter knows no com.microsoft, and no functions of the model."""
    for node in graph.graph.every_node():
        if node.domain not in ("", "ai.onnx"):
            yield (node.outputs or [node.name])[0], f"{readable(node.op)} is of the domain {node.domain!a:.60}"
    if graph.model.functions:
        yield "", f"the model defines {graph.model.functions} functions"


@rule(
    "control-flow",
    "error",
    wrong="If",
    source="ORT: no If, no Loop",
    remedy="decide on the host, and unroll loops",
)
def control_flow(graph: GraphFolder):
    """A graph of the NPU has no branches and no loops."""
    for node in graph.graph.every_node():
        if node.op in CONTROL_FLOW:
            yield (node.outputs or [node.name])[0], f"{node.op} is control flow"


@rule(
    "operator-unknown",
    "warning",
    wrong="Det",
    source="ORT: table of operators",
    remedy="write it in operators of the table, or try a small compile first",
)
def operator_unknown(graph: GraphFolder):
    """Every operator is in onnxruntime's table for the NPU. QAIRT's own converter may know more, or fewer."""
    known = {*HTP_OPS.split(), *CONTROL_FLOW}
    for node in graph.graph.every_node():
        if node.domain in ("", "ai.onnx") and node.op not in known:
            yield (node.outputs or [node.name])[0], f"{readable(node.op)} is not in onnxruntime's table for the NPU"


@rule(
    "int4-blocks",
    "warning",
    wrong="DequantizeLinear of an INT4 weight",
    source="no report of success",
    remedy="export float32 weights with int4 encodings (--profile aihub)",
    hub=True,
)
def int4_blocks(graph: GraphFolder):
    """Weights in the graph are float32, and encodings put them on 4 bits: that is the way that AI Hub documents."""
    for tensor in graph.constants.values():
        if tensor.dtype in (21, 22, 23, 25, 26):
            yield tensor.name, f"its elements have {BITS[tensor.dtype]} bits"


@rule(
    "shapes-dynamic",
    "error",
    wrong="hidden_states (1, tokens, 4096)",
    source="ORT; ports",
    remedy="export with numbers for all sizes: one graph for each length",
)
def shapes_dynamic(graph: GraphFolder):
    """Every size is a number, because the NPU's memory is laid out when the graph is compiled."""
    ends = {value.name for value in graph.ends}
    for value in [*graph.ends, *graph.graph.values]:
        if value.shape is None and (value.dtype or value.name in ends):
            yield value.name, "it has no shape"
        elif any(not isinstance(size, int) or size < 0 for size in value.shape or ()):
            yield value.name, "it has a size that is not a number"


@rule(
    "value-info-missing",
    "warning",
    wrong="value_info has no entry for probs",
    source="zoo: split_onnx",
    remedy="run onnx.shape_inference, and save what it finds",
    hub=True,
)
def value_info_missing(graph: GraphFolder):
    """Every tensor has its type and shape in the file: the zoo's splitter needs it, and so do these rules."""
    ends = {value.name for value in graph.ends}
    typed = {value.name for value in [*graph.graph.values, *graph.ends] if value.dtype}
    for value in graph.ends:
        if not value.dtype:
            yield value.name, "it is an input or output without a tensor's type"
    for value in graph.graph.values:
        if value.name in ends:
            yield value.name, "it is in value_info, and is an input or output as well"
    for node in graph.graph.nodes:
        for name in node.outputs:
            if name and name not in typed and node.op != "Constant" and name not in ends:
                yield name, "value_info lacks it"


@rule(
    "bool",
    "error",
    wrong="Where(Equal(mask, 0), -50, scores)",
    source="ports: Where, And and Cast to bool fail",
    remedy="compute masks on the host, as floats that are added",
)
def bool_tensors(graph: GraphFolder):
    """The NPU has no tensors of truth values."""
    gives = {name for node in graph.graph.nodes if node.op in GIVES_BOOL for name in node.outputs}
    for name in dict.fromkeys([*(name for name, dtype in graph.types.items() if dtype == BOOL), *gives]):
        yield name, "it is bool"


@rule(
    "dtype-unsupported",
    "error",
    wrong="a Cast to float64",
    source="ORT",
    remedy="cast to float32 before export",
)
def dtype_unsupported(graph: GraphFolder):
    """No tensor is float64, uint64, complex or a string: the NPU lacks these types."""
    lacking = {STRING: "string", FLOAT64: "float64", UINT64: "uint64", 14: "complex64", 15: "complex128"}
    for name, dtype in graph.types.items():
        if dtype in lacking:
            yield name, f"it is {lacking[dtype]}"


@rule(
    "int64-io",
    "error",
    wrong="input_ids in int64",
    source="ports: else --truncate_64bit_io",
    remedy="make ids int32, as the zoo does",
)
def int64_io(graph: GraphFolder):
    """Inputs and outputs have no 64-bit integers."""
    for value in graph.ends:
        if value.dtype == INT64:
            yield value.name, "it is an input or output of int64"


@rule(
    "int64-inside",
    "warning",
    wrong="ArgMax of the logits",
    source="ports: else --truncate_64bit_tensors",
    remedy="use int32 for indices, and fold shapes",
)
def int64_inside(graph: GraphFolder):
    """Nothing is computed in 64-bit integers. Shapes and axes may be: ONNX demands it, and compiling removes them."""
    ends = {value.name for value in graph.ends}
    for node in graph.graph.nodes:
        for place, name in enumerate(node.inputs):
            tensor = graph.constants.get(name)
            if tensor and tensor.dtype == INT64 and place not in SHAPES.get(node.op, ()):
                yield name, f"{readable(node.op)} reads it as int64 data"
        for name in node.outputs:
            if graph.types.get(name) == INT64 and name not in ends and node.op != "Constant":
                yield name, f"{readable(node.op)} computes it in int64"
