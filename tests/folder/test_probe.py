"""Modules and operations alone, probes and models of few layers: each agrees with the oracle in engines not ours."""

from importlib.util import find_spec

import numpy as np
import pytest

from export import emit, probed, read_device, verify
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.cut import matching_modules
from export.preflight.check import check
from refimpl.config import FAMILIES
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.names import taps

ENGINES = ["reference", *(["onnxruntime"] if find_spec("onnxruntime") else [])]
FAST = ENGINES[-1]
SIZES = dict(tokens=(8, 1), context=24)
ATTENTION = "model.layers.0.self_attn"
KINDS = [
    pytest.param({}, id="plain"),
    pytest.param({"opset": 23}, id="fused"),
    pytest.param({"profile": "aihub"}, id="aihub"),
    pytest.param({"forms": ["unpack"]}, id="unpack"),
    pytest.param({"profile": "qdq"}, id="qdq"),
    pytest.param({"profile": "matmulnbits"}, id="matmulnbits"),
]


@pytest.fixture
def saved(tiny_model, tmp_path):
    def save(family, **options):
        model = tiny_model(family)
        if options.get("profile") in ("qdq", "matmulnbits") and "encodings" not in options:
            model = model.quantize("int4", block_size=32)
        parts = emit(model, **{**SIZES, **options})
        return parts, parts.save(tmp_path / "x", overwrite=True)

    return save


def ends(parts, name):
    graph = parts.graphs[name].proto.graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def families(options):
    """All of them as they are; in a form, those that differ in it: packed and not, RoPE and ALiBi, fewer key heads."""
    if not options:
        return FAMILIES
    both = ["Qwen2-7B", "Baichuan2-13B"]
    return {"matmulnbits": both[:1], "unpack": both[1:]}.get(
        options.get("profile") or str(*options.get("forms", [])), both
    )


CASES = [pytest.param(name, *kind.values, id=f"{name}-{kind.id}") for kind in KINDS for name in families(*kind.values)]


@pytest.mark.parametrize("family, options", CASES)
def test_every_module_and_every_tap_alone(family, options, saved, tiny_model):
    """Each tap is a graph alone, and each module in turn; the second layer follows the first, as others do theirs."""
    config, hidden = tiny_model(family).config, ("scores", "probs") if options.get("opset") == 23 else ()
    rows = [name for name in taps(config) if not name.startswith("model.layers.0") and name != "model.layers.1"]
    rows = [name for name in rows if name.rpartition(".")[2] not in hidden]
    groups = [rows, ["*.1"], ["*.1.mlp", "*.1.self_attn"], ["model"], ["model.layers"]]
    for group in groups if not options else groups[:3]:
        parts, folder = saved(family, graphs=group, **options, **({"tokens": 5} if options else {}))
        assert (report := verify(folder, FAST)), report
        chosen = matching_modules(config, group)
        kinds = ("prompt_ar5",) if options else ("prompt_ar8", "token_ar1")
        assert list(parts) == [f"{kind}_cl24_{name}" for kind in kinds for name in chosen]
        assert {tensor.name.split("/")[0] for tensor in report.tensors} == set(parts)


@pytest.mark.parametrize("family, options", CASES)
def test_every_tap_as_a_probe(family, options, saved, tiny_model):
    """What a form takes apart is joined, what it has inside a node is refused; normal outputs come first."""
    config = tiny_model(family).config
    hidden = "[!s]*" if options.get("opset") == 23 else ""
    probe = [name for name in taps(config) if not (hidden and name.rpartition(".")[2] in ("scores", "probs"))]
    parts, folder = saved(family, parts=2, probe=probe, **options)
    plain, _ = read_manifest(folder)
    for run in plain.runs:
        for spec in run:
            outputs = ends(parts, spec.name)[1]
            assert outputs[: len(spec.whole.outputs)] == [value.name for value in spec.whole.outputs]
            assert {value.tap for value in spec.outputs} >= set(spec.taps) & set(probe)
    report = verify(folder, FAST)
    assert report, report
    for way in ("isolated", "chained"):
        shown = {tensor.name.split("/")[2] for tensor in report.tensors if f"/{way}/" in tensor.name}
        assert shown == {*probe, "model.embed_tokens"}
    if hidden:
        with pytest.raises(
            InputError, match=r"fused has model.layers.0.self_attn.scores, .*probs and 2 more inside a n"
        ):
            saved(family, probe=["*.scores", "*.probs"], **options)


