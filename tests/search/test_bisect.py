"""Whatever is wrong in a device's graph, the bisection names it, in no more runs than it may take."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import loopback_hub
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import emit
from export.files.encodings import write_encodings
from export.folder.manifest import read_manifest
from export.hub import connection, session
from export.hub.session import Session
from export.measure.kinds import EVEN, FLOAT, SIMULATION
from export.measure.limits import Thresholds
from export.measure.places import Dataflow
from export.measure.references import References
from export.run.engines import Engine
from export.run.executor import ends
from export.run.ledger import lock
from export.search.bisection import JOURNAL, Probing, bisect
from export.search.one_graph import OneGraph
from export.search.planner import Planner
from refimpl import load
from refimpl.cli import main
from refimpl.config import FAMILIES
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate

HEADS = ["conv", "heads", "unpack", "rank4", "scale-on-key"]  # the forms of the profile aihub


def scaled(values, factor=1.3):
    """A fault: the values of those names are `factor` times what they should be."""

    def edit(graph):
        nodes = []
        for node in graph.node:
            nodes.append(node)
            for i, name in enumerate(node.output):
                if name in values:
                    node.output[i] = f"{name}.right"
                    nodes.append(helper.make_node("Mul", [node.output[i], "fault"], [name], name=f"{name}.fault"))
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        if any(node.name.endswith(".fault") for node in kept):
            graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "fault"))

    return edit


def changed(name, change):
    """A fault: the node of that name is changed, where it is still there."""

    def edit(graph):
        for node in graph.node:
            if node.name == name:
                change(node, graph)

    return edit


class Faulty:
    """A device that compiles a graph wrongly: it runs what an edit leaves of it. `runs` are the outputs of each."""

    def __init__(self, tmp_path, *edits, engine="auto"):
        self.folder, self.edits, self.engine, self.runs = tmp_path / "device", edits, engine, []

    def run(self, graph, inputs):
        self.runs.append(list(ends(graph)[1]))
        target = self.folder / graph.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(graph, target)
        model = onnx.load(target / "model.onnx", load_external_data=False)
        for edit in self.edits:
            edit(model.graph)
        (target / "model.onnx").write_bytes(model.SerializeToString())
        return Engine(self.engine).run(target, inputs)


class Recalled:
    """A faulty device that has run once, with everything shown: it recalls what each other run would give."""

    def __init__(self, tmp_path, flow, edit):
        shutil.rmtree(tmp_path / "all", ignore_errors=True)
        self.graph = flow.save(tmp_path / "all", list(flow.places))
        model = onnx.load(self.graph / "model.onnx", load_external_data=False)
        edit(model.graph)
        (self.graph / "model.onnx").write_bytes(model.SerializeToString())
        self.given = None

    def run(self, graph, inputs):
        if self.given is None:
            (self.given,) = Engine().run(self.graph, inputs)
        return [{name: self.given[name] for name in ends(graph)[1]}]


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A small export of one graph, and its model."""
    model = tiny_model("Baichuan2-7B")
    return emit(model, tokens=(4,), context=12, parts=1).save(tmp_path / "saved"), model


@pytest.fixture
def unexplained(monkeypatch):
    """Causes take longer than all else, and are tested elsewhere."""
    monkeypatch.setattr(OneGraph, "cause", lambda *_: None)


def flow_of(folder, number=0):
    plan, _ = read_manifest(folder, weights=False)
    spec = [spec for run in plan.runs for spec in run][number]
    return Dataflow(folder / spec.name, spec)


