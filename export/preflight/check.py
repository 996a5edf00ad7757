"""`check` a folder of graphs before it is uploaded: what AI Hub, the NPU or Genie is known to refuse, in milliseconds.

A compile job takes an upload of gigabytes and minutes of queue, and says "exit code 14". What can be known before is a
rule here: RULES is the table, one small function each. A rule says what it means, whence it is known and what to do;
its function yields the places where a graph breaks it. The graphs may be anybody's, in one folder or in one for each:
a folder holds `model.onnx`, and beside it weights and encodings. Weights are never read (see `files/skeleton.py`).

Rules about names and shapes are those of a language model's parts, and are asked of graphs that look like one: they
have a `past_key_0_in`, or are called `prompt_ar128_cl4096_2_of_5`.

**Source** of each rule: its row. "Zoo" is AI Hub Models 0.46 (`models/_shared/llm`), "client" qai-hub 0.56, "ORT" the
documentation of onnxruntime's QNN execution provider, "ports" what people reported who tried.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from export.files.graph_folder import CACHE, HOST, NAME, GraphFolder, read_folders
from export.files.skeleton import BITS
from refimpl.errors import at_most

FLOAT, STRING, INT64, BOOL, DOUBLE, UINT64 = 1, 8, 7, 9, 11, 13
PROVEN_OPSETS = (17, 18)
LATEST_IR = 10
PROTOBUF_LIMIT = 1 << 31  # bytes of a protobuf message
BINARY_LIMIT = 2_000_000_000  # bytes of weights in a context binary
LISTED = 5  # tensors that a finding names; the others are counted
REASONS = 20  # findings of one rule in one graph, before the rest is one
SAMPLES, SAMPLE_BYTES = 64, 4096  # of two weight files that should be the same
STARTS = ("input_ids", "input_embeds", "inputs_embeds")

# Of the operators in ORT's table, and those that a converter folds away.
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
# Which inputs of an operator are shapes and axes: int64 by ONNX's definition, and gone once the graph is compiled.
SHAPES = {
    "ConstantOfShape": {0}, "CumSum": {1}, "Expand": {1}, "Pad": {1, 3}, "ReduceL2": {1}, "ReduceMax": {1},
    "ReduceMean": {1}, "ReduceMin": {1}, "ReduceProd": {1}, "ReduceSum": {1}, "Reshape": {1}, "Resize": {3},
    "Slice": {1, 2, 3, 4}, "Split": {1}, "Squeeze": {1}, "Tile": {1}, "TopK": {1}, "Unsqueeze": {1},
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A rule that a graph breaks. `tensors` are the first of the `count` places; `graph` is the folder's name."""

    rule: str
    severity: str
    graph: str
    tensors: tuple[str, ...]
    count: int
    why: str
    remedy: str

    def __str__(self) -> str:
        more = f" and {self.count - len(self.tensors)} more" if self.count > len(self.tensors) else ""
        where = f"{', '.join(self.tensors)}{more}: " if self.tensors else ""
        return f"{where}{self.why}"


@dataclass(frozen=True)
class Preflight:
    """What was found in `graphs` graphs; its truth value is whether that is nothing."""

    findings: tuple[Finding, ...]
    graphs: int

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        """What is wrong in several graphs for one reason is said once."""
        lines: dict[tuple[str, str, str, str], list[str]] = {}
        for one in self.findings:
            lines.setdefault((one.severity, one.rule, str(one), one.remedy), []).append(one.graph)
        text = [
            f"{severity} {rule}: {what}\n    in {at_most(graphs, 12)}\n    do: {remedy}"
            for (severity, rule, what, remedy), graphs in lines.items()
        ]
        kinds = Counter(finding.severity for finding in self.findings)
        said = ", ".join(
            f"{kinds[kind]} {kind}{'s' * (kinds[kind] > 1)}" for kind in ("error", "warning") if kinds[kind]
        )
        return "\n".join([*text, f"{said or 'nothing'} found in {self.graphs} graphs"])

    def to_json(self) -> str:
        return json.dumps({"graphs": self.graphs, "findings": [asdict(finding) for finding in self.findings]})