def test_what_goes_in_and_out(saved):
    """The nearest taps outside come in; what is read outside goes out, keys and values to the cache."""
    cases = {
        "model.layers.1.mlp": (["model.layers.1.post_attention_layernorm"], ["model.layers.1.mlp.down_proj"]),
        f"{ATTENTION}.scores": ([f"{ATTENTION}.query", f"{ATTENTION}.key", "past_key_0_in"], [f"{ATTENTION}.scores"]),
        f"{ATTENTION}.query": ([f"{ATTENTION}.W_pack", "position_ids_cos", "position_ids_sin"], [f"{ATTENTION}.query"]),
        f"{ATTENTION}.probs": ([f"{ATTENTION}.scores", "attention_mask"], [f"{ATTENTION}.probs"]),
        f"{ATTENTION}.value": ([f"{ATTENTION}.W_pack"], ["past_value_0_out"]),
        "model.layers.1": (
            ["model.layers.0", "attention_mask", "position_ids_cos", "position_ids_sin", "past_key_1_in",
             "past_value_1_in"],
            ["model.layers.1", "past_key_1_out", "past_value_1_out"],
        ),
        "model.embed_tokens": (["input_ids"], ["model.embed_tokens"]),
        "lm_head": (["model.norm"], ["logits"]),
    }  # fmt: skip
    for module, expected in cases.items():
        parts, _ = saved("Baichuan2-7B", graphs=module)
        assert ends(parts, f"token_ar1_cl24_{module}") == expected, module
    parts, _ = saved("Baichuan2-7B", graphs=f"{ATTENTION}.context", opset=23)
    (built,) = [built for name, built in parts.graphs.items() if name.startswith("token")]
    assert [n.op_type for n in built.proto.graph.node if n.op_type not in ("Transpose", "Concat", "Reshape")] == [
        "Attention"
    ]


def test_a_module_is_the_same_alone_and_in_its_part(saved):
    """Shapes, operators and golden values are those of the real part, so what a compiler says of one holds for both."""
    part, folder = saved("Qwen2-7B", parts=2, probe=["*"], profile="aihub")
    plan, _ = read_manifest(folder)
    inside = {spec.name: (read_arrays(folder, spec, "output", spec.outputs), spec) for run in plan.runs for spec in run}
    alone, folder = saved("Qwen2-7B", graphs=["model.layers.?"], profile="aihub")
    assert bool(check(folder)), check(folder)
    plan, _ = read_manifest(folder)
    ops = [node.op_type for name, built in part.graphs.items() if "ar8" in name for node in built.proto.graph.node]
    found = [node.op_type for name, built in alone.graphs.items() if "ar8" in name for node in built.proto.graph.node]
    assert [found.count(op) for op in ("Conv", "Softmax", "MatMul")] == [
        ops.count(op) - (op == "Conv") for op in ("Conv", "Softmax", "MatMul")
    ]
    for spec in (spec for run in plan.runs for spec in run):
        outputs, whole = inside[spec.name.split("model.")[0] + "2_of_2"]
        for value in spec.outputs:
            a = read_arrays(folder, spec, "output", spec.outputs)[value.name]
            b = outputs[
                value.name if value.name in outputs else next(v.name for v in whole.outputs if v.tap == value.tap)
            ]
            assert a.shape == b.shape
            a, b = (np.moveaxis(x, value.token_axis, 0)[-spec.real :] for x in (a, b))
            if spec.tokens > 1:  # tokens go on from other tokens
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_simulation_of_a_graph_alone(saved, tiny_model):
    """Each aihub graph has its encodings, and what a quantized device should answer of its golden inputs."""
    text = np.random.default_rng(0).integers(3, 90, (1, 60))
    encodings = calibrate(tiny_model("Baichuan2-7B"), text)
    _, folder = saved("Baichuan2-7B", graphs=["*.mlp", "*.1.self_attn"], profile="aihub", encodings=encodings)
    plan, _ = read_manifest(folder)
    for spec in (spec for run in plan.runs for spec in run):
        assert (folder / spec.name / "model.encodings").is_file()
        simulated, exact = (read_arrays(folder, spec, kind, spec.outputs) for kind in ("simulated", "output"))
        for value in spec.outputs:
            error = np.abs(simulated[value.name] - exact[value.name]).max() / np.abs(exact[value.name]).max()
            assert 0 < error < 0.5, (value.name, error)
    trace = read_device(folder, {"model.layers.1.mlp.down_proj": np.zeros((1, 1, 64), np.float32)})
    assert list(trace) == ["token_ar1_cl24_model.layers.1.mlp/isolated/model.layers.1.mlp.down_proj"]