@pytest.mark.parametrize(
    "family, layers, forms, probes",
    [*((family, 1, None, 1) for family in FAMILIES), ("Baichuan2-13B", 1, HEADS, 1),
     ("Baichuan2-7B", 2, None, 1), ("Baichuan2-7B", 1, None, 3)],
)  # fmt: skip
def test_every_tap_is_named_within_the_bound(tiny_model, tmp_path, unexplained, family, layers, forms, probes):
    model = tiny_model(family).truncated(layers)
    folder = emit(model, tokens=(4,), context=12, parts=1, forms=forms).save(tmp_path / "x")
    flow, runs = flow_of(folder), []
    last = f"model.layers.{layers - 1}"
    for place in flow.places.values():
        found = bisect(folder, Recalled(tmp_path, flow, scaled(place.values)), model, how=Probing(probes=probes))
        if place.name == last:  # a norm comes next, and nothing else: it makes good for the factor
            assert found and found.guilty is None
            continue
        assert found.guilty == place.name, found
        assert len(found.runs) <= found.bound == math.ceil(math.log2(found.taps)) + 1, found
        assert found.first.given.keys() == flow.behind[place.name].keys(), "both sides of the operation were seen"
        runs.append(len(found.runs))
    taps = 17 * layers + 3 + 2 * layers * (family == "Qwen2-7B")
    assert len(runs) + 1 == len(flow.places) == taps + 2 * layers and found.taps == taps
    if probes > 1:
        assert max(runs) <= math.ceil(math.log(taps, probes + 1)) + 1 and np.mean(runs) < 4


@pytest.mark.parametrize(
    "profile, forms, opset",
    [("plain", ["unpack"], None), ("plain", ["unpack", "heads"], None), ("plain", ["conv", "unpack"], None),
     ("plain", None, 23), ("aihub", None, None), ("qdq", None, None)],
)  # fmt: skip
def test_all_inside_of_a_healthy_graph_is_right(tiny_model, tmp_path, monkeypatch, profile, forms, opset):
    """In every form, and with no more references kept than a run needs: nothing is shown in another layout."""
    model = tiny_model("Baichuan2-7B").truncated(1)
    encodings = None if profile == "plain" else calibrate(model, np.arange(48) % 90)
    parts = emit(model, tokens=(4,), context=12, profile=profile, forms=forms, opset=opset, encodings=encodings)
    folder = parts.save(tmp_path / "x")
    flow, judge = flow_of(folder), OneGraph(References(folder, model), flow_of(folder))
    (given,) = Engine().run(flow.save(tmp_path / "all", list(flow.places)), [judge.inputs])
    monkeypatch.setattr(sys.modules["export.search.one_graph"], "KEPT", 0)
    figures = judge.compared(SIMULATION if profile == "qdq" else FLOAT, list(flow.places.values()), given)
    assert len(figures) == len(flow.places) == (20 if opset else 22)
    assert {name: one.problem or one.needs.rows for name, one in figures.items() if Thresholds().excess(one) > 1} == {}
    without = bisect(folder, Engine())
    assert without, without


def test_each_head_is_named(tiny_model, tmp_path, unexplained):
    model = tiny_model("Qwen2-7B")
    folder = emit(model, tokens=(4,), context=12, parts=1, forms=HEADS).save(tmp_path / "x")
    flow = flow_of(folder)
    for tap in ("q_proj", "k_proj", "query", "key", "scores", "probs"):
        place = flow.places[f"model.layers.1.self_attn.{tap}"]
        assert len(place.values) == (2 if tap in ("k_proj", "key") else 4)
        found = bisect(folder, Recalled(tmp_path, flow, scaled(place.values[1:2])), model)
        assert (found.guilty, found.first.pieces) == (place.name, (f"{place.name}.1",)), found
        assert len(found.runs) <= found.bound and f"wrong only in {place.name}.1" in str(found)
        others = [
            node.name for node in flow.nodes[place.name] if ({*place.values} - {place.values[1]}) & {*node.output}
        ]
        gives = [node.name for node in flow.nodes[place.name] if place.values[1] in node.output]
        named = [name for _, name in found.first.nodes]
        assert set(gives) <= set(named) and not set(others) & set(named), "the operations of that head alone"


def swap(node, graph):
    node.input[:] = list(node.input)[::-1]


