"""Faults of a deployment, injected into what a device answers: found, localised and named; healthy devices agree."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from loopback_hub import LoopbackHub

import refimpl
from export import emit
from export.causes.evidence import Evidence
from export.causes.likely import likeliest
from export.causes.table import CAUSES, where
from export.causes.whatif import Stretch, WhatIf
from export.files.entries import of_mapping
from export.graphs.plan import carry
from export.hub import connection, session
from export.measure.device import fit
from export.measure.figures import Birth, Comparison, Figures, Needs
from export.measure.flat import from_flat, to_flat
from export.measure.kinds import FLOAT, KINDS, SIMULATION
from export.measure.limits import Terms, Thresholds
from export.measure.references import References
from export.measure.standard import shown_dtype
from export.search.bisection import bisect
from export.verdict import english
from export.verdict.report import html
from export.verdict.saved import read_run, save_run
from export.verdict.trial import judge
from refimpl.checkpoint.weights import Weight
from refimpl.cli import main
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.positions import rope_tables

TEXT = Path(refimpl.__file__).parent / "embedded" / "held_out.txt"
P, T = "prompt_ar16_cl64_{}_of_4", "token_ar1_cl64_{}_of_4"
KEY, VALUE = "model.layers.{}.self_attn.key", "model.layers.{}.self_attn.value"


class Other(References):
    """A device with another model than that of the goldens."""

    def _computed(self, spec, *rest):
        return super()._computed(replace(spec, config=self.model.config), *rest)


class World:
    """An export of the embedded model, its encodings, and devices that answer to it."""

    def __init__(self, folder, model):
        self.model = model
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 200)
        self.encodings = calibrate(self.model, ids, window=50)
        self.folder = emit(self.model, tokens=(16, 1), context=64, parts=4).save(folder)
        self.references = References(self.folder, self.model, self.encodings)
        self.cache = {}

    def run(self, kind, way, before=None, references=None, fault=None):
        """What a device gives: `before` changes a graph's inputs, `fault` the outputs, on (spec, arrays)."""
        references, answers, after = references or self.references, {}, {}
        for run in references.plan.runs:
            flow = dict(after)
            for spec in run:
                inputs = references.inputs(spec)
                if way == "chained":
                    inputs |= {v.name: carry(spec, v, flow) for v in spec.inputs if v.source}
                if before:
                    inputs = before(spec, dict(inputs)) or inputs
                outputs = references.run(KINDS[kind], spec, inputs)
                if fault:
                    outputs = {name: array.copy() for name, array in outputs.items()}
                    outputs = fault(spec, outputs) or outputs
                answers[spec.name] = outputs
                flow |= outputs
            after = after or flow
        return {way: answers}

    def healthy(self, kind, way):
        if (kind, way) not in self.cache:
            self.cache[kind, way] = self.run(kind, way)
        return {way: {name: dict(arrays) for name, arrays in self.cache[kind, way][way].items()}}

    def other(self, model):
        """References whose model is another one, as a device's may be."""
        changed = Other(self.folder, None, self.encodings)
        object.__setattr__(changed, "model", model)
        return changed

    def judged(self, outputs, **options):
        return judge(self.folder, outputs, self.model, self.encodings, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "Baichuan2-7B", num_hidden_layers=3, hidden_size=128)
    return World(tmp_path_factory.mktemp("verdict") / "x", refimpl.load(folder))


@pytest.mark.parametrize("kind", ["float", "ends", "simulation", "even"])
@pytest.mark.parametrize("way", ["isolated", "chained"])
def test_healthy_devices_agree(world, kind, way):
    verdict = world.judged(world.healthy(kind, way))
    assert verdict, verdict
    assert (
        verdict.kind.name in (kind, "simulation" if kind == "even" else kind)
        and not verdict.causes
        and not verdict.story
        and verdict.guilty is None
    )
    assert len(verdict.tensors) == 2 * (1 + 3 * 3)


@pytest.mark.parametrize("variant", ["integers", "onnxruntime", "quantized ends", "padding of noise"])
@pytest.mark.parametrize("way", ["isolated", "chained"])
def test_other_right_arithmetic_agrees(world, variant, way):
    """Exact integer sums, another engine, and that engine between grids are no faults."""
    if variant == "integers":
        exact = world.other(world.model)
        exact._models[SIMULATION] = world.model.simulate(world.encodings, integer=True)
        outputs = world.run("simulation", way, references=exact)
    elif variant == "padding of noise":

        def fault(spec, outputs):
            for value in spec.outputs:
                np.moveaxis(outputs[value.name], value.token_axis, 0)[: spec.tokens - spec.real] = 9.0

        outputs = world.run("simulation", way, fault=fault)
    else:
        pytest.importorskip("onnxruntime")
        engine = World.run  # the export's own graphs
        graphs = References(world.folder, None, world.encodings if variant == "quantized ends" else None, "onnxruntime")
        outputs = engine(world, "ends" if variant == "quantized ends" else "float", way, references=graphs)
    verdict = world.judged(outputs)
    assert verdict, verdict


FAULTS = {}


def fault(name, where, cause, ways=("isolated", "chained"), kinds=("float", "simulation")):
    """Registers a fault: `where` is the first guilty tensor (graph, tap), `cause` its name in the table.

    Each is tried on one kind of device, in one way: by turns, or all of them with REFIMPL_ALL_FAULTS=1.
    """

    def register(make):
        combinations = [(kind, way) for kind in kinds for way in ways]
        if not os.environ.get("REFIMPL_ALL_FAULTS"):
            combinations = [combinations[(len(FAULTS) * 3) % len(combinations)]]
        for kind, way in combinations:
            FAULTS[f"{name}, {kind}, {way}"] = (make, where, cause, kind, way)
        return make

    return register


def at(number, name, change, graph=P):
    """A fault of one output of one graph."""

    def fault(spec, outputs):
        if spec.name == graph.format(number):
            changed = change(outputs[name], spec)
            outputs[name] = np.ascontiguousarray(changed, np.float32)

    return lambda world, kind, way: world.run(kind, way, fault=fault)


def fed(change, graphs=(P, T), numbers=(2, 3, 4)):
    """A fault of what the host feeds: on (spec, inputs)."""
    names = {graph.format(number) for graph in graphs for number in numbers}
    return lambda world, kind, way: world.run(
        kind, way, lambda spec, inputs: change(spec, inputs) if spec.name in names and spec.part.layers else None
    )


def grid(world, tap):
    return world.references.grids[tap]


# Of one output