def test_one_graph_of_an_export_with_probes_or_cut_off_at_them(saved, tiny_model, tmp_path):
    model = tiny_model("Qwen2-7B")
    parts, folder = saved("Qwen2-7B", parts=3, profile="aihub")
    name, tap = "token_ar1_cl24_2_of_3", f"{ATTENTION}.scores"
    for until in (False, True):
        one = probed(folder, model, name, [tap], until)
        inputs, outputs = ends(one, name)
        assert outputs == [tap] if until else outputs == [*ends(parts, name)[1], tap]
        assert ("past_value_0_in" in inputs) != until and ("attention_mask" in inputs) != until
        saved_one = one.save(tmp_path / f"{until}")
        for engine in ENGINES:
            report = verify(saved_one, engine)
            assert report and len(report.tensors) == len(outputs), report
        old, new = (read_manifest(each)[0] for each in (folder, saved_one))
        (spec,) = new.runs[0]
        was = next(s for run in old.runs for s in run if s.name == name)
        before = read_arrays(folder, was, "input", was.inputs)
        assert all((before[k] == x).all() for k, x in read_arrays(saved_one, spec, "input", spec.inputs).items())
        values = {tap: read_arrays(saved_one, spec, "output", spec.outputs)[tap]}
        assert list(read_device(saved_one, values)) == [f"{name}/isolated/{tap}"]
    for call, said in [
        ((folder, model, "token_ar1_cl24_2_of_4", tap), "there is no graph .*; near it are .*2_of_3"),
        ((folder, model, "token_ar1_cl24_1_of_3", tap), "no graph here computes model.layers.0.self_attn.scores"),
        ((folder, model, name, "*.score"), "no tensor or module is called '\\*.score'; near it are \\*.scores"),
        ((folder, model, name, (), True), "nothing says where the graph ends"),
        ((folder, tiny_model("Baichuan2-7B"), name, tap), "an export of another model: its family is 'Qwen2-7B'"),
        ((folder, model.quantize("int4", block_size=32), name, tap), "an export of other weights"),
    ]:
        with pytest.raises(InputError, match=said):
            probed(*call)


def test_the_first_layers_alone(family, saved, tiny_model):
    """A model of one layer has the same names and weights, and is what its own first layer, norm and head make."""
    model = tiny_model(family)
    encodings = calibrate(model, [[5, 6, 7, 8]])
    _, folder = saved(family, parts=2, layers=1, encodings=encodings, profile="aihub")
    assert (report := verify(folder, FAST)), report
    small = model.truncated(1)
    assert small.config.num_hidden_layers == 1 and [n for n in model.weights if n not in small.weights] == [
        n for n in model.weights if n.startswith("model.layers.1.")
    ]
    ids = [3, 1, 4, 15]
    np.testing.assert_array_equal(small.trace(ids)["model.layers.0"], model.trace(ids)["model.layers.0"])
    assert [n for n in small.trace(ids) if n not in model.trace(ids)] == []
    for layers in (0, 3, True, 1.5):
        with pytest.raises(InputError, match=f"layers is {layers}, expected 1 to 2"):
            model.truncated(layers)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"graphs": "model.layers.3.mlp"},
            "no tensor or module is called 'model.layers.3.mlp'; near it are model.layers",
        ),
        ({"graphs": ["*.mlp", "*.nlp"]}, r"is called '\*.nlp'"),
        ({"probe": "model.layers.0.self_attn.score"}, "near it are model.layers.0.self_attn.scores"),
        ({"graphs": "*.mlp", "probe": "*.scores"}, "no graph here computes model.layers.0.self_attn.scores"),
        ({"graphs": "*.mlp", "parts": 2}, "parts is 2, but the graphs are modules"),
        ({"graphs": "*.scores", "opset": 23}, "fused has model.layers.0.self_attn.scores inside a node"),
        ({"layers": 9}, "layers is 9, expected 1 to 2"),
    ],
)
def test_what_does_not_exist_is_one_line(saved, options, said):
    with pytest.raises(InputError, match=said) as error:
        saved("Baichuan2-7B", **options)
    assert "\n" not in str(error.value)