def drop(node, graph):
    node.op_type = "Identity"
    del node.input[1:]


def constant(at, value):
    def change(node, graph):
        old = next(one for one in graph.initializer if one.name == node.input[at])
        array = np.broadcast_to(np.array(value, numpy_helper.to_array(old).dtype), tuple(old.dims))
        graph.initializer.append(numpy_helper.from_array(array.copy(), "wrong"))
        node.input[at] = "wrong"

    return change


def other(op=None, **words):
    def change(node, graph):
        node.op_type = op or node.op_type
        kept = [helper.make_attribute(name, value) for name, value in words.items()]
        kept += [one for one in node.attribute if one.name not in words]
        kept = [onnx.AttributeProto.FromString(one.SerializeToString()) for one in kept]
        del node.attribute[:]
        node.attribute.extend(kept)

    return change


def weight(name):
    def change(node, graph):
        node.input[1] = name

    return change


def node_of(flow, place, op):
    """The first node of a kind of those that compute a place."""
    return next(node.name for node in flow.nodes[place] if node.op_type == op)


LAYER = "model.layers.1"
OPERATIONS = [
    ("self_attn.query", "Sub", swap), ("self_attn.key", "Add", drop), ("self_attn.scores", "Mul", constant(1, 0.3)),
    ("self_attn.probs", "Softmax", other(axis=2)), ("self_attn.probs", "Add", drop),
    ("self_attn.context", "Transpose", other(perm=[0, 1, 3, 2])), ("attention_residual", "Add", drop),
    ("post_attention_layernorm", "Add", constant(1, 0.1)), ("mlp.act_fn", "Sigmoid", other(op="Tanh")),
    ("mlp.up_proj", "Gemm", other(alpha=1.01)), ("", "Add", drop),
    ("self_attn.W_pack", "Gemm", weight("model.layers.0.self_attn.W_pack.weight")),
]  # fmt: skip


@pytest.mark.parametrize("at, fault", list(enumerate(OPERATIONS)))
def test_wrong_operations_are_named(saved, tmp_path, unexplained, at, fault):
    (folder, model), (what, op, change), until = saved, fault, at % 2 == 1
    flow = flow_of(folder)
    place = f"{LAYER}.{what}".rstrip(".")
    if what == "self_attn.context":  # the first puts the past in place; the last puts heads side by side
        name = [node.name for node in flow.nodes[place] if node.op_type == "Transpose"][-1]
        change = other(perm=[0, 1, 2, 3])
    else:
        name = node_of(flow, place, op)
    device = Faulty(tmp_path, changed(name, change))
    found = bisect(folder, device, model, how=Probing(until=until))
    assert found.guilty == place and name in [name for _, name in found.first.nodes], found
    assert len(device.runs) == len(found.runs) <= found.bound
    assert not list((folder).glob(".bisect-*")), "what was sent is not left behind"
    assert all(("logits" in run) != until for run in device.runs[1:])


def test_what_is_printed(saved, tmp_path, capsys):
    folder, model = saved
    found = bisect(folder, Faulty(tmp_path, scaled([f"{LAYER}.mlp.act_fn"])), model)
    text = str(found)
    assert not found and found.summary in text and found.spread == ("lm_head",)
    assert "Outputs that follow from it are wrong anyway, so other faults may hide there. Mend it" in text
    assert "layer 1, mlp.act_fn: SiLU of the gate" in text and "computed by Sigmoid Sigmoid_1, Mul" in text
    assert f"from what is right: {LAYER}.mlp.gate_proj (" in text
    assert "Likely cause: all values are 1.3 times" in text and "at most 7 for one fault among 37 taps" in text
    stored = json.loads(found.to_json())
    assert stored["layer"] == 1 and stored["guilty"] == f"{LAYER}.mlp.act_fn" and not stored["agrees"]
    assert [run["showed"] for run in stored["runs"]] == [list(run.showed) for run in found.runs]