def check(folder: str | Path) -> Preflight:
    """Holds a folder's graphs against RULES: the graph in it, or that of each folder in it.

    A file that is damaged is a finding. Raises InputError for what is no folder, or holds no ONNX file at all.
    """
    graphs = read_folders(folder)
    findings: list[Finding] = []
    for rule in RULES:
        if rule.of_all:
            if not any(graph.damage for graph in graphs):
                findings += _findings(rule, rule.breaches(graphs))
            continue
        for graph in graphs:
            if graph.damage and rule.id not in ("damaged", "folder-contents"):
                continue
            findings += _findings(rule, ((graph, *breach) for breach in rule.breaches(graph)))
    order = {_readable(graph.name): number for number, graph in enumerate(graphs)}
    findings.sort(key=lambda finding: (order[finding.graph], finding.severity))
    return Preflight(tuple(findings), len(graphs))


def _findings(rule: Rule, breaches: Iterator[tuple[GraphFolder, str, str]]) -> list[Finding]:
    """One finding for each graph and reason, with the tensors that share them."""
    places: dict[str, dict[str, dict[str, None]]] = {}
    for graph, name, why in breaches:
        reasons = places.setdefault(_readable(graph.name), {})
        if why not in reasons and len(reasons) >= REASONS:
            why = "the like is wrong here as well"
        named = reasons.setdefault(why, {})
        if name:
            named[_readable(name)] = None
    return [
        Finding(rule.id, rule.severity, graph_name, tuple(named)[:LISTED], len(named), why, rule.remedy)
        for graph_name, reasons in places.items()
        for why, named in reasons.items()
    ]


def _readable(name: str) -> str:
    """A name that a terminal may show."""
    return (name if name.isprintable() else ascii(name))[:200]


@dataclass(frozen=True)
class Rule:
    """One thing that is known. `breaches` yields the tensor, if it is one, and why; of_all: the graph before these."""

    id: str
    severity: str
    means: str
    source: str
    remedy: str
    of_all: bool
    breaches: Callable[[Any], Iterator[Any]]


RULES: list[Rule] = []


def rule(id: str, severity: str, source: str, remedy: str, of_all: bool = False) -> Callable:
    """Makes a function a rule; its docstring is what the rule means."""

    def register(breaches: Callable[[Any], Iterator[Any]]) -> Callable:
        RULES.append(Rule(id, severity, " ".join((breaches.__doc__ or "").split()), source, remedy, of_all, breaches))
        return breaches

    return register


# The files.


@rule("damaged", "error", "protobuf, JSON", "export or copy the file again")
def damaged(graph: GraphFolder):
    """A file cannot be read, and nothing else is known of its graph."""
    yield from (("", why) for why in graph.damage)


@rule("folder-contents", "error", "client: _get_model_dir_type", "leave one .onnx, one .data, one .encodings, no more")
def folder_contents(graph: GraphFolder):
    """A folder is uploaded as one model: exactly one .onnx, at most one .data and one .encodings, and nothing else."""
    kinds = Counter(path.suffix for path in graph.files if path.is_file())
    for path in graph.files:
        if path.is_symlink():
            yield path.name, "is a link; an upload takes files"
        elif path.suffix not in (".onnx", ".data", ".encodings") or not path.is_file():
            yield path.name, "does not belong into a graph's folder"
    for suffix in (".onnx", ".data", ".encodings"):
        if kinds[suffix] > 1:
            yield "", f"there are {kinds[suffix]} files *{suffix}, one is taken"


@rule("external-name", "error", "client; ports", "save all weights as one file model.data beside model.onnx")
def external_name(graph: GraphFolder):
    """Weights outside model.onnx, those of Constant nodes too, lie in one *.data of the same folder."""
    locations: dict[str, str] = {}
    for tensor in graph.graph.every_tensor():
        if tensor.external is not None:
            locations.setdefault(tensor.external.get("location", ""), tensor.name)
    for location, name in locations.items():
        if not location or "/" in location or "\\" in location or location in (".", "..") or "\0" in location:
            yield name, f"its values are in {location!a:.80}, which is no file of this folder"
        elif PurePosixPath(location).suffix != ".data":
            yield name, f"its values are in {location!a:.80}, which is not called *.data"
        elif not (graph.folder / location).is_file():
            yield name, f"its values are in {location!a:.80}, which is not there"
    if len(locations) > 1:
        yield "", f"weights lie in {len(locations)} files, one is taken: {at_most(map(ascii, locations))}"