fault("scale of values x1.1", (P.format(3), VALUE.format(1)), "scale")(at(3, "past_value_1_out", lambda x, s: x * 1.1))
fault("scale of logits x2", (P.format(4), "lm_head"), "scale")(at(4, "logits", lambda x, s: x * 2))
fault("sign", (P.format(2), KEY.format(0)), "scale")(at(2, "past_key_0_out", lambda x, s: -x))
fault("scale of one head", (P.format(3), VALUE.format(1)), "scales")(
    at(3, "past_value_1_out", lambda x, s: x * np.array([1, 1, 1.5, 1])[:, None, None, None])
)
fault("scales of channels", (P.format(3), VALUE.format(1)), "scales")(
    at(3, "past_value_1_out", lambda x, s: x * np.random.default_rng(0).uniform(0.5, 2, (4, 1, 1, x.shape[3])))
)
fault("zeros", (P.format(3), KEY.format(1)), "never written")(at(3, "past_key_1_out", lambda x, s: x * 0))
fault("NaN", (P.format(3), "model.layers.1"), "not finite")(
    at(3, "model.layers.1", lambda x, s: np.where(np.arange(x.shape[-1]) == 3, np.nan, x))
)
fault("infinite", (P.format(4), "lm_head"), "not finite")(at(4, "logits", lambda x, s: np.where(x > 0, np.inf, x)))
fault("tokens late", (P.format(3), KEY.format(1)), "shifted")(at(3, "past_key_1_out", lambda x, s: np.roll(x, 1, 3)))
fault("tokens early", (P.format(2), VALUE.format(0)), "shifted")(
    at(2, "past_value_0_out", lambda x, s: np.roll(x, -1, 2))
)
fault("padding on the right", (P.format(4), "lm_head"), "padding side")(
    at(4, "logits", lambda x, s: np.roll(x, -(s.tokens - s.real), 1))
)
fault("heads exchanged", (P.format(3), VALUE.format(1)), "heads permuted")(
    at(3, "past_value_1_out", lambda x, s: x[[1, 0, 2, 3]])
)
fault("one head everywhere", (P.format(3), KEY.format(1)), "heads permuted")(
    at(3, "past_key_1_out", lambda x, s: x[[0, 0, 0, 0]])
)
fault("another token's output", (P.format(4), "lm_head"), "stale")(
    at(4, "logits", lambda x, s: np.repeat(x[:, -1:], x.shape[1], 1))
)
fault("saturated", (P.format(4), "lm_head"), "saturation")(
    at(4, "logits", lambda x, s: np.clip(x, -0.3 * np.abs(x).max(), 0.3 * np.abs(x).max()))
)
fault("transposed", (P.format(3), VALUE.format(1)), "transposed")(
    at(3, "past_value_1_out", lambda x, s: np.ascontiguousarray(x.swapaxes(2, 3)).reshape(x.shape))
)
fault("interleaved pairs", (P.format(3), KEY.format(1)), "RoPE")(
    at(3, "past_key_1_out", lambda x, s: np.roll(x, x.shape[2] // 2, 2))
)


@fault("zero point off by one code", (P.format(3), KEY.format(1)), "zero point", kinds=["simulation"])
def _(world, kind, way):
    return at(3, "past_key_1_out", lambda x, s: x + float(grid(world, KEY.format(1)).scale))(world, kind, way)


@fault("zero 128 as 0", (P.format(2), VALUE.format(0)), "zero point", kinds=["simulation"])
def _(world, kind, way):
    return at(2, "past_value_0_out", lambda x, s: x + 128 * float(grid(world, VALUE.format(0)).scale))(world, kind, way)


@fault("signedness", (P.format(2), VALUE.format(0)), "signedness", kinds=["simulation"])
def _(world, kind, way):
    step = float(grid(world, VALUE.format(0)).scale)
    wrapped = lambda x, s: ((np.rint(x / step) + 128 + 128) % 256 - 128) * step
    return at(2, "past_value_0_out", wrapped)(world, kind, way)


@fault("8 of 16 bits", (P.format(4), "lm_head"), "dtype", kinds=["simulation"])
def _(world, kind, way):
    step = 256 * float(grid(world, "lm_head").scale)
    offset = float(grid(world, "lm_head").offset) / 256
    return at(4, "logits", lambda x, s: (np.rint(x / step - offset) + offset) * step)(world, kind, way)


@fault("keys and values exchanged", (P.format(3), KEY.format(1)), "names swapped")
def _(world, kind, way):
    def exchange(spec, outputs):
        if spec.name == P.format(3):
            key, value = (outputs[f"past_{what}_1_out"] for what in ("key", "value"))
            outputs["past_key_1_out"], outputs["past_value_1_out"] = value.swapaxes(2, 3), key.swapaxes(2, 3)
            return {name: np.ascontiguousarray(array) for name, array in outputs.items()}

    return world.run(kind, way, fault=exchange)


@fault("files of parts exchanged", (P.format(2), KEY.format(0)), "names swapped", ways=["isolated"])
def _(world, kind, way):
    outputs = world.healthy(kind, way)
    two, three = (outputs[way][P.format(i)] for i in (2, 3))
    outputs[way][P.format(2)] = dict(zip(two, three.values(), strict=True))
    outputs[way][P.format(3)] = dict(zip(three, two.values(), strict=True))
    return outputs


@fault("parts exchanged", (P.format(2), KEY.format(0)), "parts exchanged")
def _(world, kind, way):
    run = References.run

    class Exchanged(References):
        def expect_same_model(self):
            pass

        def run(self, kind, spec, inputs, *rest, **options):
            other = spec.name.replace("2_of", "X_of").replace("3_of", "2_of").replace("X_of", "3_of")
            other = self.specs[other]
            given = {theirs.name: inputs[ours.name] for theirs, ours in zip(other.inputs, spec.inputs, strict=True)}
            outputs = run(self, kind, other, given)
            return {ours.name: outputs[theirs.name] for theirs, ours in zip(other.outputs, spec.outputs, strict=True)}

    return world.run(kind, way, references=Exchanged(world.folder, world.model, world.encodings))


@fault("narrowed to bfloat16", (P.format(1), "model.embed_tokens"), "dtype", ways=["isolated"], kinds=["float"])
def _(world, kind, way):
    narrow = lambda spec, outputs: {n: x.astype(ml_dtypes.bfloat16).astype("f4") for n, x in outputs.items()}
    return world.run(kind, way, fault=narrow)


@fault("rows of the head not normalised", (P.format(4), "lm_head"), "NormHead missing", kinds=["float"])
def _(world, kind, way):
    head = world.model.weights["lm_head.weight"]
    plain = refimpl.Model(world.model.config, world.model.weights.replace({"lm_head.weight": Weight(head.array)}))
    return world.run(kind, way, references=world.other(plain))


@fault("gate and up exchanged", (P.format(2), "model.layers.0"), "architecture", kinds=["float"])
def _(world, kind, way):
    weights, crossed = world.model.weights, {}
    for layer in range(3):
        gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        crossed |= {gate: weights[up], up: weights[gate]}
    changed = refimpl.Model(world.model.config, weights.replace(crossed))
    return world.run(kind, way, references=world.other(changed))


@fault("epsilon 1e-5", (P.format(2), KEY.format(0)), "architecture", kinds=["float"], ways=["isolated"])
def _(world, kind, way):
    changed = refimpl.Model(replace(world.model.config, rms_norm_eps=1e-5), world.model.weights)
    return world.run(kind, way, references=world.other(changed))


# Of what the host feeds


def tables(base=1e4, by=0, pairs=False):
    def change(spec, inputs):
        positions = np.maximum(spec.past - (spec.tokens - spec.real) + np.arange(spec.tokens)[None] + by, 0)
        cos, sin = rope_tables(positions, spec.config.head_dim, base, np.float64)
        return {**inputs, "position_ids_cos": cos.astype("f4"), "position_ids_sin": sin.astype("f4")}

    return fed(change)


fault("RoPE base 1e6", (P.format(2), KEY.format(0)), "RoPE")(tables(base=1e6))
fault("positions one late", (P.format(2), KEY.format(0)), "RoPE")(tables(by=1))
fault("positions count padding", (P.format(2), KEY.format(0)), "RoPE")(tables(by=4))
fault("cos and sin exchanged", (P.format(2), KEY.format(0)), "RoPE")(
    fed(lambda spec, i: {**i, "position_ids_cos": i["position_ids_sin"], "position_ids_sin": i["position_ids_cos"]})
)
fault("positions do not count the past", (T.format(2), KEY.format(0)), "RoPE")(
    lambda world, kind, way: fed(
        lambda spec, i: {**i, "position_ids_cos": np.ones_like(i["position_ids_cos"]),
                         "position_ids_sin": np.zeros_like(i["position_ids_sin"])}, (T,)
    )(world, kind, way)
)  # fmt: skip
fault("no causal mask", (P.format(2), "model.layers.0"), "mask")(
    fed(lambda spec, i: {**i, "attention_mask": np.where(i["attention_mask"][:, :, -1:] < -1, -3e4, 0).astype("f4")
                         * np.ones_like(i["attention_mask"])}, (P,))
)  # fmt: skip
fault("no mask at all", (P.format(2), "model.layers.0"), "mask")(
    fed(lambda spec, i: {**i, "attention_mask": i["attention_mask"] * 0})
)
fault("past one slot late", (T.format(2), "model.layers.0"), "past")(
    fed(lambda spec, i: {n: np.roll(x, 1, 3 if "key" in n else 2) if n.startswith("past_") else x
                         for n, x in i.items()}, (T,))
)  # fmt: skip
fault("past not handed on", (T.format(2), "model.layers.0"), "past")(
    fed(lambda spec, i: {n: x * 0 if n.startswith("past_") else x for n, x in i.items()}, (T,))
)
fault("past on the left", (T.format(2), "model.layers.0"), "past")(
    fed(lambda spec, i: {n: np.roll(x, spec.past, 3 if "key" in n else 2) if n.startswith("past_") else x
                         for n, x in i.items()}, (T,))
)  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_localised_and_named(world, name):
    make, where, cause, kind, way = FAULTS[name]
    verdict = world.judged(make(world, kind, way))
    assert not verdict
    guilty = verdict.guilty
    assert (guilty.graph, guilty.tap) == where, str(verdict)
    if cause:
        assert guilty.name in verdict.causes, str(verdict)
        assert verdict.causes[guilty.name].name == cause, str(verdict)
    assert verdict.suspects[-1] == guilty.tap


def test_what_a_fault_does_later_is_inherited(world):
    late = at(2, "past_key_0_out", lambda x, s: np.roll(x, 1, 3))
    verdict = world.judged(late(world, "simulation", "chained"))
    born = {tensor.name: tensor.born for tensor in verdict.failures}
    assert born.pop(f"{P.format(2)}/chained/{KEY.format(0)}") == "here"
    assert len(born) > 5 and set(born.values()) == {"inherited"}  # the token's graphs, which had that cache
    assert "only hand on what they were given" in verdict.story


def test_two_faults_are_two(world):
    def both(spec, outputs):
        if spec.name == P.format(2):
            outputs["past_key_0_out"] = -outputs["past_key_0_out"]
        if spec.name == P.format(4):
            outputs["logits"] = outputs["logits"] * np.float32(3)

    verdict = world.judged(world.run("simulation", "chained", fault=both))
    here = [tensor.tap for tensor in verdict.failures if tensor.born == "here"]
    assert here == [KEY.format(0), "lm_head"]
    assert [cause.name for cause in verdict.causes.values()] == ["scale", "scale"]


def test_token_and_head_are_named(world):
    def one(x, spec):
        x = x.copy()
        x[2, 0, :, spec.tokens - spec.real + 5] *= -1
        return x

    verdict = world.judged(at(3, "past_key_1_out", one)(world, "simulation", "isolated"))
    assert len(verdict.failures) == 1
    (wrong,) = verdict.failures
    worst = [np.argmin(wrong.device.token_sqnr), np.argmin(wrong.device.token_cosine), np.argmax(wrong.codes.tokens)]
    assert worst == [5, 5, 5] and np.argmin(wrong.device.head_cosine) == np.argmax(wrong.codes.heads) == 2
    assert f"Wrong in token 5 of {world.references.plan.prompt}, head 2 of 4" in verdict.story
    assert verdict.suspects == [KEY.format(1)]  # the layer's output, which is made of it, is right
    assert "only this output is wrong" in verdict.story


def test_what_a_softmax_hides_is_not_only_in_the_output(world):
    """Positions that are all one too high turn keys and queries alike, so that all but the keys is right."""
    late = tables(by=1)(world, "float", "isolated")["isolated"]
    verdict = world.judged({P.format(2): late[P.format(2)]})
    assert [tensor.tap for tensor in verdict.failures] == [KEY.format(0)]
    assert "scale or copy; or attention does not see the error." in verdict.story
    assert verdict.causes[verdict.guilty.name].text == "RoPE's positions are 1 too high: off by one"
    values = at(3, "past_value_1_out", lambda x, s: x * 1.1)(world, "float", "isolated")
    assert "its layout, name, scale or copy." in world.judged(values).story, "all that is wrong with values is seen"


def test_the_sign_of_heads_is_called_a_sign(world):
    for heads, said in (([2], "head 2 has the opposite sign"), ([0, 3], "heads 0, 3 have the opposite sign")):
        signs = np.where(np.isin(np.arange(4), heads), -1, 1)[:, None, None, None]
        outputs = at(3, "past_value_1_out", lambda x, s, by=signs: x * by)(world, "simulation", "isolated")
        verdict = world.judged(outputs)
        assert str(verdict.causes[verdict.guilty.name]) == said


def test_codes_are_counted_in_words(world):
    step = float(grid(world, VALUE.format(1)).scale)
    for by, said in ((1, ", up to 1 code off;"), (2, ", up to 2 codes off, 100% by more than one;")):
        outputs = at(3, "past_value_1_out", lambda x, s, by=by: x + by * step)(world, "simulation", "isolated")
        assert said in world.judged(outputs).story


def test_logits_that_cannot_be_compared_are_told(world):
    broken = at(4, "logits", lambda x, s: np.where(np.arange(x.shape[-1]) == 3, np.nan, x))
    outputs = broken(world, "float", "isolated")
    del outputs["isolated"][T.format(4)]["logits"]
    verdict = world.judged(outputs)
    lines = [line for line in str(verdict).split("\n") if line.startswith("logits of ")]
    assert lines == [
        f"logits of {P.format(4)}, isolated: no KL and no top-1, because they cannot be compared: NaN or infinity on "
        "one side",
        f"logits of {T.format(4)}, isolated: no KL and no top-1, because they cannot be compared: missing",
    ]
    assert all(line in html(verdict) for line in lines)


@pytest.mark.filterwarnings("error:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("way", ["isolated", "chained"])
def test_one_nan_is_placed_and_counted(world, way):
    def one(x, spec):
        x = x.copy()
        x[2, 0, 7, spec.tokens - spec.real + 5] = np.nan
        return x

    verdict = world.judged(at(3, "past_key_1_out", one)(world, "simulation", way))
    prompt = world.references.plan.prompt
    assert f"Not finite in token 5 of {prompt}, head 2 of 4; the first is at (0, 2, 5, 7)" in verdict.story
    assert f"1 of {128 * prompt} values are NaN" in verdict.story and "0.0%" not in verdict.story
    assert ">NaN<" in html(verdict) and "NaN or in<" not in html(verdict)


def test_no_device_is_right_that_answers_nan(world, monkeypatch):
    """Even if the golden is NaN, too."""
    devices, golden = world.run("float", "isolated")["isolated"], References.golden
    devices = {name: {n: x.copy() for n, x in arrays.items()} for name, arrays in devices.items()}
    devices[P.format(4)]["logits"][:] = np.nan
    monkeypatch.setattr(References, "golden", lambda self, spec: {
        name: x * np.nan if name == "logits" and spec.name == P.format(4) else x
        for name, x in golden(self, spec).items()
    })  # fmt: skip
    verdict = judge(world.folder, devices)
    assert not verdict and [t.name for t in verdict.failures] == [f"{P.format(4)}/isolated/lm_head"]
    assert verdict.summary.endswith("NaN or infinity on both sides") and "the first is at (0, 0, 0)" in verdict.story


def test_one_token_is_not_everywhere(world):
    outputs = at(4, "logits", lambda x, s: x * 1.5, T)(world, "simulation", "isolated")
    verdict = world.judged(outputs)
    assert "Wrong in its one token" in verdict.story
    healthy = world.judged(world.healthy("simulation", "isolated")).judged(Thresholds(min_sqnr=1e3))
    assert "everywhere" not in healthy.story


def test_a_right_sibling_clears_the_norm(world):
    """Keys that are wrong inside of the graph: values show the norm to be right, and nothing shows the keys to be."""

    def both(x, spec):
        return -x

    outputs = at(3, "past_key_1_out", both)(world, "simulation", "isolated")
    layer = outputs["isolated"][P.format(3)]
    layer["model.layers.1"] = layer["model.layers.1"] * np.float32(1.5)
    verdict = world.judged(outputs)
    assert verdict.suspects == [f"model.layers.1.self_attn.{name}" for name in ("W_pack", "key")]
    layer["past_value_1_out"] = layer["past_value_1_out"] * np.float32(1.5)
    verdict = world.judged(outputs)
    assert verdict.suspects[0] == "model.layers.1.input_layernorm" and "only this output" not in verdict.story


def test_what_does_not_follow_from_a_tensor_clears_nothing(world):
    """Right probabilities come later than values, but are not made of them."""
    name, spec = P.format(2), world.references.specs[P.format(2)]
    tap = "model.layers.0.self_attn"

    def wrong(at, x):
        return x * np.float32(1.2) if at == f"{tap}.value" else x

    outputs = world.references.run(FLOAT, spec, world.references.inputs(spec), wanted=[f"{tap}.probs"], change=wrong)
    verdict = world.judged({name: outputs})
    assert verdict.guilty.tap == f"{tap}.value" and verdict.failures[-1].born == "inherited"
    assert "only this output" not in verdict.story and verdict.suspects == [f"{tap}.W_pack", f"{tap}.value"]


def test_many_suspects_are_a_range(world):
    outputs = at(3, "model.layers.1", lambda x, s: x * 1.5)(world, "simulation", "isolated")
    verdict = world.judged(outputs)
    assert len(verdict.suspects) > 10
    said = f"is one of the {len(verdict.suspects)} operations from {verdict.suspects[0]} to model.layers.1."
    assert said in verdict.story


def test_probes_narrow_it_down(world):
    """With a tap inside a graph among the outputs, the operation is named."""
    name, spec = P.format(2), world.references.specs[P.format(2)]
    wanted = ["model.layers.0.attention_residual", "model.layers.0.mlp.act_fn", "model.layers.0.mlp.product"]
    outputs = world.references.run(SIMULATION, spec, world.references.inputs(spec), wanted=wanted)
    assert world.judged({name: outputs})
    outputs["model.layers.0.mlp.product"] = outputs["model.layers.0.mlp.product"] * np.float32(1.2)
    outputs["model.layers.0"] = outputs["model.layers.0"] + np.float32(1)
    verdict = world.judged({name: outputs})
    assert verdict.guilty.tap == "model.layers.0.mlp.product" and verdict.causes[verdict.guilty.name].name == "scale"
    assert "model.layers.0.attention_residual" not in verdict.suspects
    assert not judge(world.folder, {name: outputs}, None, world.encodings)  # the graph itself computes what is right


def test_what_a_graph_exchanges_is_no_matter_of_names(world):
    """Others inherit it: so the names are right, and what the graph computes is not."""
    spec, width = world.references.specs[P.format(3)], 128
    attention = "model.layers.1.self_attn"
    probed = [f"{attention}.{name}" for name in ("query", "scores", "probs", "context")]

    def exchange(name, x):
        turned = np.r_[width : 2 * width, :width, 2 * width : 3 * width]
        return x[..., turned] if name == f"{attention}.W_pack" else x

    outputs = world.references.run(FLOAT, spec, world.references.inputs(spec), wanted=probed, change=exchange)
    verdict = world.judged({spec.name: outputs})
    assert "past_key_1_out: the graph computes one for the other" in verdict.causes[verdict.guilty.name].text


def test_missing_and_absent_outputs(world):
    outputs = world.healthy("simulation", "isolated")
    del outputs["isolated"][P.format(3)]["past_value_1_out"]
    del outputs["isolated"][T.format(1)]
    verdict = world.judged(outputs)
    assert [(tensor.name, tensor.problem) for tensor in verdict.failures] == [
        (f"{P.format(3)}/isolated/{VALUE.format(1)}", "missing")
    ]
    assert verdict.remarks == (f"not judged, because there are no outputs: {T.format(1)}",)
    assert verdict.story == f"{verdict.guilty.name} is not among the outputs, so it cannot be judged."

    outputs = world.healthy("simulation", "isolated")
    graph = outputs["isolated"][P.format(3)]
    del graph["past_key_1_out"]
    graph["past_value_1_out"] = -graph["past_value_1_out"]
    verdict = world.judged(outputs)
    assert len(verdict.failures) == 2 and verdict.guilty.tap == VALUE.format(1), "what is there tells more"
    missing = f"{P.format(3)}/isolated/{KEY.format(1)}"
    assert verdict.story.endswith(f"Not judged, because the device did not give it: {missing}.")


def test_a_graph_that_did_not_run_is_said(world):
    """Also where all else is right: nobody should take half of a device for the whole."""
    outputs = world.healthy("simulation", "isolated")
    assert "judged" not in world.judged(outputs).summary
    for count, said in ((1, "; 1 graph is not judged"), (2, "; 2 graphs are not judged")):
        del outputs["isolated"][(P, T)[count - 1].format(3)]
        verdict = world.judged(outputs)
        assert verdict and verdict.summary.endswith(said)


def test_a_verdict_ends_with_the_next_command(world, tmp_path):
    def next_step(outputs, model=world.model):
        verdict = judge(world.folder, outputs, model, world.encodings)
        assert str(verdict).split("\n")[-1] == verdict.next_step
        return verdict.next_step

    verify, bisect = (f"refimpl {verb} {world.folder} OUTPUTS" for verb in ("verify", "bisect"))
    isolated, chained = (world.healthy("simulation", way) for way in ("isolated", "chained"))
    assert next_step(isolated).endswith(f": {verify} --chained")
    assert next_step(isolated | chained).endswith(f": {verify} --save RUN")
    assert next_step({P.format(2): isolated["isolated"][P.format(2)]}).startswith("Next: have the device run ")
    absent = world.healthy("simulation", "isolated")
    del absent["isolated"][P.format(3)]["past_value_1_out"]
    assert next_step(absent).startswith(f"Next: fetch {P.format(3)}/isolated/{VALUE.format(1)} from the device")
    twice = at(3, "past_value_1_out", lambda x, s: 2 * x)(world, "simulation", "isolated")
    assert next_step(twice).endswith(f"judge them: {verify} --model MODEL")
    assert next_step(twice, None).startswith("Next: give the model")
    noise = np.random.default_rng(0)
    noisy = at(3, "model.layers.1", lambda x, s: noise.normal(0, x.std(), x.shape))(world, "simulation", "isolated")
    assert next_step(noisy).endswith(f": {bisect} --model MODEL --executor hub --device NAME")
    spaced = replace(world.judged(twice), about={"export": "my export", "outputs": "a b", "model": "x"})
    assert "refimpl verify 'my export' 'a b' --model" in spaced.next_step


def test_without_the_model_a_float_device_is_judged_and_explained(world):
    late = tables(by=1)(world, "float", "isolated")
    verdict = judge(world.folder, late)
    assert verdict.causes[verdict.guilty.name].text == "RoPE's positions are 1 too high: off by one"
    assert judge(world.folder, world.healthy("float", "chained"))


def test_an_export_with_encodings_says_what_a_device_should_answer(world, tmp_path):
    folder = emit(world.model, tokens=(16, 1), context=64, parts=4, encodings=world.encodings).save(tmp_path / "x")
    outputs = world.healthy("simulation", "chained")
    for verdict in (judge(folder, outputs), judge(folder, outputs, world.model)):
        assert verdict and verdict.kind == SIMULATION
    assert "that is smaller than that passes" in judge(folder, outputs).next_step, "nothing in it was computed anew"
    assert "passes" not in judge(folder, outputs, world.model).next_step
    outputs["chained"][P.format(3)]["past_key_1_out"] = -outputs["chained"][P.format(3)]["past_key_1_out"]
    verdict = judge(folder, outputs)
    assert verdict.guilty.tap == KEY.format(1) and verdict.causes[verdict.guilty.name].name == "scale"


def test_float16_devices_have_their_own_tolerance(world):
    def rounded(spec, outputs):
        return {name: array.astype(np.float16).astype(np.float32) for name, array in outputs.items()}

    outputs = world.run("float", "isolated", fault=rounded)
    assert not judge(world.folder, outputs, terms=Terms("float32"))
    for dtype in (None, "float16"):
        assert (verdict := judge(world.folder, outputs, terms=Terms(dtype))), verdict
        assert verdict.about["dtype"] == "float16" and len(verdict.remarks) == (not dtype)
    outputs["isolated"][P.format(3)]["past_key_1_out"] *= np.float32(1.2)
    assert judge(world.folder, outputs, terms=Terms("float16")).guilty.tap == KEY.format(1)


HALF = float(np.float16(0.3))  # and no bfloat16


@pytest.mark.parametrize("device, golden, grids, dtype", [
    ([HALF], 0.1, {}, "float16"), ([HALF], 0.5, {}, "float32"), ([0.1], 0.1, {}, "float32"), ([], 0.1, {}, "float32"),
    ([HALF], 0.1, {"x": 1}, "float32"), ([0.25], 0.1, {}, "float32"), ([[HALF, np.inf]], 1e9, {}, "float16"),
    ([[HALF, np.nan]], 0.1, {}, "float16"), ([[HALF, 70000.0]], 0.1, {}, "float32"),
    ([HALF, HALF, 0.1], 0.1, {}, "float16"), ([HALF, 0.1, 0.1], 0.1, {}, "float32"),
    ([HALF * (1 + 1.2e-7)], 0.1, {}, "float16"), ([HALF * (1 + 5e-7)], 0.1, {}, "float32"),
    ([[HALF, -2.211333e-05, -1.8298633e-05]], 0.1, {}, "float16"), ([[HALF, 2.23e-05]], 0.1, {}, "float32"),
    ([[HALF * (1 - 8.5e-8), np.inf]], 0.1, {}, "float16"), ([0.25 * (1 + 1.2e-7)], 0.1, {}, "float32"),
])  # fmt: skip
def test_the_dtype_is_what_most_outputs_show(device, golden, grids, dtype):
    """Where the oracle's numbers are as short, such as rows of a bfloat16 embedding, nothing is shown."""
    references = SimpleNamespace(grids=grids, golden=lambda spec: {"x": np.float32(golden)})
    answers = [SimpleNamespace(spec=None, arrays={"x": np.float32(x)}) for x in device]
    assert shown_dtype(references, answers) == dtype


def test_the_kind_is_not_taken_for_a_fault(world):
    """What quantization costs is stated, and is no fault of the device's."""
    verdict = world.judged(world.healthy("simulation", "isolated"))
    assert max(t.cost.sqnr for t in verdict.tensors if t.layer is not None) < 60
    assert min(t.device.sqnr for t in verdict.tensors) > 100
    logits = [t for t in verdict.tensors if t.logits is not None]
    assert all(t.logits.kl == pytest.approx(t.logits.cost_kl) and t.logits.kl > 0 for t in logits)
    assert all(
        t.logits.kl == pytest.approx(np.mean(t.logits.tokens)) and len(t.logits.tokens) == t.shape[1] for t in logits
    )


@pytest.fixture(scope="module")
def faulty(world):
    return world.judged(at(3, "past_key_1_out", lambda x, s: np.roll(x, 1, 3))(world, "simulation", "chained"))


def test_a_run_is_saved_and_judged_again(world, faulty, tmp_path):
    save_run(faulty, tmp_path / "run.json")
    again = read_run(tmp_path / "run.json")
    assert str(again) == str(read_run(tmp_path / "run.json")) and again.summary == faulty.summary
    assert [t.name for t in again.failures] == [t.name for t in faulty.failures]
    assert again.story == faulty.story
    assert again.judged(Thresholds(min_sqnr=-60.0)) and not again.judged(Thresholds(min_sqnr=200.0))
    strict = world.judged(world.healthy("simulation", "isolated")).judged(Thresholds(max_lsb=0))
    assert strict and not again.judged(Thresholds(max_lsb=1, max_over=0.0))
    stored = json.loads((tmp_path / "run.json").read_text())
    for change in ({"format": "x"}, {"tensors": [{}]}, {"tensors": [{"graph": 1}]}, {"kind": "x"},
                   {"config": {"family": "x"}}, {"tensors": [{**stored["tensors"][0], "tap": "x"}]}, {"causes": 3},
                   {"tensors": [{**stored["tensors"][0], "rows": "large"}]}):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps({**stored, **change}))
        with pytest.raises(InputError) as caught:
            read_run(tmp_path / "bad.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limits", [Thresholds(max_lsb=3), Thresholds(max_over=0.5), Thresholds(max_lsb=0, max_over=0)])
def test_limits_in_codes_let_nothing_pass_that_has_none(world, limits):
    """Floats have no codes to count, so the rule judges them; and so it does what has no grid beside what has one."""
    right, terms = world.healthy("float", "isolated"), Terms(thresholds=limits)
    assert "explains, for none has codes" in judge(world.folder, right, terms=terms).summary
    wrong = {"isolated": {P.format(2): {name: 0 * x + 9 for name, x in right["isolated"][P.format(2)].items()}}}
    for verdict in (judge(world.folder, wrong, terms=terms), judge(world.folder, wrong).judged(limits)):
        assert len(verdict.failures) == len(verdict.tensors) and "Wrong in all" in verdict.story
    healthy = world.judged(world.healthy("simulation", "isolated"), terms=Terms(thresholds=Thresholds(max_lsb=1)))
    [*codes, bare] = healthy.tensors[:3]
    mixed = replace(healthy, tensors=(*codes, replace(bare, codes=replace(bare.codes, largest=None, over=None))))
    assert mixed and "the given limits, 1 without codes within what rounding explains" in mixed.summary
    assert not replace(mixed, tensors=(*codes, replace(mixed.tensors[-1], needs=Needs(rows=1e3))))


def test_another_model_is_refused(world, tmp_path):
    other = refimpl.load(write_checkpoint(tmp_path / "m", "Baichuan2-7B", 1, num_hidden_layers=3, hidden_size=128))
    with pytest.raises(InputError, match="does not compute the goldens"):
        judge(world.folder, {}, other)
    with pytest.raises(InputError, match="was exported from another model"):
        judge(world.folder, {}, refimpl.load())


def test_the_model_is_what_it_was_before_the_export(world, tmp_path):
    """What `export --int4` and `--layers` do to a model is in the manifest, so the model as it was is enough."""
    blocks = world.model.quantize("int4", block_size=32, keep=["*.down_proj"])
    small = blocks.truncated(2)
    folder = emit(small, tokens=4, context=8, parts=1, prompt=[1, 2, 3]).save(tmp_path / "x")
    [spec] = (device := References(folder, small)).specs.values()
    outputs = device.run(FLOAT, spec, device.inputs(spec))
    blocks.save(tmp_path / "int4")
    for model in (world.model, refimpl.load(tmp_path / "int4")):
        assert judge(folder, outputs, model), model
        assert bisect(folder, model=model)
    with pytest.raises(InputError, match="or the folder that was quantized for it"):
        judge(folder, outputs, world.model.truncated(2).quantize("int4", block_size=64))
    manifest = json.loads((folder / "manifest.json").read_text())
    for bad in (["x"], {"x.weight": {"format": "int4"}}, {"lm_head.weight": {"format": "x"}}):
        (folder / "manifest.json").write_text(json.dumps(manifest | {"quantization": bad}))
        with pytest.raises(InputError) as caught:
            judge(folder, outputs, world.model)
        assert "\n" not in str(caught.value)


def test_figures_survive_json():
    needs, device = Needs(tokens=(0.5, 2.0)), Figures(sqnr=31.25)
    one = Comparison("g", "isolated", "lm_head", FLOAT, needs=needs, device=device, born=Birth.HERE)
    again = from_flat(json.loads(json.dumps(to_flat(one))))
    assert (again.needs.tokens, again.device.sqnr, again.born, again.needs.rows) == ((0.5, 2.0), 31.25, "here", np.inf)


def test_what_no_pattern_explains_has_no_cause(world):
    noise = np.random.default_rng(0)
    disturbed = at(3, "past_value_1_out", lambda x, s: x + noise.standard_normal(x.shape) * x.std())
    verdict = world.judged(disturbed(world, "float", "isolated"))
    assert verdict.guilty.tap == VALUE.format(1) and not verdict.causes
    assert "No known pattern explains it." in verdict.story


@pytest.mark.parametrize("kind", ["float", "simulation"])
def test_hypotheses_begin_at_the_first_suspect(world, monkeypatch, tmp_path, kind):
    """They say the same as if all of the graph were computed again for each, and are tried in one layer of three."""
    folder = emit(world.model, tokens=(16,), context=64, parts=1).save(tmp_path / "x")
    references = References(folder, world.model, world.encodings)
    ((name, spec),) = references.specs.items()
    mlp = "model.layers.2.mlp"
    seen = {}

    def wrong(at, x):
        seen[at] = x
        return np.maximum(seen[f"{mlp}.gate_proj"], 0) if at == f"{mlp}.act_fn" else x

    outputs = references.run(KINDS[kind], spec, references.inputs(spec), change=wrong)
    stages = []
    begun = WhatIf.stretch.func
    monkeypatch.setattr(WhatIf, "stretch", property(lambda e: stages.append(begun(e)) or stages[-1]))
    verdict = judge(folder, {name: outputs}, world.model, world.encodings)
    assert verdict.guilty.tap == "lm_head" and f"{mlp}.act_fn" in verdict.suspects
    assert [str(cause) for cause in verdict.causes.values()] == ["the activation is ReLU, expected SiLU, in layer 2"]
    assert {tuple(stretch.spec.part.layers) for stretch in stages} == {(1, 2), (2,)}, "together, and each alone"
    monkeypatch.setattr(WhatIf, "stretch", property(lambda e: Stretch(e.spec, e.inputs, {})))
    assert judge(folder, {name: outputs}, world.model, world.encodings).causes == verdict.causes


def test_a_cause_that_explains_a_part_says_so(world):
    noise = np.random.default_rng(0)
    for share, roughly in ((0.0, False), (0.05, True)):
        change = lambda x, s, share=share: 2 * x + share * x.std() * noise.standard_normal(x.shape)
        verdict = world.judged(at(3, "past_value_1_out", change)(world, "float", "isolated"))
        (cause,) = verdict.causes.values()
        assert cause.name == "scale" and cause.partial == roughly == ("explains only a part" in str(cause)), cause
        assert ("Perhaps: " if roughly else "Likely cause: ") in verdict.story


@pytest.mark.parametrize("mean", [3.0, 100.0, -1e4])
def test_noise_far_from_zero_is_no_zero_point(world, mean):
    noise = np.random.default_rng(0)
    disturbed = at(3, "past_key_1_out", lambda x, s: noise.normal(mean, abs(mean) / 20, x.shape))
    verdict = world.judged(disturbed(world, "simulation", "isolated"))
    assert verdict.guilty.tap == KEY.format(1) and not verdict.causes, str(verdict)


@pytest.mark.parametrize("name, tap", [("past_key_1_out", KEY.format(1)), ("logits", "lm_head")])
@pytest.mark.parametrize("first", ["unsigned", "signed"])
def test_codes_that_were_not_dequantized_are_named(world, name, tap, first):
    its = grid(world, tap)
    zero = float(its.offset) + (2 ** (its.bits - 1) if first == "signed" else 0)
    codes = at(4 if name == "logits" else 3, name, lambda x, s: np.rint(x / float(its.scale)) - zero)
    verdict = world.judged(codes(world, "simulation", "isolated"))
    assert verdict.guilty.tap == tap and verdict.causes[verdict.guilty.name].name == "codes", str(verdict)


@pytest.mark.parametrize("kind", ["float", "simulation"])
@pytest.mark.parametrize("part, name", [(3, "past_value_1_out"), (4, "logits")])
def test_bytes_in_the_other_order_are_named(world, kind, part, name):
    """Such floats look like NaN, and such codes like noise."""
    swapped = at(part, name, lambda x, s: x.astype(np.float32).byteswap())
    verdict = world.judged(swapped(world, kind, "isolated"))
    assert verdict.guilty.output == name and "Likely cause: the bytes of each number are in the other" in verdict.story
    its = world.references.grids.get("lm_head")
    if kind == "simulation" and name == "logits":

        def codes(x, s):
            codes = np.clip(np.rint(x / float(its.scale) - float(its.offset)), 0, 65535).astype(np.uint16)
            return (codes.byteswap() + float(its.offset)) * float(its.scale)

        verdict = world.judged(at(part, name, codes)(world, kind, "isolated"))
        assert verdict.causes[verdict.guilty.name].name == "byte order", verdict


def test_a_float_that_is_assumed_is_no_cause(world):
    """A float16 device rounds to float16 whatever else is wrong with it."""
    noise = np.random.default_rng(0)
    disturbed = at(3, "past_value_1_out", lambda x, s: x + 0.03 * x.std() * noise.standard_normal(x.shape))
    outputs = disturbed(world, "float", "isolated")["isolated"]
    outputs = {n: {k: x.astype(np.float16).astype(np.float32) for k, x in v.items()} for n, v in outputs.items()}
    for dtype, causes in (("float16", []), ("float32", ["dtype"])):
        verdict = judge(world.folder, outputs, world.model, terms=Terms(dtype))
        assert not verdict and [cause.name for cause in verdict.causes.values()][:1] == causes, verdict


def test_what_is_above_1_is_not_called_1_times():
    assert english.times(1.02) == "a little more than what is allowed" and english.times(1.1).startswith("1.1 times")
    assert english.share(0.998) == "nearly all of what is allowed" and english.share(0.9) == "0.9 of what is allowed"


def test_the_head_is_no_layer():
    assert [where(stage, 3) for stage in (-1, 0, 2, 3)] == [
        ", in the embedding", ", in layer 0", ", in layer 2", ", after the last layer",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["float", "simulation"])
def test_no_cause_fires_on_a_healthy_tensor(world, kind):
    """Not even on one that rounds elsewhere than its reference."""
    device = {"float": "float", "simulation": "even"}[kind]
    for graph, taps in ((P.format(3), (KEY.format(1), "model.layers.1")), (T.format(4), ("lm_head",))):
        spec = world.references.specs[graph]
        answer = fit(spec, "isolated", list(of_mapping(world.healthy(device, "isolated")["isolated"][graph])), {})
        for tap in taps:
            value = next(value for value in spec.outputs if value.tap == tap)
            inputs, suspects = world.references.inputs(spec), tuple(spec.taps)
            raw = answer.arrays[value.name]
            evidence = Evidence(world.references, KINDS[kind], spec, value, inputs, suspects, raw)
            assert likeliest(evidence, CAUSES) is None, (graph, tap)


def test_modules_alone_are_judged(world, tmp_path):
    folder = emit(world.model, tokens=(16, 1), context=64, graphs=["model.layers.1.mlp", "*.0.self_attn.key"],
                  encodings=world.encodings).save(tmp_path / "x")  # fmt: skip
    device = References(folder, world.model)
    outputs = {name: device.run(SIMULATION, spec, device.inputs(spec)) for name, spec in device.specs.items()}
    assert judge(folder, outputs, world.model) and judge(folder, outputs)
    name = "prompt_ar16_cl64_model.layers.1.mlp"
    outputs[name]["model.layers.1.mlp.down_proj"] = outputs[name]["model.layers.1.mlp.down_proj"] * np.float32(1.3)
    verdict = judge(folder, outputs, world.model)
    assert [tensor.graph for tensor in verdict.failures] == [name]
    assert verdict.causes[verdict.guilty.name].name == "scale"
    inner = ("gate_proj", "act_fn", "up_proj", "product", "down_proj")
    assert verdict.suspects == [f"model.layers.1.mlp.{tap}" for tap in inner]
    save_run(verdict, tmp_path / "run.json")
    assert read_run(tmp_path / "run.json").suspects == verdict.suspects


def test_a_tied_head_has_a_grid(tmp_path):
    """A file need not hold it, so what an export needs is more than what a checkpoint must have."""
    model = refimpl.load(write_checkpoint(tmp_path / "m", "Qwen2-7B", tie_word_embeddings=True))
    encodings = calibrate(model, np.arange(64))
    folder = emit(model, tokens=4, context=8, profile="qdq", encodings=encodings, prompt=[1, 2, 3]).save(tmp_path / "x")
    references = References(folder, model)
    outputs = {name: references.run(SIMULATION, s, references.inputs(s)) for name, s in references.specs.items()}
    assert judge(folder, outputs, model) and judge(folder, outputs)


def test_the_loop_and_the_verdict(tiny_model, tmp_path, monkeypatch):
    """Through the real client to a device that quantizes, and back: right is right, and a code too high is told."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "none.ini"))
    monkeypatch.setattr(session, "POLL", 0.0)
    monkeypatch.setattr(connection, "PATIENCE", 0.0)
    model, name = tiny_model("Baichuan2-7B"), "prompt_ar4_cl12_2_of_2"
    encodings = calibrate(model, np.arange(48) % 90)
    folder = emit(model, tokens=(4,), context=12, parts=2, profile="aihub", encodings=encodings).save(tmp_path / "x")
    step = np.float32(encodings[VALUE.format(0)].scale)

    def spoil(graph, outputs):
        return outputs | {"past_value_0_out": outputs["past_value_0_out"] + step} if graph == name else outputs

    for fault in (None, spoil):
        with LoopbackHub(polls=0, **({"spoil": fault} if fault else {})) as hub:
            command = ["hub", "infer", str(folder), "--device", "Loopback Phone", "--api-url", hub.url]
            assert main(command) == 0
        verdict = judge(folder, folder / "outputs" / "loopback-phone", model)
        assert (not verdict) == bool(fault) and verdict.kind == SIMULATION, verdict
        shutil.rmtree(folder / "outputs")
        for ledger in folder.glob("*.jsonl"):
            ledger.unlink()
    assert verdict.guilty.name == f"{name}/isolated/{VALUE.format(0)}"
    assert verdict.causes[verdict.guilty.name].name == "zero point"


def test_the_command(world, faulty, tmp_path, capsys):
    """Exit codes 0, 1 and 2, and every file that a verdict may be written to."""
    good, bad, parts, source = (str(tmp_path / name) for name in ("good.npz", "bad.npz", "parts", "model"))
    write_checkpoint(tmp_path / "model", "Baichuan2-7B", num_hidden_layers=3, hidden_size=128)
    shutil.copytree(world.folder, parts)
    outputs, name = world.healthy("float", "isolated")["isolated"][P.format(3)], P.format(3)
    np.savez(good, **outputs)
    np.savez(bad, **{**outputs, "past_key_1_out": -outputs["past_key_1_out"]})
    assert main(["verify", parts, good, "--graph", name]) == 0
    assert "agrees: 3 tensors" in capsys.readouterr().out
    files = {kind: tmp_path / kind for kind in ("html", "junit", "model-explorer", "save")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    assert main(["verify", parts, bad, "--graph", name, "--model", source, "--json", *options]) == 1
    stored = json.loads(capsys.readouterr().out)
    assert stored == json.loads(files["save"].read_text()) and stored["guilty"].endswith(KEY.format(1))
    assert "opposite sign" in files["html"].read_text() and "opposite sign" in files["junit"].read_text()
    assert list(json.loads(files["model-explorer"].read_text())) == [name]
    run, new = str(files["save"]), str(tmp_path / "new.html")
    assert main(["verify", run]) == 1 and main(["verify", run, "--min-sqnr", "-20"]) == 0
    capsys.readouterr()
    for arguments, said in [
        (["verify", parts, "--html", "x"], "--html belongs to a device's outputs"),
        (["verify", parts, str(tmp_path / "none")], "neither a file nor a folder"),
        (["verify", parts, good, "--model", str(tmp_path / "none")], "is not a folder"),
        (["verify", parts, good, "--graph", name, "--html", str(tmp_path / "no" / "x")], "cannot write"),
        (["verify", good], "is not JSON"),
        (["verify", run, "--model", source, "--chained"], "--chained, --model belongs to a device's outputs; a saved"),
        (
            ["verify", run, "--engine", "reference", "--graph", "nope"],
            "--engine, --graph belongs to a device's outputs",
        ),
        (["verify", parts, "--chained", "--max-over", "0"], "--chained, --max-over belongs to a device's outputs"),
        (["verify", parts, "--max-lsb", "0"], "--max-lsb belongs to a device's outputs"),
        (["verify", run, "--html", new, "--junit", str(tmp_path / "no" / "x")], "no is not a folder; choose another"),
        (["verify", run, "--html", new, "--save", str(tmp_path)], "it is a folder"),
        (["verify", run, "--html", new, "--save", new], "two files would have this name"),
        (["verify", run, "--min-sqnr", "nan"], "min_sqnr is nan"),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not Path(new).exists(), "all or none"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_fault_of_one_layer_is_named_with_other_layers_under_suspicion(world, tmp_path, layer):
    """Where all of them are assumed to have it, nothing explains what one of them does."""
    folder = emit(world.model, tokens=(16,), context=64, parts=1).save(tmp_path / "x")
    references = References(folder, world.model)
    ((name, spec),) = references.specs.items()
    at, seen = f"model.layers.{layer}", {}

    def wrong(tap, x):
        seen[tap] = x
        return seen[f"{at}.attention_residual"] if tap == at else x

    outputs = references.run(FLOAT, spec, references.inputs(spec), change=wrong)
    verdict = judge(folder, {name: outputs}, world.model)
    assert at in verdict.suspects
    assert all("down_proj is not added" in str(cause) or "MLP" in str(cause) for cause in verdict.causes.values())
    assert verdict.causes and not any(cause.partial for cause in verdict.causes.values())