def test_a_wrong_graph_alone_is_found(saved, monkeypatch):
    """What is wrong in one operation shows in its graph, and in no other."""
    from export.graphs.ops import OnnxOps

    honest = OnnxOps.sigmoid
    monkeypatch.setattr(OnnxOps, "sigmoid", lambda ops, x: honest(ops, x * 1.001))
    _, folder = saved("Baichuan2-7B", graphs=["*.1.mlp.*"])
    report = verify(folder, "reference")
    failed = {tensor.name.split("/")[2] for tensor in report.failures}
    assert failed == {"model.layers.1.mlp.act_fn"}, report


def test_a_probe_in_a_graph_alone(saved):
    parts, folder = saved("Baichuan2-7B", graphs="*.0.mlp", probe="*.act_fn")
    assert ends(parts, "token_ar1_cl24_model.layers.0.mlp")[1] == [
        f"model.layers.0.mlp.{n}" for n in ("down_proj", "act_fn")
    ]
    assert verify(folder, FAST)


def test_the_command_line(tiny_folder, tmp_path, capsys):
    from refimpl.cli import main

    model, out = str(tiny_folder("Baichuan2-13B")), str(tmp_path / "x")
    sizes = ["--out", out, "--tokens", "8,1", "--context", "24", "--force"]
    for options, graphs in [
        (["--graph", "*.0.mlp", "--graph", "lm_head"], 4),
        (["--layers", "1", "--probe", "*.mlp.*"], 4),
    ]:
        assert main(["export", model, *sizes, *options]) == 0 and main(["verify", out]) == 0
        assert f"{graphs} graphs are in" in capsys.readouterr().out
    for options, said in [(["--probe", "*.act_fm"], "near it are *.act_fn"), (["--layers", "0"], "expected 1 to 2"),
                          (["--graph", "*.mlp", "--parts", "2"], "give one of the two")]:  # fmt: skip
        assert main(["export", model, *sizes, *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", ["Baichuan2-7B", "Qwen2-7B"])
def test_an_operation_alone_on_grids_is_the_simulators(family, saved, tiny_model):
    """From the same codes, one operation gives the same codes; now and then the order of a sum crosses a half."""
    onnxruntime = pytest.importorskip("onnxruntime")
    config = tiny_model(family).config
    encodings = calibrate(tiny_model(family), np.random.default_rng(0).integers(3, 90, (1, 60)))
    rows = [name for name in taps(config) if name.startswith("model.layers.1.")]
    _, folder = saved(family, graphs=rows, profile="qdq", encodings=encodings, tokens=8)
    plan, _ = read_manifest(folder)
    for spec in plan.runs[0]:
        session = onnxruntime.InferenceSession(folder / spec.name / "model.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, read_arrays(folder, spec, "input", spec.inputs))
        expected = read_arrays(folder, spec, "simulated", spec.outputs)
        for value, array in zip(spec.outputs, found, strict=True):
            if value.tap in encodings.activations:
                grid = encodings.activations[value.tap]
                codes = np.abs(np.rint((array - expected[value.name]) / np.float32(grid.scale)))
                assert codes.max() <= 1 and np.mean(codes > 0) < 0.05, (spec.name, codes.max(), np.mean(codes > 0))