@rule("external-range", "error", "ONNX: ExternalDataInfo", "copy model.data again, or export again")
def external_range(graph: GraphFolder):
    """The bytes of a weight lie within its file, and are as many as its shape needs."""
    sizes: dict[str, int] = {path.name: path.stat().st_size for path in graph.of_kind(".data")}
    for tensor in graph.graph.every_tensor():
        if tensor.external is None or tensor.external.get("location") not in sizes:
            continue
        size, said = sizes[tensor.external["location"]], [tensor.external.get(key) for key in ("offset", "length")]
        if not all(number is None or (number.isascii() and number.isdecimal() and len(number) < 20) for number in said):
            yield tensor.name, "its offset or length is no number"
            continue
        offset = int(said[0] or 0)
        length = int(said[1]) if said[1] is not None else size - offset
        if length < 0 or offset + length > size:
            yield tensor.name, f"it ends at byte {offset + length} of a file of {size}"
        elif length != tensor.nbytes:
            yield tensor.name, f"it has {length} bytes, its shape needs {tensor.nbytes}"


@rule(
    "protobuf-size", "error", "protobuf; ai-hub-apps #24", "move the weights into model.data, or split into more parts"
)
def protobuf_size(graph: GraphFolder):
    """A protobuf message, model.onnx, has less than 2 GiB."""
    for path in graph.of_kind(".onnx"):
        if path.stat().st_size >= PROTOBUF_LIMIT:
            yield "", f"{path.name} has {path.stat().st_size / 1e9:.2f} GB; protobuf's limit is 2 GiB (2.15 GB)"


@rule("binary-size", "warning", "zoo: onboarding.md", "split the model into more parts, or quantize weights to 4 bits")
def binary_size(graph: GraphFolder):
    """An NPU process has 32-bit addresses: a context binary, encoded weights, has 1 to 2 GB."""
    grids, raw, packed = graph.grids or {}, 0, 0
    for tensor in graph.constants.values():
        raw += tensor.nbytes
        bits = BITS.get(tensor.dtype, 8)
        packed += tensor.nbytes * min(bits, grids[tensor.name].bits if tensor.name in grids else bits) // bits
    if packed > BINARY_LIMIT:
        yield (
            "",
            (
                f"its weights have {packed / 1e9:.2f} GB as its encodings pack them ({raw / 1e9:.2f} GB as they are); "
                "the NPU's limit is 1 to 2 GB a binary"
            ),
        )


# The model.


@rule("invalid", "error", "ONNX: IR.md", "run onnx.checker.check_model(path, full_check=True), and mend the exporter")
def invalid(graph: GraphFolder):
    """A name is given once, before it is used, and every output of the graph is computed."""
    given = {"", *(value.name for value in graph.graph.inputs), *(t.name for t in graph.graph.initializers)}
    for node in graph.graph.nodes:
        for name in node.inputs:
            if name not in given:
                yield name, f"{node.op} {_readable(node.name)} takes it before anything gives it"
        for name in node.outputs:
            if name in given and name:
                yield name, "two nodes, or a node and an input, give it"
            given.add(name)
    for value in graph.graph.outputs:
        if value.name not in given:
            yield value.name, "it is an output that nothing gives"
    if not graph.graph.outputs:
        yield "", "it has no outputs"


