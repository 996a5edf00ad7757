"""A catalogue of what goes wrong between a model and its answers on a device, each fault as code.

A row says what happens in the field, where the error begins and what its cause should be called. It also does it: to
the graphs (`edit`), to what the host feeds them (`feed`), or to what came back (`answer`). The device is the emitted
graph itself, run by an engine on this machine: on grids, with QuantizeLinear and DequantizeLinear around each value, or
in floats. So a fault is an ordinary right run in which one thing was changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from conftest import write_checkpoint
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

import refimpl
from export import emit
from export.graphs.plan import Way, carry
from export.measure.references import References
from export.verdict.trial import Given, judge
from export.verdict.verdict import Verdict
from refimpl.grids.calibrate import calibrate
from refimpl.grids.recipe import Recipe
from refimpl.positions import rope_tables

TOKENS, CONTEXT, PARTS, BLOCK = (12, 1), 16, 3, 16
GRAPH = "{}_cl16_{}_of_{}"  # the embedding; layer 0; layer 1 and the head. Or, of two, both layers and the head
LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
PROMPT, TOKEN = "prompt_ar12", "token_ar1"


class Graph:
    """An emitted graph that is to be changed. Taps are called as ever; what is on a grid was computed as `.raw`."""

    def __init__(self, proto: onnx.ModelProto, world: World):
        self.proto, self.world = onnx.ModelProto(), world
        self.proto.CopyFrom(proto)
        self.graph = self.proto.graph

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(next(i for i in self.graph.initializer if i.name == name))

    def put(self, name: str, array: np.ndarray) -> str:
        """Sets an initializer."""
        for old in [i for i in self.graph.initializer if i.name == name]:
            self.graph.initializer.remove(old)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def maker(self, value: str) -> int:
        """The place of the node that gives a value."""
        return next(i for i, node in enumerate(self.graph.node) if value in node.output)

    def raw(self, tap: str) -> str:
        """What a tap is before it is put on its grid."""
        names = {name for node in self.graph.node for name in node.output}
        return f"{tap}.raw" if f"{tap}.raw" in names else tap

    def then(self, value: str, *steps: tuple) -> None:
        """Goes on with what steps make of a value: each (op, inputs, attributes), of which "@" is the value so far."""
        value = self.raw(value)
        at = self.maker(value)
        node = self.graph.node[at]
        last = f"{value}.right"
        node.output[list(node.output).index(value)] = last
        for i, (op, inputs, attributes) in enumerate(steps):
            made = value if i == len(steps) - 1 else f"{value}.wrong_{i}"
            given = [last if name == "@" else name for name in inputs]
            self.graph.node.insert(at + 1 + i, helper.make_node(op, given, [made], **attributes))
            last = made

    def instead(self, value: str, other: str, op: str = "Identity", **attributes) -> None:
        """Goes on with another value in its place, or what one operation makes of that."""
        self.then(value, (op, [other], attributes))

    def times(self, value: str, factor: Any) -> None:
        """Multiplies a value."""
        self.then(value, ("Mul", ["@", self.put(f"{value}.factor", np.asarray(factor, np.float32))], {}))

    def gathered(self, value: str, order: np.ndarray, axis: int) -> None:
        """Puts a value in another order along an axis."""
        self.then(value, ("Gather", ["@", self.put(f"{value}.order", np.asarray(order))], {"axis": axis}))

    def feeding(self, value: str, op: str, *inputs: str, ops=("MatMul", "Split", "Reshape"), **attributes) -> None:
        """Gives those who read a value, if they are of these kinds, what an operation makes of it."""
        at = self.maker(value)
        for node in self.graph.node:
            if node.op_type in ops:
                node.input[:] = [f"{value}.wrong" if name == value else name for name in node.input]
        self.graph.node.insert(at + 1, helper.make_node(op, [value, *inputs], [f"{value}.wrong"], **attributes))

    def weight(self, name: str, change: Callable[..., np.ndarray]) -> None:
        """Another matrix: `change` has the codes and the steps of blocks, or of rows; or the floats."""
        made = f"{name}.weight"
        initializers = {i.name for i in self.graph.initializer}
        if made in initializers:
            self.put(made, change(self.array(made)).astype(np.float32))
            return
        codes, steps = self.array(f"{made}.codes").astype(np.int64), self.array(f"{made}.scales").astype(np.float64)
        del self.graph.node[self.maker(made)]
        self.put(made, change(codes, steps).astype(np.float32))

    @property
    def weights(self) -> list[str]:
        """The matrices on grids."""
        return [
            i.name.removesuffix(".weight.codes")
            for i in self.graph.initializer
            if i.name.endswith(".weight.codes") and len(i.dims) == 2
        ]


def times(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Codes by the steps of their rows, or blocks."""
    steps = steps.reshape(len(steps), -1) if steps.ndim else steps.reshape(1, 1)
    return codes * np.repeat(steps, codes.shape[1] // steps.shape[1], 1)


@dataclass(frozen=True)
class Fault:
    """A row of the catalogue.

    `where`: the tap at which it begins, and others that are wrong by themselves; `graph`: the number of its graph.
    `cause`: its names in the table of causes, any of which is right, and `says`, what the text has to contain.
    `setting`: of which device; `runs`: in the graphs that read the prompt, or the token.
    """

    name: str
    field: str
    graph: int
    where: tuple[str, ...]
    cause: tuple[str, ...]
    says: str = ""
    setting: str = "grids"
    runs: tuple[str, ...] = (PROMPT, TOKEN)
    edit: Callable[[Graph], None] | None = None
    feed: Callable[[World, Any, dict], dict] | None = None
    answer: Callable[[World, Any, dict], None] | None = None


# The settings


SETTINGS = {
    "grids": ("Baichuan2-7B", True, "as a quantized device"),
    "float": ("Baichuan2-7B", False, "in floats"),
    "firm": ("Baichuan2-7B", False, "in floats, with attention scores of a hundred"),
    "loud": ("Baichuan2-7B", False, "in floats, with attention scores of thousands"),
    "quiet": ("Baichuan2-7B", False, "in floats, with an embedding of a thousandth"),
    "ALiBi": ("Baichuan2-13B", False, "in floats, 13B"),
    "GQA": ("Qwen2-7B", False, "in floats, Qwen2"),
    "GQA on grids": ("Qwen2-7B", True, "Qwen2 as a quantized device"),
    "ALiBi on grids": ("Baichuan2-13B", True, "13B as a quantized device"),
}


@dataclass
class World:
    """A model of one setting, its export and the graphs that stand for the device, which show all of their taps."""

    folder: Path
    setting: str = "grids"
    seed: int = 0
    prompt: int | None = None  # seed of other ids than the embedded line
    engine: str = "onnxruntime"
    threads: int = 1
    parts: int = PARTS
    _healthy: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        family, grids, _ = SETTINGS[self.setting]
        source = write_checkpoint(self.folder / "model", family, self.seed)
        self._adjust(source)
        self.model = refimpl.load(source)
        rng = np.random.default_rng(self.seed)
        vocabulary = self.model.config.vocab_size
        ids = None if self.prompt is None else np.random.default_rng(self.prompt).integers(0, vocabulary, 9)
        self.encodings = None
        if grids:
            text = rng.integers(0, vocabulary, 240)
            recipe = Recipe(block_size=BLOCK)
            self.encodings = calibrate(self.model, text, recipe, window=CONTEXT)
        common: dict[str, Any] = {
            "tokens": TOKENS,
            "context": CONTEXT,
            "parts": self.parts,
            "prompt": ids if ids is None else ids.tolist(),
        }
        self.export = emit(self.model, **common).save(self.folder / "export")
        shown = {"profile": "qdq", "encodings": self.encodings} if grids else {}
        device = emit(self.model, probe="*", **common, **shown).save(self.folder / "device", golden=False)
        self.references = References(self.export, self.model, self.encodings)
        self.specs = self.references.specs
        self.protos = {name: onnx.load(device / name / "model.onnx") for name in self.specs}

    def graph(self, run: str, number: int) -> str:
        """The name of a graph of the prompt or of the token, by its number in three parts."""
        return GRAPH.format(run, min(number, self.parts), self.parts)

    def graphs(self, fault: Fault) -> list[str]:
        """Those that a fault is in."""
        return [self.graph(run, fault.graph) for run in fault.runs]

    def _adjust(self, source: Path) -> None:
        if self.setting not in ("firm", "loud", "quiet"):
            return
        tensors = load_file(source / "model.safetensors")
        if self.setting == "quiet":
            tensors["model.embed_tokens.weight"] *= np.float32(1e-2)
        else:
            for name in tensors:
                if name.endswith("W_pack.weight"):
                    rows = tensors[name].shape[0] // 3
                    tensors[name][: 2 * rows] *= np.float32(96 if self.setting == "loud" else 6)
        save_file(tensors, source / "model.safetensors")

    def compute(self, graph: Graph | str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What an engine makes of a graph's inputs: all of its outputs and taps."""
        proto = self.protos[graph] if isinstance(graph, str) else graph.proto
        names = [value.name for value in proto.graph.output]
        return dict(zip(names, self._opened(proto)(names, inputs), strict=True))

    def _opened(self, proto: onnx.ModelProto) -> Callable:
        if self.engine == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = self.threads, 3
            return onnxruntime.InferenceSession(proto.SerializeToString(), options).run
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(proto).run

    @cached_property
    def healthy(self) -> dict[str, dict[str, np.ndarray]]:
        """What the device answers to golden inputs, if nothing is wrong."""
        return {name: self.compute(name, self.references.inputs(spec)) for name, spec in self.specs.items()}

    def faulty(self, fault: Fault) -> dict[str, dict[str, np.ndarray]]:
        """What it answers with a fault."""
        mended = {name: dict(arrays) for name, arrays in self.healthy.items() if name not in self.graphs(fault)}
        return mended | {name: self._answer(name, self.references.inputs(self.specs[name]), fault)
                         for name in self.graphs(fault)}  # fmt: skip

    def chained(self, fault: Fault | None = None) -> dict[str, dict[str, np.ndarray]]:
        """What it answers, healthy or not, when each graph is given what those before it gave."""
        answers: dict[str, dict[str, np.ndarray]] = {}
        after_prompt: dict[str, np.ndarray] = {}
        for run in self.references.plan.runs:
            flow = dict(after_prompt)
            for spec in run:
                linked = {v.name: carry(spec, v, flow) for v in spec.inputs if v.source}
                answers[spec.name] = self._answer(spec.name, self.references.inputs(spec) | linked, fault)
                flow |= answers[spec.name]
            after_prompt = after_prompt or flow
        return answers

    def _answer(self, name: str, inputs: dict[str, np.ndarray], fault: Fault | None) -> dict[str, np.ndarray]:
        spec, graph = self.specs[name], Graph(self.protos[name], self)
        if fault is None or name not in self.graphs(fault):
            return self.compute(graph, inputs)
        if fault.edit:
            fault.edit(graph)
        if fault.feed:
            wrong = fault.feed(self, spec, dict(inputs))
            inputs = {name: np.ascontiguousarray(x, inputs[name].dtype) for name, x in wrong.items()}
        outputs = self.compute(graph, inputs)
        if fault.answer:
            fault.answer(self, spec, outputs)
        return outputs

    def step(self, tap: str) -> float:
        """Of its grid, 0 if it has none."""
        grid = self.references.grids.get(tap)
        return float(grid.scale) if grid else 0.0

    def judged(self, answers: dict[str, dict[str, np.ndarray]], probes: bool = True, way: Way = "isolated") -> Verdict:
        """The verdict on all taps, or on what parts give."""
        if not probes:
            outputs = {name: {value.name for value in spec.outputs} for name, spec in self.specs.items()}
            answers = {g: {n: x for n, x in arrays.items() if n in outputs[g]} for g, arrays in answers.items()}
        return judge(self.export, Given(answers, way), self.model, self.encodings)


@dataclass(frozen=True)
class Outcome:
    """What the verdict said of a fault: whether it was found, where it was looked for, and what it was called.

    `graph`: the first that it is in.
    """

    fault: Fault
    verdict: Verdict
    probes: bool
    graph: str

    @property
    def detected(self) -> bool:
        return not self.verdict

    @property
    def localised(self) -> bool:
        """To the operation; of outputs alone, to operations between two outputs among which it is."""
        guilty = self.verdict.guilty
        if guilty is None or guilty.graph != self.graph:
            return False
        return (
            guilty.tap == self.fault.where[0]
            if self.probes
            else any(tap in self.verdict.suspects for tap in self.fault.where)
        )

    @property
    def named(self) -> bool:
        cause = self.verdict.causes.get(self.verdict.guilty.name) if self.verdict.guilty else None
        return cause is not None and cause.name in self.fault.cause and self.fault.says in cause.text


def tried(world: World, fault: Fault, probes: bool = True, way: Way = "isolated") -> Outcome:
    """A fault, judged."""
    answers = world.faulty(fault) if way == "isolated" else world.chained(fault)
    return Outcome(fault, world.judged(answers, probes, way), probes, world.graphs(fault)[0])


# The catalogue

FAULTS: list[Fault] = []


def fault(
    name: str,
    text: str,
    where: str | tuple[str, ...],
    cause: str | tuple[str, ...],
    says: str = "",
    graph: int = 2,
    **more: Any,
):
    """Adds a row."""
    where, cause = ((x,) if isinstance(x, str) else x for x in (where, cause))
    FAULTS.append(Fault(name, text, graph, where, cause, says, **more))


def relabelled(g: Graph, name: str) -> np.ndarray:
    """A parameter of the model, as it was read."""
    return g.world.model.weights[name].array


def head_lengths(g: Graph) -> np.ndarray:
    return np.linalg.norm(relabelled(g, "lm_head.weight"), axis=1, keepdims=True)


def exchange_weights(g: Graph, one: str, other: str) -> None:
    for kind in ("codes", "scales"):
        a, b = (f"{name}.weight.{kind}" for name in (one, other))
        left, right = (next(i for i in g.graph.initializer if i.name == name) for name in (a, b))
        left.name, right.name = b, a


def epsilon(g: Graph, value: float) -> None:
    for i in list(g.graph.initializer):
        if not i.dims and i.data_type == 1 and abs(float(numpy_helper.to_array(i)) - 1e-6) < 1e-9:
            g.put(i.name, np.float32(value))


def by_turns(g: Graph) -> None:
    """Of 4 heads with 2 keys, 0 and 2 take the first, 1 and 3 the second."""
    order = np.array([0, 2, 1, 3])
    g.put("turns", order)
    for tap in (QUERY, PROBS):
        g.feeding(tap, "Gather", "turns", axis=1)
    g.gathered(SCORES, order, 1)
    g.gathered(f"{ATTENTION}.context", np.arange(64).reshape(4, 16)[order].ravel(), 2)


def interleave(g: Graph) -> None:
    order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
    g.put("pairs", order)
    for node in [node for node in g.graph.node if node.op_type == "Split"]:
        g.feeding(node.input[0], "Gather", "pairs", ops=("Split",), axis=3)
    for tap in (QUERY, f"{ATTENTION}.key"):
        g.gathered(tap, np.argsort(order), 3)


def overflow(g: Graph) -> None:
    """The product of queries and keys in float16."""
    before = g.graph.node[g.maker(SCORES)]
    while before.op_type != "MatMul":
        before = g.graph.node[g.maker(before.input[0])]
    g.then(before.output[0], ("Cast", ["@"], {"to": 10}), ("Cast", ["@"], {"to": 1}))


def reads(g: Graph, tap: str) -> onnx.NodeProto:
    """The node that turns the codes of a tap into values."""
    return g.graph.node[g.maker(tap)]


def read_as(g: Graph, tap: str, other: str) -> None:
    reads(g, tap).input[1:] = [f"{other}.scale", f"{other}.zero_point"]


def zero_moved(g: Graph, tap: str, codes: int) -> None:
    right = g.array(f"{tap}.zero_point")
    reads(g, tap).input[2] = g.put(f"{tap}.zero_point.wrong", (right.astype(int) - codes).astype(right.dtype))


def eight_bits(g: Graph, tap: str) -> None:
    scale, zero = g.array(f"{tap}.scale"), g.array(f"{tap}.zero_point")
    g.put(f"{tap}.scale", np.float32(scale * 257))
    g.put(f"{tap}.zero_point", np.round(zero / 257).astype(np.uint8))
    for info in [info for info in g.graph.value_info if info.name == f"{tap}.codes"]:
        g.graph.value_info.remove(info)


def slot(x: np.ndarray, axis: int, at: int, change: Callable) -> np.ndarray:
    """A cache of which one slot is another."""
    x = x.copy()
    slots = np.moveaxis(x, axis, 0)
    slots[at] = change(slots[at].copy())
    return x


def cut_to_bfloat16(w: np.ndarray) -> np.ndarray:
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


QUERY, PROBS, SCORES = f"{ATTENTION}.query", f"{ATTENTION}.probs", f"{ATTENTION}.scores"
TURNED = QUERY, f"{ATTENTION}.key"


# Weights: what a converter or a packer gets wrong

fault("nibble order", "the two codes of a byte are unpacked in the other order", f"{ATTENTION}.W_pack",
      "weights", "nibbles", edit=lambda g: [g.weight(name, lambda c, s: times(c.reshape(len(c), -1, 2)[...,
      ::-1].reshape(c.shape), s)) for name in g.weights ])  # fmt: skip
fault("int4 signedness", "signed 4-bit codes are read as unsigned", f"{MLP}.gate_proj", "weights", "sign",
      edit=lambda g: g.weight(f"{MLP}.gate_proj", lambda c, s: times(c & 15, s)))  # fmt: skip
fault("int4 offset read as sign", "codes about 8 are read as two's complement", f"{MLP}.up_proj",
      "weights", "sign", edit=lambda g: g.weight(f"{MLP}.up_proj", lambda c, s: times(((c + 16) & 15) - 8,
      s)))  # fmt: skip
fault("int8 head read as uint8", "the head's signed codes are read as unsigned", "lm_head", "weights",
      "sign", graph=3, edit=lambda g: g.weight("lm_head", lambda c, s: times(c & 255, s)))  # fmt: skip
fault("block axis", "blocks run along the outputs, not along the inputs", f"{ATTENTION}.o_proj", "weights",
      "axis", edit=lambda g: g.weight(f"{ATTENTION}.o_proj", lambda c,
      s: c * np.repeat(s.reshape(len(c) // BLOCK, -1), BLOCK, 0)))  # fmt: skip
fault("scales transposed", "scales of blocks are stored block by block, not row by row", f"{MLP}.up_proj",
      "weights", "transposed", edit=lambda g: g.weight(f"{MLP}.up_proj", lambda c, s: times(c,
      s.reshape(s.shape[::-1]).T)))  # fmt: skip
fault("weight zero point + 1", "the zero point of weights is one too low", f"{MLP}.down_proj", "weights",
      "zero point", edit=lambda g: g.weight(f"{MLP}.down_proj", lambda c, s: times(c + 1, s)))  # fmt: skip
fault("weight zero point - 1", "the zero point of weights is one too high", f"{MLP}.gate_proj", "weights",
      "zero point", edit=lambda g: g.weight(f"{MLP}.gate_proj", lambda c, s: times(c - 1, s)))  # fmt: skip
fault("scales of other channels", "scales of rows are in another order than the rows", f"{MLP}.gate_proj",
      "weights", "scales", edit=lambda g: g.weight(f"{MLP}.gate_proj", lambda c, s: times(c, np.roll(s, 1,
      0))))  # fmt: skip
fault("per-channel scales permuted", "scales of the head's rows are shuffled", "lm_head", ("scales",
      "weights"), "scales", graph=3, edit=lambda g: g.weight("lm_head", lambda c, s: times(c,
      s[np.random.default_rng(1).permutation(len(s))])))  # fmt: skip
fault("weight transposed", "a square matrix is stored as its transpose", f"{ATTENTION}.o_proj", "weights",
      "transposed", edit=lambda g: g.weight(f"{ATTENTION}.o_proj", lambda c, s: times(c, s).T))  # fmt: skip
fault("bfloat16 truncated", "weights were cut to bfloat16, not rounded", f"{ATTENTION}.W_pack", "weights",
      "cut", setting="float", edit=lambda g: g.weight(f"{ATTENTION}.W_pack", cut_to_bfloat16))  # fmt: skip
fault("weights of another layer", "a name was matched to the wrong layer", f"{MLP}.down_proj", "weights",
      "layer 1", setting="float", edit=lambda g: g.weight(f"{MLP}.down_proj", lambda w: relabelled(g,
      "model.layers.1.mlp.down_proj.weight")))  # fmt: skip
fault("stale weights file", "the weights are those of an earlier export", f"{MLP}.gate_proj", "weights",
      "other weights", edit=lambda g: g.weight(f"{MLP}.gate_proj", lambda c,
      s: times(np.random.default_rng(5).permuted(c, axis=1), s)))  # fmt: skip
fault("q, k, v order", "W_pack was taken for k, q, v", f"{ATTENTION}.W_pack", "weights", "order",
      setting="float", edit=lambda g: g.weight(f"{ATTENTION}.W_pack", lambda w: w.reshape(3, -1,
      w.shape[1])[[1, 0, 2]].reshape(w.shape)))  # fmt: skip
fault("q, k, v by heads", "W_pack's rows were taken for heads of q, k, v in turn", f"{ATTENTION}.W_pack",
      "weights", "order", setting="float", edit=lambda g: g.weight(f"{ATTENTION}.W_pack",
      lambda w: w.reshape(3, 4, -1, w.shape[1]).swapaxes(0, 1).reshape(w.shape)))  # fmt: skip
fault("head rows permuted", "the head's rows are in another order than the vocabulary", "lm_head",
      "channels", "order", graph=3, edit=lambda g: g.weight("lm_head", lambda c, s: times(c,
      s)[np.random.default_rng(2).permutation(len(c))]))  # fmt: skip
fault("head rows off by one", "the head has a row too many at its start", "lm_head", "channels", "further",
      graph=3, edit=lambda g: g.weight("lm_head", lambda c, s: np.roll(times(c, s), 1, 0)))  # fmt: skip
fault("NormHead missing", "the head's rows are not normalised", "lm_head", "NormHead missing", graph=3,
      setting="float", edit=lambda g: g.weight("lm_head", lambda w: w * head_lengths(g)))  # fmt: skip
fault("NormHead twice", "the head's rows are divided by their length twice", "lm_head", "NormHead missing",
      "twice", graph=3, setting="float", edit=lambda g: g.weight("lm_head", lambda w: w / head_lengths(g)))  # fmt: skip
fault("gate and up exchanged", "the two halves of the MLP have each other's weights", f"{MLP}.gate_proj",
      ("architecture", "names swapped"), "up_proj", edit=lambda g: exchange_weights(g, f"{MLP}.gate_proj",
      f"{MLP}.up_proj"))  # fmt: skip
fault("qkv bias dropped", "Qwen2's biases are not added", tuple(f"{ATTENTION}.{n}_proj" for n in "qkv"),
      "weights", "bias", setting="GQA", edit=lambda g: [g.put(f"{ATTENTION}.{n}_proj.bias",
      g.array(f"{ATTENTION}.{n}_proj.bias") * 0) for n in "qkv"])  # fmt: skip
fault("norm gain dropped", "RMSNorm's gain is one", f"{LAYER}.post_attention_layernorm", "architecture",
      "gain", setting="float", edit=lambda g: g.put(f"{LAYER}.post_attention_layernorm.weight", np.ones(64,
      np.float32)))  # fmt: skip
fault("embedding row off by one", "the table has a row too many at its start", "model.embed_tokens",
      "embedding", "one", graph=1, edit=lambda g: g.put("model.embed_tokens.weight.codes",
      np.roll(g.array("model.embed_tokens.weight.codes"), 1, 0)))  # fmt: skip
fault("parts exchanged", "this graph has the weights of the next layer", f"{LAYER}.input_layernorm",
      ("parts exchanged", "weights"), "layer 1", setting="float", edit=lambda g: [g.put(i.name,
      relabelled(g, i.name.replace("layers.0",
      "layers.1"))) for i in list(g.graph.initializer) if i.name.startswith(LAYER) ])  # fmt: skip


# Operations: what a compiler does to the graph

fault("residual dropped", "attention is not added to the stream", f"{LAYER}.attention_residual",
      "architecture", "residual", edit=lambda g: g.instead(f"{LAYER}.attention_residual",
      f"{ATTENTION}.o_proj"))  # fmt: skip
fault("second residual dropped", "the MLP is not added to the stream", LAYER, "architecture", "residual",
      edit=lambda g: g.instead(LAYER, f"{MLP}.down_proj"))  # fmt: skip
fault("GELU for SiLU", "another activation", f"{MLP}.act_fn", "architecture", "GELU", setting="float",
      edit=lambda g: g.instead(f"{MLP}.act_fn", f"{MLP}.gate_proj", "Gelu", approximate="tanh"))  # fmt: skip
fault("ReLU for SiLU", "another activation", f"{MLP}.act_fn", "architecture", "ReLU",
      edit=lambda g: g.instead(f"{MLP}.act_fn", f"{MLP}.gate_proj", "Relu"))  # fmt: skip
fault("gate without up", "the product of the MLP is dropped", f"{MLP}.product", "architecture", "product",
      edit=lambda g: g.instead(f"{MLP}.product", f"{MLP}.act_fn"))  # fmt: skip
fault("epsilon 1e-5 for 1e-6", "RMSNorm's epsilon is that of another family", f"{LAYER}.input_layernorm",
      "architecture", "epsilon", setting="quiet", edit=lambda g: epsilon(g, 1e-5))  # fmt: skip
fault("LayerNorm for RMSNorm", "the mean is subtracted", f"{LAYER}.input_layernorm", "architecture",
      "mean", setting="float", edit=lambda g: g.then(f"{LAYER}.input_layernorm", ("LayerNormalization",
      ["model.embed_tokens", f"{LAYER}.input_layernorm.weight"], {"axis": -1, "epsilon": 1e-6})))  # fmt: skip
fault("attention scale missing", "scores are not divided", f"{ATTENTION}.scores", ("architecture",
      "scale"), "4", setting="float", edit=lambda g: g.times(SCORES, 4))  # fmt: skip
fault("attention scale twice", "scores are divided twice", f"{ATTENTION}.scores", ("architecture",
      "scale"), "0.25", edit=lambda g: g.times(SCORES, 0.25))  # fmt: skip
fault("GQA head mapping", "query heads take key heads by turns", f"{ATTENTION}.scores", "architecture",
      "turns", setting="GQA", edit=lambda g: by_turns(g))  # fmt: skip
fault("one head zeroed", "a head was lost when heads were split", f"{ATTENTION}.context", ("zeros",
      "architecture"), "head 1", edit=lambda g: g.times(f"{ATTENTION}.context", np.repeat([1, 0, 1, 1],
      16)))  # fmt: skip
fault("heads concatenated in another order",
      "heads come together in the order in which they were computed", f"{ATTENTION}.context", ("channels",
      "heads permuted"), "order", edit=lambda g: g.gathered(f"{ATTENTION}.context",
      np.arange(64).reshape(4, 16)[[1, 0, 3, 2]].ravel(), 2))  # fmt: skip
fault("softmax in float16", "softmax has less precision than the graph", f"{ATTENTION}.probs", "dtype",
      "float16", setting="float", edit=lambda g: g.then(f"{ATTENTION}.probs", ("Cast", ["@"], {"to": 10}),
      ("Cast", ["@"], {"to": 1})))  # fmt: skip
fault("float16 overflow in scores", "q k does not fit float16 before it is divided", f"{ATTENTION}.scores",
      "not finite", "65504", setting="loud", edit=lambda g: overflow(g))  # fmt: skip
fault("RoPE pairs interleaved", "neighbours are turned, not halves", TURNED, "RoPE", "interleaved",
      edit=lambda g: interleave(g))  # fmt: skip
fault("NaN in one place", "one feature is NaN", f"{MLP}.product", "not finite", "NaN",
      edit=lambda g: g.times(f"{MLP}.product", np.where(np.arange(128) == 3, np.nan, 1)), setting="float")  # fmt: skip
fault("final norm missing", "the head reads the stream as it is", "model.norm", "architecture", "missing",
      graph=3, setting="float", edit=lambda g: g.instead("model.norm", "model.layers.1"))  # fmt: skip

# Grids: what a quantizer gets wrong

fault("range too small", "the range of an activation is a quarter of what it should be",
      f"{MLP}.gate_proj", "saturation", edit=lambda g: g.put(f"{MLP}.gate_proj.scale",
      g.array(f"{MLP}.gate_proj.scale") / 4))  # fmt: skip
fault("scale of another tensor", "codes are read with the step of another activation", f"{MLP}.down_proj",
      "encoding", "another tensor", edit=lambda g: read_as(g, f"{MLP}.down_proj", f"{MLP}.up_proj"))  # fmt: skip
fault("8 bits for 16", "an activation has 8 bits", f"{MLP}.product", "dtype", "8",
      edit=lambda g: eight_bits(g, f"{MLP}.product"))  # fmt: skip
fault("zero point of keys + 1", "keys are a code too high", f"{ATTENTION}.key", "zero point", "code",
      edit=lambda g: zero_moved(g, f"{ATTENTION}.key", 1))  # fmt: skip
fault("zero point of values - 1", "values are a code too low", f"{ATTENTION}.value", "zero point", "code",
      edit=lambda g: zero_moved(g, f"{ATTENTION}.value", -1))  # fmt: skip
fault("zero point in 16 bits + 1", "one code in 65536", f"{LAYER}.input_layernorm", "zero point", "code",
      edit=lambda g: zero_moved(g, f"{LAYER}.input_layernorm", 1))  # fmt: skip


# Of the host: mask, positions, cache


def tables(base=1e4, by=0, pairs: Callable = lambda c, s: (c, s)):
    def change(world, spec, inputs):
        if "position_ids_cos" not in inputs:
            return inputs
        positions = np.maximum(spec.past - (spec.tokens - spec.real) + np.arange(spec.tokens)[None] + by, 0)
        cos, sin = pairs(*rope_tables(positions, spec.config.head_dim, base, np.float64))
        return {**inputs, "position_ids_cos": cos, "position_ids_sin": sin}

    return change


def masks(change: Callable):
    """Another mask: of whether a place is seen (T, S), its queries and keys, and the lowest number."""

    def feed(world, spec, inputs):
        right = inputs["attention_mask"]
        low = right.min()
        seen = right[0, :1] > low / 2
        queries = np.arange(spec.context - spec.tokens, spec.context)[:, None]
        return {
            **inputs,
            "attention_mask": np.broadcast_to(change(seen, queries, np.arange(spec.context)[None], low), right.shape),
        }

    return feed


def cached(change: Callable, which: str = "past_"):
    """Another past: of a tensor, its axis of slots, and the spec."""
    return lambda world, spec, inputs: {
        n: change(x, 3 if "key" in n else 2, spec) if n.startswith(which) else x for n, x in inputs.items()
    }


late = {"runs": (TOKEN,)}
fault("RoPE base 1e6", "theta of another family", TURNED, "RoPE", "1e+06", feed=tables(1e6))
fault("RoPE base 1e4 for 1e6", "theta of another family", TURNED, "RoPE", "10000", feed=tables(1e4),
      setting="GQA")  # fmt: skip
fault("positions off by one after the prompt", "the next chunk begins one too late", TURNED, "RoPE",
      "off by one", feed=tables(by=1), **late)  # fmt: skip
fault("positions count padding", "positions are places in the window", TURNED, "RoPE", "padding",
      feed=lambda world, spec, i: tables(by=spec.tokens - spec.real)(world, spec, i), runs=(PROMPT,))  # fmt: skip
fault("positions do not count the past", "each chunk begins at 0", TURNED, "RoPE", "past",
      feed=lambda world, spec, i: tables(by=-spec.past)(world, spec, i), **late)  # fmt: skip
fault("cos and sin exchanged", "the host feeds them in the other order", TURNED, "RoPE", "exchanged",
      feed=tables(pairs=lambda c, s: (s, c)))  # fmt: skip
fault("sin negated", "RoPE turns the other way", TURNED, "RoPE", "sign", feed=tables(pairs=lambda c, s: (c,
      -s)))  # fmt: skip
fault("RoPE missing", "the tables are those of position 0", TURNED, "RoPE", "missing",
      feed=tables(pairs=lambda c, s: (c * 0 + 1, s * 0)), runs=(PROMPT,))  # fmt: skip
fault("causal mask dropped", "tokens see later ones", PROBS, "mask", "causal", runs=(PROMPT,),
      feed=masks(lambda seen, q, k, low: np.where(seen.any(1, keepdims=True), 0, low)))  # fmt: skip
fault("mask inverted", "1 stands for hidden", PROBS, "mask", "inverted", setting="float",
      feed=masks(lambda seen, q, k, low: np.where(seen, low, 0)))  # fmt: skip
fault("mask of padding missing", "tokens see the padding", PROBS, "mask", "padding",
      feed=masks(lambda seen, q, k, low: np.where(k <= q, 0, low)))  # fmt: skip
fault("no mask", "everything is seen", PROBS, "mask", "no mask", setting="float", feed=masks(lambda seen,
      q, k, low: 0 * seen), runs=(PROMPT,))  # fmt: skip
fault("mask off by one", "a token does not see itself", PROBS, "mask", "off by one", setting="float",
      runs=(PROMPT,), feed=masks(lambda seen, q, k, low: np.where(seen & (k < q), 0, low)))  # fmt: skip
fault("mask of -50 leaks", "masked places have -50, and scores are larger", PROBS, "mask", "too weak",
      setting="firm", feed=masks(lambda seen, q, k, low: np.where(seen, 0, -50)))  # fmt: skip
fault("padding on the other side", "prompts are padded on the right, the mask on the left",
      "model.embed_tokens", ("padding side", "embedding"), "left", graph=1, runs=(PROMPT,),
      feed=lambda world, spec, i: {"input_ids": np.roll(i["input_ids"], -(spec.tokens - spec.real), 1)})  # fmt: skip
fault("ids one late", "the prompt is shifted by a token", "model.embed_tokens", ("shifted", "embedding"),
      "late", graph=1, runs=(PROMPT,), feed=lambda world, spec, i: {"input_ids": np.roll(i["input_ids"], 1,
      1)})  # fmt: skip
fault("ALiBi missing", "the bias is not in the mask", PROBS, "mask", "ALiBi", setting="ALiBi",
      feed=masks(lambda seen, q, k, low: np.where(seen, 0, low)))  # fmt: skip
fault("ALiBi slopes of another head count", "slopes of twice as many heads", PROBS, "mask", "slopes",
      setting="ALiBi", feed=lambda world, spec, i: {**i,
      "attention_mask": np.where(i["attention_mask"] > i["attention_mask"].min() / 2,
      i["attention_mask"] * np.float32([2, 4, 8, 16])[None, :, None, None], i["attention_mask"])})  # fmt: skip
fault("ALiBi heads reversed", "slopes begin with the flattest", PROBS, "mask", "slopes", setting="ALiBi",
      feed=lambda world, spec, i: {**i, "attention_mask": i["attention_mask"][:, ::-1]})  # fmt: skip
fault("one slot of the cache stale", "the newest keys and values were not written back", SCORES, "past",
      "slot", **late, feed=cached(lambda x, axis, s: slot(x, axis, -1, lambda old: 0 * old)))  # fmt: skip
fault("a slot holds its neighbour", "a slot was overwritten by the next", SCORES, "past", "slot 3", **late,
      feed=cached(lambda x, axis, s: slot(x, axis, -s.past + 3, lambda old: np.moveaxis(x, axis,
      0)[-s.past + 4])))  # fmt: skip
fault("cache left-aligned", "the past begins at slot 0", SCORES, "past", "", **late, feed=cached(lambda x,
      axis, s: np.roll(x, s.past, axis)))  # fmt: skip
fault("cache one slot late", "the past was moved once too often", SCORES, "past", "one slot", **late,
      feed=cached(lambda x, axis, s: np.roll(x, 1, axis)))  # fmt: skip
fault("past not handed on", "each call begins with an empty cache", SCORES, "past", "", **late,
      feed=cached(lambda x, axis, s: x * 0))  # fmt: skip
fault("past keys not transposed", "keys are fed as (slots, features)", SCORES, "past", "transposed",
      **late, feed=cached(lambda x, axis, s: x.swapaxes(2, 3).reshape(x.shape), "past_key"))  # fmt: skip
fault("past values transposed", "values are fed as (features, slots)", f"{ATTENTION}.context", "past",
      "transposed", **late, feed=cached(lambda x, axis, s: x.swapaxes(2, 3).reshape(x.shape),
      "past_value"))  # fmt: skip
fault("past keys and values exchanged", "the host feeds them in the other order", SCORES, "past",
      "exchanged", **late, feed=lambda world, spec, i: {n: i[n.replace("key", "?").replace("value",
      "key").replace("?", "value")].swapaxes(2, 3) if n.startswith("past") else x for n, x in i.items()})  # fmt: skip
fault("zero of past values 128 as 0", "codes of the cache are fed as if 0 stood for 0",
      f"{ATTENTION}.context", "past", "128 codes", **late, feed=lambda world, spec, i: {**i,
      "past_value_0_in": i["past_value_0_in"] + 128 * world.step(f"{ATTENTION}.value")})  # fmt: skip


# Of what came back


def exchanged(world, spec, outputs):
    """Keys under the name of values, and the other way round."""
    layer = spec.part.layers.start
    names = f"past_key_{layer}_out", f"past_value_{layer}_out"
    key, value = (outputs[name] for name in names)
    outputs[names[0]], outputs[names[1]] = (np.ascontiguousarray(x.swapaxes(2, 3)) for x in (value, key))


def changed(name: str, change: Callable):
    """Another output: of it, the spec, and the step of its grid."""

    def answer(world, spec, outputs):
        tap = next(value.tap for value in spec.outputs if value.name == name)
        outputs[name] = np.ascontiguousarray(change(outputs[name], spec, world.step(tap)), np.float32)

    return answer


def stale_logits(world, spec, outputs):
    outputs["logits"] = world.healthy[world.graph(PROMPT, 3)]["logits"][:, -1:]


fault("keys and values exchanged", "the names of two outputs are swapped", f"{ATTENTION}.key",
      "names swapped", "value", answer=exchanged)  # fmt: skip
fault("values transposed", "values came back as (features, tokens)", f"{ATTENTION}.value", "transposed",
      "layout", answer=changed("past_value_0_out", lambda x, s, step: x.swapaxes(2, 3).reshape(x.shape)),
      runs=(PROMPT,))  # fmt: skip
fault("keys not transposed", "keys came back as (tokens, features)", f"{ATTENTION}.key", "transposed",
      "layout", answer=changed("past_key_0_out", lambda x, s, step: x.swapaxes(2, 3).reshape(x.shape)),
      runs=(PROMPT,))  # fmt: skip
fault("keys one slot late", "the host appends keys one slot late", f"{ATTENTION}.key", "shifted", "late",
      runs=(PROMPT,), answer=changed("past_key_0_out", lambda x, s, step: np.roll(x, 1, 3)))  # fmt: skip
fault("padding on the right", "the output was padded on the other side", "lm_head", "padding side", "left",
      graph=3, runs=(PROMPT,), answer=changed("logits", lambda x, s, step: np.roll(x, -(s.tokens - s.real),
      1)))  # fmt: skip
fault("all zeros", "the output buffer was never written", f"{ATTENTION}.value", "never written", "0",
      answer=changed("past_value_0_out", lambda x, s, step: x * 0))  # fmt: skip
fault("logits of the last token only", "every row is the last one", "lm_head", "stale", "token", graph=3,
      runs=(PROMPT,), answer=changed("logits", lambda x, s, step: np.repeat(x[:, -1:], x.shape[1], 1)))  # fmt: skip
fault("zero of values 128 as 0", "codes came back as if 0 stood for 0", f"{ATTENTION}.value", "zero point",
      "128", answer=changed("past_value_0_out", lambda x, s, step: x + 128 * step))  # fmt: skip
fault("int8 values read as uint8", "signed codes came back as unsigned", f"{ATTENTION}.value",
      "signedness", "sign", answer=changed("past_value_0_out", lambda x, s,
      step: ((np.rint(x / step)) % 256 - 128) * step))  # fmt: skip
fault("scale of logits off", "codes were read with twice the step", "lm_head", "scale", "2", graph=3,
      answer=changed("logits", lambda x, s, step: 2 * x))  # fmt: skip
fault("logits clipped", "the range of logits is too small", "lm_head", "saturation", "range", graph=3,
      answer=changed("logits", lambda x, s, step: np.clip(x, -0.4 * np.abs(x).max(),
      0.4 * np.abs(x).max())))  # fmt: skip
fault("rounded to bfloat16", "outputs were stored in 16 bits", "model.embed_tokens", "dtype", "bfloat16",
      graph=1, setting="float", answer=changed("model.embed_tokens", lambda x, s,
      step: x.astype(ml_dtypes.bfloat16)))  # fmt: skip
fault("heads of values exchanged", "heads came back in another order", f"{ATTENTION}.value",
      "heads permuted", "order", answer=changed("past_value_0_out", lambda x, s, step: x[[1, 0, 3, 2]]))  # fmt: skip
fault("outputs of a stale call", "the token's output is the prompt's last", "lm_head", "stale", "prompt",
      graph=3, **late, answer=stale_logits)  # fmt: skip