def test_a_healthy_graph(saved, tmp_path):
    folder, model = saved
    for reference in (model, None):
        found = bisect(folder, Engine(), reference)
        assert found and str(found).startswith("agrees: ") and "nothing to localise" in str(found)
        assert json.loads(found.to_json())["agrees"]


def test_without_the_model_the_graph_itself_is_the_reference(saved, tmp_path, unexplained):
    folder, _ = saved
    found = bisect(folder, Faulty(tmp_path, scaled([f"{LAYER}.self_attn.o_proj"])))
    assert found.guilty == f"{LAYER}.self_attn.o_proj" and len(found.runs) <= found.bound


@pytest.mark.parametrize("signed, message", [(False, "is not the file of"), (True, "does not give its own goldens")])
def test_a_graph_that_is_wrong_itself_is_no_reference(saved, unexplained, signed, message):
    """Without the model it would be held against itself: whether the manifest knows its bytes or not."""
    folder, model = saved
    flow = flow_of(folder)
    path, manifest = flow.folder / "model.onnx", json.loads((folder / "manifest.json").read_text())
    proto = onnx.load(path, load_external_data=False)
    scaled([f"{LAYER}.mlp.act_fn"])(proto.graph)
    path.write_bytes(proto.SerializeToString())
    if signed:
        data = path.read_bytes()
        manifest["files"][f"{flow.spec.name}/model.onnx"] = {
            "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        bisect(folder, Engine())
    assert bisect(folder, Engine(), model).guilty == f"{LAYER}.mlp.act_fn"


def test_several_faults(saved, tmp_path, unexplained):
    """The one that is found has none before it, and what cannot come of it is told."""
    folder, model = saved
    for values, guilty, beside in (
        (["model.layers.0.mlp.up_proj", f"{LAYER}.self_attn.probs"], "model.layers.0.mlp.up_proj", ()),
        (["model.layers.0.self_attn.key", "model.layers.0.self_attn.value"], "model.layers.0.self_attn.key",
         ("past_value_0_out",)),
        (["past_key_1_out", "lm_head", "model.norm"], "past_key_1_out", ()),
    ):  # fmt: skip
        found = bisect(folder, Faulty(tmp_path / guilty, scaled(values)), model)
        assert (found.guilty, found.beside) == (guilty, beside), found
        assert ("other faults may hide there" in str(found)) == bool(found.spread)
        assert ("another fault" in str(found)) == bool(beside)


def test_a_fault_that_is_gone_when_it_is_shown(saved, tmp_path, unexplained):
    """A compiler that joins act_fn and product does it wrongly; whoever shows either one keeps it from that."""
    folder, model = saved
    inside = {f"{LAYER}.mlp.act_fn", f"{LAYER}.mlp.product"}
    edit = scaled([f"{LAYER}.mlp.product"])

    def joined(graph):
        if inside.isdisjoint(value.name for value in graph.output):
            edit(graph)

    device = Faulty(tmp_path, joined)
    found = bisect(folder, device, model)
    assert set(found.hidden) & inside and "is gone when" in str(found), found
    assert found.guilty == f"{LAYER}.mlp.down_proj", "the first wrong tensor that can be seen"
    assert (
        set(found.rivals) >= {f"{LAYER}.mlp.product", f"{LAYER}.mlp.down_proj"}
        and "no run can tell which" in found.summary
    )
    known = bisect(folder, Engine(), model, outputs={"logits": np.zeros((1, 4, 96), np.float32)})
    assert known.known and known.hidden and "is gone when" in str(known), "another executor does not have the fault"


def test_known_outputs_save_the_first_run(saved, tmp_path, unexplained):
    folder, model = saved
    device = Faulty(tmp_path, scaled([f"{LAYER}.mlp.act_fn"]))
    whole = bisect(folder, device, model)
    flow = flow_of(folder)
    (outputs,) = device.run(folder / flow.spec.name, [References(folder, model).inputs(flow.spec)])
    device.runs.clear()
    found = bisect(folder, device, model, outputs=outputs)
    assert found.guilty == whole.guilty and len(device.runs) == len(found.runs) == len(whole.runs) - 1
    assert "the outputs were known" in str(found)


def test_an_interrupted_search_goes_on(saved, tmp_path, unexplained):
    folder, model = saved
    edit = scaled([f"{LAYER}.mlp.act_fn"])

    class Killed(Faulty):
        def run(self, graph, inputs):
            if len(self.runs) == 2:
                raise KeyboardInterrupt
            return super().run(graph, inputs)

    first = Killed(tmp_path / "a", edit)
    with pytest.raises(KeyboardInterrupt):
        bisect(folder, first, model, how=Probing(label="phone"))
    assert not list(folder.glob(".bisect-*"))
    (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + b'{"key": "torn')
    second = Faulty(tmp_path / "b", edit)
    found = bisect(folder, second, model, how=Probing(label="phone"))
    whole = Faulty(tmp_path / "c", edit)
    assert str(found) == str(bisect(folder, whole, model, how=Probing(label="another"))) != ""
    assert len(first.runs) + len(second.runs) == len(whole.runs) == len(found.runs)
    third = Faulty(tmp_path / "d", edit)
    assert bisect(folder, third, model, how=Probing(label="phone")).guilty == found.guilty
    assert len(third.runs) <= 1, "once more the run that showed it, for its cause"


KILLED = """
import os, signal, sys
from export.search.bisection import Probing, bisect
from export.run.engines import Engine
from refimpl import load

class Killed:
    runs = 0
    def run(self, graph, inputs):
        self.runs += 1
        if self.runs == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        outputs = Engine().run(graph, inputs)
        outputs[0]["logits"] = outputs[0]["logits"] * 2
        return outputs

bisect(sys.argv[1], Killed(), load(sys.argv[2]), how=Probing(label="phone"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_a_killed_search_has_left_is_removed(tiny_folder, saved, unexplained):
    """And what it has seen is kept."""
    folder, model = saved
    ran = subprocess.run([sys.executable, "-c", KILLED, folder, tiny_folder("Baichuan2-7B")], capture_output=True)
    assert ran.returncode == -9, ran.stderr
    (left,) = folder.glob(".bisect-*")

    class Twice:
        runs = 0

        def run(self, graph, inputs):
            Twice.runs += 1
            assert not left.exists() or graph.parent == left
            outputs = Engine().run(graph, inputs)
            outputs[0]["logits"] = outputs[0]["logits"] * 2
            return outputs

    in_use = folder / ".bisect-used"
    in_use.mkdir()
    with open(in_use / "lock", "ab") as file:
        lock(file)
        found = bisect(folder, Twice(), model, how=Probing(label="phone"))
        assert in_use.exists(), "another search works there"
    assert found.guilty == "lm_head" and Twice.runs == len(found.runs) - 2, "two runs were kept"
    bisect(folder, Engine(), model)
    assert not list(folder.glob(".bisect-*"))


def shifted(value, by):
    """A fault: a constant is added to a value."""

    def edit(graph):
        scaled([value])(graph)
        for node in graph.node:
            if node.name.endswith(".fault"):
                node.op_type = "Add"
        for one in graph.initializer:
            if one.name == "fault":
                one.CopyFrom(numpy_helper.from_array(np.array(by, np.float32), "fault"))

    return edit


def test_what_a_softmax_hides_is_found_in_the_graph(tiny_model, tmp_path, unexplained):
    """The same number is added to all keys: the keys that are given are wrong, and nothing else is."""
    model = tiny_model("Baichuan2-7B")
    folder = emit(model, tokens=(4,), context=12, parts=1, prompt=[1, 2, 3, 4]).save(tmp_path / "x")
    device = Faulty(tmp_path, shifted(f"{LAYER}.self_attn.key", 0.5))
    found = bisect(folder, device, model)
    assert found.guilty == f"{LAYER}.self_attn.key" and found.runs[0].wrong == ("past_key_1_out",), found
    assert len(found.runs) <= found.bound
    assert "No output that follows from it is wrong. Mend it" in str(found) and not found.spread


def test_encodings_may_come_from_a_file(tiny_model, tmp_path, unexplained):
    """The grids of a device whose graphs know none. A search by other grids is another search."""
    model = tiny_model("Baichuan2-7B").truncated(1)
    encodings, others = (calibrate(model, np.arange(n) % 90) for n in (48, 9))
    common = dict(tokens=(4,), context=12, parts=1)
    folder = emit(model, **common).save(tmp_path / "x")
    rounding = emit(model, **common, profile="qdq", encodings=encodings, probe="*").save(tmp_path / "device")
    edit, place = scaled(["model.layers.0.mlp.act_fn.raw"]), "model.layers.0.mlp.act_fn"

    class Quantized:
        """It has grids whatever it is asked for."""

        runs = 0

        def run(self, graph, inputs):
            type(self).runs += 1
            model = onnx.load(rounding / graph.name / "model.onnx")
            edit(model.graph)
            onnx.save(model, tmp_path / "wrong.onnx")
            engine = ort.InferenceSession(tmp_path / "wrong.onnx")
            names = list(ends(graph)[1])
            return [dict(zip(names, engine.run(names, inputs[0]), strict=True))]

    ort = pytest.importorskip("onnxruntime")
    found = bisect(folder, Quantized(), model, encodings=encodings, how=Probing(label="phone"))
    assert found.guilty == place and found.kind in (SIMULATION, EVEN), found
    before = Quantized.runs
    again = bisect(folder, Quantized(), model, encodings=encodings, how=Probing(label="phone"))
    assert str(again) == str(found) and Quantized.runs <= before + 1, "once more the run that showed it"
    before = Quantized.runs
    for other in (others, None):  # without any, it is wrong from its first operation on
        found = bisect(folder, Quantized(), model, encodings=other, how=Probing(label="phone"))
        assert Quantized.runs >= before + len(found.runs), "nothing of another search is taken for this one's"
        before = Quantized.runs
    assert found.guilty != place


def test_a_quantized_device_behind_the_hub(tiny_model, tmp_path, monkeypatch, unexplained):
    """The loopback hub computes on the grids of the encodings, so nothing but the simulation tells right from wrong."""
    import backoff._sync
    import qai_hub.util.session

    monkeypatch.setattr(session, "POLL", 0.0)
    monkeypatch.setattr(connection, "PATIENCE", 0.0)
    monkeypatch.setattr(qai_hub.util.session, "BACKOFF_FACTOR", 0.0)
    monkeypatch.setattr(backoff._sync.time, "sleep", lambda _: None)
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(tmp_path / "client.ini"))
    model = tiny_model("Baichuan2-7B").truncated(1)
    encodings = calibrate(model, np.arange(48) % 90)
    parts = emit(model, tokens=(4,), context=12, parts=1, profile="aihub", encodings=encodings)
    folder = parts.save(tmp_path / "x")
    place, opened = "model.layers.0.self_attn.probs", loopback_hub.opened
    softmax = [node.name for node in flow_of(folder).nodes[place] if node.op_type == "Softmax"]

    def wrongly(proto, engine):
        changed(softmax[2], other(axis=2))(proto.graph)
        return opened(proto, engine)

    with loopback_hub.LoopbackHub() as hub:
        with Session(folder, "Loopback Phone", hub.url) as device:
            assert bisect(folder, device, model), "it is right before it is wrong"
        monkeypatch.setattr(loopback_hub, "opened", wrongly)
        shutil.rmtree(folder / "outputs")
        (folder / "hub.jsonl").unlink()
        for _ in range(2):
            sent = Counter(hub.kinds())
            with Session(folder, "Loopback Phone", hub.url) as device:
                found = bisect(folder, device, model)
            assert (found.guilty, found.first.pieces) == (place, (f"{place}.2",)), found
            assert found.kind in (SIMULATION, EVEN) and len(found.runs) <= found.bound
        assert hub.kinds() == sent, "a second time sends nothing"


def test_bad_input(saved, tmp_path):
    folder, model = saved
    for words, message in (
        (dict(how=Probing("prompt_ar4_cl12_1_of_2")), "near it are"),
        (dict(executor=Engine("x")), "expected auto"), (dict(model=load()), "another model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            bisect(folder, **{"executor": Engine(), "model": model, **words})
    with pytest.raises(InputError, match="1 or more"):
        Probing(probes=0)
    with pytest.raises(InputError):
        bisect(tmp_path, Engine())

    class Transposed:
        def run(self, graph, inputs):
            return [{name: x.T for name, x in outputs.items()} for outputs in Engine().run(graph, inputs)]

    with pytest.raises(InputError, match="the graph says"):
        bisect(folder, Transposed(), model)


def test_the_command(tiny_folder, saved, tmp_path, capsys):
    folder, _ = saved
    model = ["--model", str(tiny_folder("Baichuan2-7B"))]
    assert main(["bisect", str(folder), *model]) == 0
    assert "nothing to localise" in capsys.readouterr().out
    flow = flow_of(folder)
    proto = onnx.load(flow.folder / "model.onnx", load_external_data=False)
    scaled([f"{LAYER}.mlp.act_fn"])(proto.graph)
    (flow.folder / "model.onnx").write_bytes(proto.SerializeToString())
    assert main(["bisect", str(folder), *model, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["guilty"] == f"{LAYER}.mlp.act_fn"
    encodings = tmp_path / "e.json"
    write_encodings(calibrate(load(tiny_folder("Baichuan2-7B")), np.arange(48) % 90), encodings)
    assert main(["bisect", str(folder), *model, "--encodings", str(encodings), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["guilty"] == f"{LAYER}.mlp.act_fn"
    for wrong in (
        ["--encodings", str(folder / "manifest.json")],
        ["--executor", "hub"],
        ["--device", "x"],
        ["--graph", "x"],
        ["--probes-per-run", "0"],
    ):
        assert main(["bisect", str(folder), *model, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    data = flow.folder / "model.data"
    (tmp_path / "other.data").write_bytes(data.read_bytes()[::-1])
    os.utime(tmp_path / "other.data", ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
    (tmp_path / "other.data").replace(data)
    assert main(["bisect", str(folder), *model, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["guilty"] != f"{LAYER}.mlp.act_fn", "what was kept is of other weights"
    data.unlink()
    assert main(["bisect", str(folder), *model]) == 2
    assert "cannot read" in (told := capsys.readouterr().err) and str(data) in told and told.count("\n") == 1


def test_the_planner_sees_what_is_partial(saved):
    """Keys that are right say nothing of the rows of values in W_pack, but of what W_pack follows from."""
    flow = flow_of(saved[0])
    attention = f"{LAYER}.self_attn"
    search = Planner(flow, {f"{attention}.key": True, f"{attention}.context": False})
    assert f"{attention}.W_pack" in search.candidates and f"{LAYER}.input_layernorm" not in search.candidates
    search.seen |= {f"{attention}.query": True, f"{attention}.value": True}
    assert f"{attention}.W_pack" not in search.candidates, "all that follows from it is right"
    search = Planner(flow, {f"{attention}.value": False})
    assert not {f"{attention}.query", f"{attention}.key"} & search.candidates, "they come before it, and not in it"
    search = Planner(flow, {"lm_head": False, f"{LAYER}.post_attention_layernorm": True})
    assert f"{LAYER}.attention_residual" in search.candidates, "a norm does not see a factor"
    assert f"{attention}.o_proj" not in search.candidates