@rule("opset", "warning", "zoo: 17 until 0.46, 18 in 0.65", "export with opset 17")
def opset(graph: GraphFolder):
    """The opsets that AI Hub's own language models have: any other may be taken, and nothing says so."""
    versions = [version for domain, version in graph.model.opsets if domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in PROVEN_OPSETS:
        said = at_most(versions) if versions else "none"
        yield "", f"the opset is {said}; proven are {' and '.join(map(str, PROVEN_OPSETS))}"


@rule("ir-version", "error", "zoo: onnx<=1.18, IR clamped to 10", "write the model with ir_version=10 or less")
def ir_version(graph: GraphFolder):
    """AI Hub does not take what comes after version 10 of ONNX's file format."""
    if not 3 <= graph.model.ir_version <= LATEST_IR:
        yield "", f"the IR version is {graph.model.ir_version}, expected at most {LATEST_IR}"


@rule("domain", "error", "ports", "export with operators of ONNX itself (--profile aihub)")
def domain(graph: GraphFolder):
    """The converter knows ONNX's operators, no others: none of com.microsoft, and no functions of the model itself."""
    for node in graph.graph.every_node():
        if node.domain not in ("", "ai.onnx"):
            yield (node.outputs or [node.name])[0], f"{_readable(node.op)} is of the domain {node.domain!a:.60}"
    if graph.model.functions:
        yield "", f"the model defines {graph.model.functions} functions"


@rule("control-flow", "error", "ORT: no If, no Loop", "decide on the host, and unroll loops")
def control_flow(graph: GraphFolder):
    """A graph of the NPU has no branches and no loops."""
    for node in graph.graph.every_node():
        if node.op in CONTROL_FLOW:
            yield (node.outputs or [node.name])[0], f"{node.op} is control flow"


@rule(
    "operator", "warning", "ORT: table of operators", "write it in operators of the table, or try a small compile first"
)
def operator(graph: GraphFolder):
    """An operator that no table of the NPU has. QAIRT's own converter may know more, and may know less."""
    known = {*HTP_OPS.split(), *CONTROL_FLOW}
    for node in graph.graph.every_node():
        if node.domain in ("", "ai.onnx") and node.op not in known:
            yield (node.outputs or [node.name])[0], f"{_readable(node.op)} is in no table of the NPU's operators"


@rule("int4-blocks", "warning", "no report of success", "export float32 weights with int4 encodings (--profile aihub)")
def int4_blocks(graph: GraphFolder):
    """4-bit weights in the graph itself: AI Hub's documented route is float32 weights and an encodings file."""
    for tensor in graph.constants.values():
        if tensor.dtype in (21, 22, 23, 25, 26):
            yield tensor.name, f"its elements have {BITS[tensor.dtype]} bits"


@rule("static-shapes", "error", "ORT; ports", "export with numbers for all sizes: one graph for each length")
def static_shapes(graph: GraphFolder):
    """Every size is a number: the NPU's memory is laid out when the graph is compiled."""
    ends = {value.name for value in graph.ends}
    for value in [*graph.ends, *graph.graph.values]:
        if value.shape is None and (value.dtype or value.name in ends):
            yield value.name, "it has no shape"
        elif any(not isinstance(size, int) or size < 0 for size in value.shape or ()):
            yield value.name, "it has a size that is no number"


@rule("value-info", "warning", "zoo: split_onnx", "run onnx.shape_inference, and save what it finds")
def value_info(graph: GraphFolder):
    """Every tensor has its type and shape in the file: the zoo's splitter needs it, and so do these rules."""
    ends = {value.name for value in graph.ends}
    typed = {value.name for value in [*graph.graph.values, *graph.ends] if value.dtype}
    for value in graph.ends:
        if not value.dtype:
            yield value.name, "it is an input or output without a tensor's type"
    for value in graph.graph.values:
        if value.name in ends:
            yield value.name, "it is in value_info, and an input or output as well"
    for node in graph.graph.nodes:
        for name in node.outputs:
            if name and name not in typed and node.op != "Constant" and name not in ends:
                yield name, "value_info lacks it"


@rule("bool", "error", "ports: Where, And and Cast to bool fail", "compute masks on the host, as floats that are added")
def bool_tensors(graph: GraphFolder):
    """The NPU has no tensors of truth values."""
    gives = {name for node in graph.graph.nodes if node.op in GIVES_BOOL for name in node.outputs}
    for name in dict.fromkeys([*(name for name, dtype in graph.types.items() if dtype == BOOL), *gives]):
        yield name, "it is bool"


@rule("dtype", "error", "ORT", "cast to float32 before export")
def dtypes(graph: GraphFolder):
    """float64, uint64, complex numbers and strings are types that the NPU lacks."""
    lacking = {STRING: "string", DOUBLE: "float64", UINT64: "uint64", 14: "complex64", 15: "complex128"}
    for name, dtype in graph.types.items():
        if dtype in lacking:
            yield name, f"it is {lacking[dtype]}"


@rule("int64-io", "error", "ports: else --truncate_64bit_io", "make ids int32, as the zoo does")
def int64_io(graph: GraphFolder):
    """Inputs and outputs have no 64-bit integers."""
    for value in graph.ends:
        if value.dtype == INT64:
            yield value.name, "it is an input or output of int64"


@rule("int64-inside", "warning", "ports: else --truncate_64bit_tensors", "use int32 for indices, and fold shapes")
def int64_inside(graph: GraphFolder):
    """Nothing is computed in 64-bit integers. Shapes and axes may be: ONNX demands it, and compiling removes them."""
    ends = {value.name for value in graph.ends}
    for node in graph.graph.nodes:
        for place, name in enumerate(node.inputs):
            tensor = graph.constants.get(name)
            if tensor and tensor.dtype == INT64 and place not in SHAPES.get(node.op, ()):
                yield name, f"{_readable(node.op)} reads it as int64 data"
        for name in node.outputs:
            if graph.types.get(name) == INT64 and name not in ends and node.op != "Constant":
                yield name, f"{_readable(node.op)} computes it in int64"


@rule("names", "error", "compiler: / and . become _", "rename one of them")
def names(graph: GraphFolder):
    """Two tensors have different names still when the compiler has turned every `/` and `.` into `_`."""
    nodes = (name for node in graph.graph.nodes for name in node.outputs)
    given = dict.fromkeys([*(v.name for v in graph.ends), *(t.name for t in graph.graph.initializers), *nodes])
    groups: dict[str, list[str]] = {}
    for name in given:
        groups.setdefault(sanitized(name), []).append(name)
    for flat, same in groups.items():
        if len(same) > 1:
            yield from ((name, f"they all become {_readable(flat)}") for name in same)


# The names, shapes and order of a language model's parts.


@rule("graph-name", "error", "zoo: get_qnn_context_graph_name", "call it {prompt|token}_ar{S}_cl{C}_{i}_of_{N}")
def graph_name(graph: GraphFolder):
    """Genie reads tokens at a time, context and part from the name, and they are what the shapes say."""
    if not graph.is_language_model:
        return
    if not graph.called:
        yield "", f"the folder is called {_readable(graph.name)}"
        return
    kind, tokens, context, number, total = graph.called
    if not 1 <= number <= total:
        yield "", f"it is part {number} of {total}"
    if kind and (kind == "token") != (tokens == 1):
        yield "", f"it is called {kind}, with {tokens} tokens at a time"
    if graph.window and graph.window != (tokens, context):
        yield (
            "attention_mask",
            f"the name says ar{tokens}_cl{context}, the mask's shape ar{graph.window[0]}_cl{graph.window[1]}",
        )
    own = NAME.fullmatch(graph.graph.name)
    if own and own[0] != NAME.search(graph.name)[0]:  # type: ignore[index]
        yield "", f"the graph in the file is called {_readable(graph.graph.name)}"


@rule("io-extra", "warning", "zoo: _get_output_names", "compile it to look inside, and leave it out for Genie")
def io_extra(graph: GraphFolder):
    """An output that Genie does not ask for, such as a probe."""
    if graph.is_language_model:
        for value in graph.graph.outputs:
            if not CACHE.fullmatch(value.name) and not (graph.gives and value.name == graph.gives.name):
                yield value.name, "it is an output that Genie knows nothing of"


@rule("io-names", "error", "zoo: _get_input_spec", "rename it; export/graphs/plan.py lists what each is called")
def io_names(graph: GraphFolder):
    """Genie finds inputs and outputs by name: one hidden state or ids, mask, cos and sin, and each layer's cache."""
    if not graph.is_language_model:
        return
    inputs, outputs = ({value.name for value in values} for values in (graph.graph.inputs, graph.graph.outputs))
    for values, first, what in (
        (graph.graph.inputs, graph.reads, "input"),
        (graph.graph.outputs, graph.gives, "output"),
    ):
        for value in values:
            known = value.name in HOST or CACHE.fullmatch(value.name) or (first and value.name == first.name)
            if not known and what == "input":
                yield value.name, "it is an input that Genie knows nothing of"
        if not first:
            yield "", f"there is no hidden state among the {what}s"
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    layers = {layer for layer, _ in [*came, *gone]}
    for layer in sorted(layers):
        for kind in ("key", "value"):
            for has, way in ((came, "in"), (gone, "out")):
                if (layer, kind) not in has or not has[layer, kind].name.endswith(way):
                    yield f"past_{kind}_{layer}_{way}", "it is missing"
    if layers and "attention_mask" not in inputs:
        yield "attention_mask", "it is missing"
    if ("position_ids_cos" in inputs) != ("position_ids_sin" in inputs):
        yield "position_ids_cos", "cos and sin come together or not at all"
    for name in sorted(outputs & {*HOST, *STARTS}):
        yield name, "it is an output under the name of an input"


@rule("alibi", "warning", "zoo: _get_input_spec", "run the graphs from a host of your own, with ALiBi in its mask")
def alibi(graph: GraphFolder):
    """Genie computes rotary positions, and a mask with one head: it gives cos and sin to every part with layers."""
    inputs = {value.name: value for value in graph.graph.inputs}
    if not graph.cache(graph.graph.inputs) or "attention_mask" not in inputs:
        return
    shape = inputs["attention_mask"].shape or ()
    if len(shape) == 4 and shape[1] != 1:
        yield "attention_mask", f"it has {shape[1]} heads"
    if not {"position_ids_cos", "position_ids_sin"} & set(inputs):
        yield "", "it takes no cos and sin"


@rule(
    "io-order",
    "warning",
    "zoo: _get_input_spec; client: order of a dict",
    "export in this order, or feed in the graph's",
)
def io_order(graph: GraphFolder):
    """AI Hub matches data to inputs by their order: hidden state, mask, cos, sin, then key and value of each layer."""
    if not graph.is_language_model:
        return
    for values, first in ((graph.graph.inputs, graph.reads), (graph.graph.outputs, graph.gives)):
        given = [value.name for value in values]
        cached = graph.cache(values)
        wanted = [first.name] if first else []
        wanted += [name for name in HOST if name in given]
        wanted += [cached[key].name for key in sorted(cached)]
        known = set(wanted)
        there = [name for name in given if name in known]
        for place, (name, want) in enumerate(zip(there, wanted, strict=False)):
            if name != want:
                yield name, f"{_readable(want)} comes before it, as number {place + 1}"
                break


@rule("io-shapes", "error", "zoo: _get_input_spec", "export with these layouts; Genie keeps its cache in them")
def io_shapes(graph: GraphFolder):
    """Ids (1, S), mask (1, 1, S, C), cos and sin (1, 1, S, D/2), keys (K, 1, D, C-S), values (K, 1, C-S, D)."""
    if not graph.is_language_model or not graph.window:
        return
    S, C = graph.window
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    if not 1 <= S < C:
        yield "attention_mask", f"{S} tokens at a time in a context of {C} leave no past"
    shapes = [(kind, value.shape) for (_, kind), value in [*came.items(), *gone.items()] if len(value.shape or ()) == 4]
    heads = Counter(shape[0] for _, shape in shapes if shape)
    dims = Counter(shape[2 if kind == "key" else 3] for kind, shape in shapes if shape)
    K, D = (most[0][0] if (most := counted.most_common(1)) else name for name, counted in (("K", heads), ("D", dims)))
    half = D // 2 if isinstance(D, int) else "D/2"
    wanted: dict[str, tuple] = {"attention_mask": (1, ..., S, C)}
    wanted |= dict.fromkeys(HOST[1:], (1, 1, S, half)) | dict.fromkeys(STARTS[1:], (1, S, ...)) | {"input_ids": (1, S)}
    for values, length in ((came, C - S), (gone, S)):
        for (_, kind), value in values.items():
            wanted[value.name] = (K, 1, D, length) if kind == "key" else (K, 1, length, D)
    for first in (graph.reads, graph.gives):
        if first and first.name not in wanted:
            wanted[first.name] = (1, S, ...)
    for value in graph.ends:
        want, have = wanted.get(value.name), value.shape
        if not want or have is None or not all(isinstance(size, int) for size in have):
            continue
        if len(have) != len(want) or any(w != h for w, h in zip(want, have, strict=True) if isinstance(w, int)):
            said = ", ".join("any" if size is ... else str(size) for size in want)
            yield value.name, f"its shape is {have}, expected ({said})"
        if value.name == "input_ids" and value.dtype not in (6, INT64):
            yield value.name, "ids are int32"


# The encodings.


@rule("encodings-unknown", "warning", "aimet #4071", "write the encodings of this very graph, under its names")
def encodings_unknown(graph: GraphFolder):
    """An encoding for a tensor that the graph lacks does nothing, and the tensor that was meant has none."""
    known = {name for node in graph.graph.every_node() for name in (*node.inputs, *node.outputs)}
    known |= {value.name for value in graph.ends} | {tensor.name for tensor in graph.graph.every_tensor()}
    for name in graph.grids or ():
        if name not in known:
            yield name, "the graph has no tensor of this name"


@rule(
    "encodings-missing",
    "error",
    "zoo 0.65: fill_input_encodings_of_split",
    "give both sides of a boundary its encoding",
)
def encodings_missing(graph: GraphFolder):
    """Every float input and output has an encoding, or moves data that has one; the linker compares them."""
    if graph.grids is None:
        return
    for value in graph.ends:
        if value.dtype == FLOAT and value.name not in graph.standing:
            yield value.name, "it is an input or output without an encoding"


@rule("encodings-weights", "warning", "aimet #2444", "give every weight of a MatMul, Gemm or Conv its encoding")
def encodings_weights(graph: GraphFolder):
    """A weight without an encoding is quantized all the same, in the converter's way."""
    if graph.grids is None:
        return
    for node in graph.graph.nodes:
        if node.op in ("MatMul", "Gemm", "Conv"):
            for name in node.inputs[:2]:
                tensor = graph.constants.get(name)
                if tensor and tensor.dtype == FLOAT and name not in graph.grids:
                    yield name, f"it is a weight of {node.op} without an encoding"


@rule("encodings-gather", "error", "zoo: AISW-152612", "delete it; what a Gather gives stands on its table's grid")
def encodings_gather(graph: GraphFolder):
    """What a Gather gives has no encoding of its own."""
    for node in graph.graph.nodes:
        if node.op == "Gather":
            yield from ((name, "a Gather gives it") for name in node.outputs if name in (graph.grids or ()))


@rule("kv-bits", "error", "zoo: _set_tensors_to_output_8b_sym", "8 bits, symmetric: offset -128")
def kv_bits(graph: GraphFolder):
    """Keys and values are 8-bit and symmetric: the NPU multiplies 16 by 8 bits, and an empty cache is code 128."""
    for value in graph.ends:
        grid = (graph.grids or {}).get(value.name)
        if CACHE.fullmatch(value.name) and grid and not grid.floating and (grid.bits, grid.offset) != (8, -128):
            yield value.name, f"its grid is {grid}"


@rule("kv-tie", "error", "zoo: _tie_quantizers_for_kv_cache", "give past_*_in the encoding of past_*_out")
def kv_tie(graph: GraphFolder):
    """What goes out comes in again as it is, in codes: both have one grid."""
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    for key, value in came.items():
        a, b = (graph.standing.get(v.name) for v in (value, gone.get(key, value)))
        if a and b and a != b:
            yield value.name, f"it has {a}, but {gone[key].name} {b}"


@rule("matmul-16x16", "error", "ORT: (u8,u8), (u8,u16), (u16,u8)", "put the second operand (keys, values) on 8 bits")
def matmul_16x16(graph: GraphFolder):
    """A product of two activations has at most one of 16 bits."""
    for node in graph.graph.nodes:
        if node.op != "MatMul" or any(name in graph.constants for name in node.inputs):
            continue
        grids = [graph.standing.get(name) for name in node.inputs[:2]]
        if len(grids) == 2 and all(grid and not grid.floating and grid.bits > 8 for grid in grids):
            yield (node.outputs or [node.name])[0], "both operands have more than 8 bits"


# All graphs together.


@rule(
    "encodings-file",
    "error",
    "zoo: one for each part",
    "write model.encodings for each graph, or for none",
    of_all=True,
)
def encodings_file(graphs: list[GraphFolder]):
    """Either every graph has encodings or none has."""
    lacking = [graph for graph in graphs if graph.grids is None]
    if len(lacking) < len(graphs):
        yield from ((graph, "", f"it has no .encodings, {len(graphs) - len(lacking)} others have") for graph in lacking)


@rule("chain", "error", "zoo: split_onnx", "export all parts in one go", of_all=True)
def chain(graphs: list[GraphFolder]):
    """Parts 1 to N are all there; each reads what the one before gives, and has the layers that come next."""
    for run in _runs(graphs):
        numbers, totals = [part.called[3] for part in run], {part.called[4] for part in run}  # type: ignore[index]
        if len(totals) > 1 or numbers != list(range(1, max(totals) + 1)):
            yield run[0], "", f"there are parts {at_most(numbers, 12)} of {at_most(sorted(totals))}"
            continue
        if run[0].reads and run[0].reads.name not in STARTS:
            yield run[0], run[0].reads.name, f"part 1 reads it, expected {STARTS[0]}"
        if run[-1].gives and run[-1].gives.name != "logits":
            yield run[-1], run[-1].gives.name, "the last part gives it, expected logits"
        for giver, taker in pairwise(run):
            a, b = giver.gives, taker.reads
            if a and b and sanitized(a.name) != sanitized(b.name):
                yield taker, b.name, f"{giver.name} gives {_readable(a.name)} instead"
            elif a and b and (a.shape, a.dtype) != (b.shape, b.dtype):
                yield taker, b.name, f"its shape is {b.shape}, but {giver.name} gives {a.shape}"
        layers = [layer for part in run for layer in sorted({layer for layer, _ in part.cache(part.graph.inputs)})]
        if layers != list(range(len(layers))):
            wrong = next(place for place, layer in enumerate(layers) if place != layer)
            yield run[0], "", f"the parts have layer {layers[wrong]} where {wrong} comes next"


@rule(
    "encodings-boundary",
    "error",
    "zoo 0.65: 'Non-identical quantization parameters'",
    "copy the giver's encoding",
    of_all=True,
)
def encodings_boundary(graphs: list[GraphFolder]):
    """Both sides of a boundary have the same grid, number for number."""
    for run in _runs(graphs):
        for giver, taker in pairwise(run):
            if giver.gives and taker.reads and sanitized(giver.gives.name) == sanitized(taker.reads.name):
                a, b = giver.standing.get(giver.gives.name), taker.standing.get(taker.reads.name)
                if a and b and a != b:
                    yield taker, taker.reads.name, f"it has {b}, but {giver.name} gives {a}"


@rule(
    "encodings-graphs",
    "error",
    "zoo: one quantizer for both",
    "calibrate once, and write one set for both graphs",
    of_all=True,
)
def encodings_graphs(graphs: list[GraphFolder]):
    """Prompt and token graphs share weights and cache: inputs, outputs and weights have one grid in both."""
    for first, other in _siblings(graphs):
        shared = {value.name for value in first.ends} | {tensor.name for tensor in first.graph.initializers}
        for name in shared & set(first.grids or ()) & set(other.grids or ()):
            a, b = (first.grids or {})[name], (other.grids or {})[name]
            if a != b:
                yield other, name, f"it has {b}, but in {first.name} {a}"


@rule(
    "shared-weights",
    "error",
    "zoo: link job, weight_sharing_enabled",
    "export both graphs of a part from one model",
    of_all=True,
)
def shared_weights(graphs: list[GraphFolder]):
    """A part's graphs have the same weights at the same places, so that linking keeps one copy."""
    for first, other in _siblings(graphs):
        files = [graph.of_kind(".data")[:1] for graph in (first, other)]
        places: list[dict] = [
            {t.name: (t.dtype, t.dims, t.external) for t in graph.graph.initializers if t.external is not None}
            for graph in (first, other)
        ]
        differ = sorted(name for name in {**places[0], **places[1]} if places[0].get(name) != places[1].get(name))
        for name in differ:
            yield other, name, f"it is another, or elsewhere, than in {first.name}"
        if not differ and all(files) and not _alike(files[0][0], files[1][0]):
            yield other, files[1][0].name, f"it is not the file of {first.name}"


def sanitized(name: str) -> str:
    """A tensor's name as the compiler writes it."""
    return name.replace("/", "_").replace(".", "_")


def _runs(graphs: list[GraphFolder]) -> Iterator[list[GraphFolder]]:
    """The graphs that follow one another, part after part, of each length and context; one alone is no run."""
    runs: dict[tuple, list[GraphFolder]] = {}
    for graph in graphs:
        if graph.called:
            runs.setdefault(graph.called[:3], []).append(graph)
    for run in runs.values():
        if len(graphs) > 1:
            yield sorted(run, key=lambda part: part.called[3])  # type: ignore[index]


def _siblings(graphs: list[GraphFolder]) -> Iterator[tuple[GraphFolder, GraphFolder]]:
    """The graphs of each part, the first of them with each other one."""
    parts: dict[tuple[int, int], list[GraphFolder]] = {}
    for graph in graphs:
        if graph.called:
            parts.setdefault(graph.called[3:], []).append(graph)
    for first, *others in parts.values():
        yield from ((first, other) for other in others)


def _alike(a: Path, b: Path) -> bool:
    """Whether two files have the same size, and the same bytes at SAMPLES places; weights are not read."""
    sizes = a.stat().st_size, b.stat().st_size
    if sizes[0] != sizes[1]:
        return False
    if os.path.samefile(a, b):
        return True
    with open(a, "rb") as one, open(b, "rb") as other:
        for place in range(SAMPLES):
            offset = max(sizes[0] - SAMPLE_BYTES, 0) * place // (SAMPLES - 1)
            one.seek(offset)
            other.seek(offset)
            if one.read(SAMPLE_BYTES) != other.read(SAMPLE_BYTES):
                return False
    return True
