"""Emitted graphs compute what the oracle says, and `verify` tells when they do not."""

import hashlib
import json
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import emit, verify
from export.folder.manifest import read_scores
from export.graphs.ops import OnnxOps
from export.graphs.part import Part
from refimpl.checkpoint.weights import Weight
from refimpl.errors import InputError

ENGINES = ["reference", "onnxruntime"]
PROMPT = [3, 1, 4, 15, 9, 26]


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
    return request.param


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A small export, to be read or spoilt."""
    return emit(tiny_model("Baichuan2-7B"), tokens=(8, 1), context=24, parts=3).save(tmp_path / "saved")


def test_every_family_agrees(tiny_model, family, engine, tmp_path):
    emit(tiny_model(family), tokens=(8, 1), context=24, parts=3, prompt=PROMPT).save(tmp_path / "x")
    report = verify(tmp_path / "x", engine)
    assert report, report
    names = [tensor.name for tensor in report.tensors]
    assert len(names) == len(set(names)) == 2 * 2 * (1 + 3 + 3)
    assert "token_ar1_cl24_3_of_3/chained/lm_head" in names
    shapes = {tensor.name: tensor.shape for tensor in report.tensors}
    assert shapes["prompt_ar8_cl24_3_of_3/isolated/lm_head"] == (1, 6, 96)
    heads = 2 if family == "Qwen2-7B" else 4
    assert shapes["prompt_ar8_cl24_2_of_3/chained/model.layers.0.self_attn.key"] == (1, heads, 6, 16)


@pytest.mark.parametrize("parts, tokens", [(1, (8, 1)), (2, (8, 4, 1)), (3, (1,)), (3, (16, 15))])
def test_every_cut_and_size_agrees(tiny_model, engine, tmp_path, parts, tokens):
    emit(tiny_model("Baichuan2-13B"), tokens=tokens, context=24, parts=parts).save(tmp_path / "x")
    assert (report := verify(tmp_path / "x", engine)), report


def test_four_bits_agree(tiny_model, family, engine, tmp_path):
    model = tiny_model(family).quantize("int4", block_size=16, keep=["lm_head"])
    emit(model, tokens=(8, 1), context=24, parts=2).save(tmp_path / "x")
    assert (report := verify(tmp_path / "x", engine)), report


# What is wrong in the graph alone: on (ops, inputs, weights) before a part is emitted.
MUTANTS = {
    "cos and sin swapped": lambda ops, inputs, weights: inputs.update(
        position_ids_cos=inputs["position_ids_sin"], position_ids_sin=inputs["position_ids_cos"]
    ),
    "mask shifted by one": lambda ops, inputs, weights: inputs.update(
        attention_mask=ops.concat(ops.split(inputs["attention_mask"], (1, 23))[::-1])
    ),
    "past forgotten": lambda ops, inputs, weights: inputs.update(
        {name: tensor * 0.0 for name, tensor in inputs.items() if name.startswith("past_value")}
    ),
    "position scaled": lambda ops, inputs, weights: inputs.update(position_ids_sin=inputs["position_ids_sin"] * 1.001),
    "a weight off by 0.1 %": lambda ops, inputs, weights: weights.update(
        {"model.layers.0.mlp.up_proj.weight": scaled(weights["model.layers.0.mlp.up_proj.weight"], 1.001)}
    ),
    "rows of the head not normalised": lambda ops, inputs, weights: weights.update(
        {"lm_head.weight": scaled(weights["lm_head.weight"], None)}
    ),
    "gate and up swapped": lambda ops, inputs, weights: weights.update(
        {
            "model.layers.1.mlp.up_proj.weight": weights["model.layers.1.mlp.gate_proj.weight"],
            "model.layers.1.mlp.gate_proj.weight": weights["model.layers.1.mlp.up_proj.weight"],
        }
    ),
}


def scaled(parameter, factor):
    array = parameter.weight.array
    weight = Weight(array if factor is None else array * np.float32(factor))
    return type(parameter).whole(parameter.name, weight)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_graph_is_found(tiny_model, tmp_path, monkeypatch, mutant):
    honest = Part.outputs

    def outputs(part, config, weights, ops, inputs, *tap):
        if isinstance(ops, OnnxOps) and part.layers:
            inputs, weights = dict(inputs), dict(weights)
            MUTANTS[mutant](ops, inputs, weights)
        return honest(part, config, weights, ops, inputs, *tap)

    monkeypatch.setattr(Part, "outputs", outputs)
    emit(tiny_model("Baichuan2-7B"), tokens=(8, 1), context=24, prompt=PROMPT).save(tmp_path / "x")
    report = verify(tmp_path / "x", "reference")
    assert not report
    assert report.worst[0].excess > 10, report


def test_isolated_shows_where_and_chained_what_comes_of_it(tiny_model, tmp_path, monkeypatch):
    honest = Part.outputs

    def outputs(part, config, weights, ops, inputs, *tap):
        if isinstance(ops, OnnxOps) and part.number == 2:
            inputs = {**inputs, "position_ids_cos": inputs["position_ids_sin"]}
        return honest(part, config, weights, ops, inputs, *tap)

    monkeypatch.setattr(Part, "outputs", outputs)
    emit(tiny_model("Baichuan2-7B"), tokens=(8, 1), context=24, parts=3).save(tmp_path / "x")
    report = verify(tmp_path / "x", "reference")
    failed = {tuple(tensor.name.split("/")[:2]) for tensor in report.failures}
    graphs = [f"{kind}_cl24_{i}_of_3" for kind in ("prompt_ar8", "token_ar1") for i in (2, 3)]
    assert failed == {(name, "chained") for name in graphs} | {(name, "isolated") for name in graphs[::2]}
    assert report.failures[0].name == "prompt_ar8_cl24_2_of_3/isolated/model.layers.0"


def change(folder, name, new):
    """Puts other bytes in a file, and their sha256 in the manifest, as somebody who means it would."""
    (folder / name).write_bytes(new)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_padding_is_not_compared_and_everything_else_is(saved):
    data = "test_data/prompt_ar8_cl24_3_of_3/test_data_set_0"
    logits = numpy_helper.to_array(onnx.load_tensor(saved / data / "output_0.pb")).copy()
    logits[:, :2] = 1e6  # six of eight are tokens
    change(saved, f"{data}/output_0.pb", numpy_helper.from_array(logits, "logits").SerializeToString())
    assert verify(saved, "reference")
    logits[:, 2, 0] += 0.01
    change(saved, f"{data}/output_0.pb", numpy_helper.from_array(logits, "logits").SerializeToString())
    report = verify(saved, "reference")
    assert [(tensor.name.split("/")[1:], tensor.index) for tensor in report.failures] == [
        (["isolated", "lm_head"], (0, 0, 0)), (["chained", "lm_head"], (0, 0, 0)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["model.onnx", "model.data"])
def test_a_changed_or_missing_file_is_refused(saved, name):
    path = saved / "token_ar1_cl24_2_of_3" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{name} is not the file"):
        verify(saved, "reference")
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is not the file"):
        verify(saved, "reference")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda m: m.update(format="refimpl export 0"), "has the format 'refimpl export 0'"),
        (lambda m: m.pop("files"), "KeyError 'files'"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m["files"].pop("token_ar1_cl24_2_of_3/model.data"), "KeyError"),
        (lambda m: m["config"].update(num_hidden_layers=1 << 10), "more layers than there are files"),
        (lambda m: m["config"].update(hidden_size="64"), "hidden_size is '64'"),
        (lambda m: m["config"].update(rope_theta="x"), "is damaged"),
        (lambda m: m["config"].update(evil=1), "is damaged"),
        (lambda m: m["config"].update(vocab_size=97), "of prompt_ar8_cl24_3_of_3 is float32 (1, 8, 96), expected"),
        (lambda m: m["plan"].update(context=25), "is damaged: KeyError"),
        (lambda m: m["plan"].update(tokens=[8, "1"]), "whole numbers, not '1'"),
        (lambda m: m["plan"].update(tokens=None), "is damaged"),
        (lambda m: m["plan"].update(prompt=9), "the prompt has 9 tokens"),
        (lambda m: m["plan"].update(prompt=2.0), "whole numbers, not 2.0"),
        (lambda m: m["tolerances"].pop("lm_head"), "KeyError 'lm_head'"),
        (lambda m: m["tolerances"]["lm_head"].update(relative="1"), "a tolerance is not a number"),
        (lambda m: m["tolerances"]["lm_head"].update(relative=float("inf")), "a tolerance is not a number"),
    ],
)
def test_a_damaged_manifest_is_one_line(saved, spoil, said):
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    spoil(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError) as error:
        verify(saved, "reference")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_sizes_of_scores_are_read_or_refused(saved):
    """Exports of before have none; then scores count as small."""
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    for wrong in ([], {"a": "1"}, {"a": -1.0}, {"a": float("nan")}, {"a": 1e300}):
        manifest["golden"]["scores"] = wrong
        path.write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="the sizes of scores are"):
            read_scores(saved)
    del manifest["golden"]["scores"]
    path.write_text(json.dumps(manifest))
    assert read_scores(saved) == {} and verify(saved, "reference")


@pytest.mark.parametrize("kind", ["garbage", "elsewhere", "other shape"])
def test_a_damaged_tensor_is_one_line(saved, kind):
    proto = numpy_helper.from_array(np.zeros((1, 8, 2), np.float32), "model.layers.0")
    if kind == "elsewhere":
        proto.ClearField("raw_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        proto.external_data.add(key="location", value="../../../secret")
    name = "test_data/prompt_ar8_cl24_3_of_3/test_data_set_0/input_0.pb"
    change(saved, name, b"\xff" * 99 if kind == "garbage" else proto.SerializeToString())
    with pytest.raises(InputError) as error:
        verify(saved, "reference")
    assert "\n" not in str(error.value) and "export again" in str(error.value)


def test_a_graph_that_does_not_run_is_one_line(saved, engine):
    name = "prompt_ar8_cl24_2_of_3/model.onnx"
    proto = onnx.load(saved / name, load_external_data=False)
    proto.graph.node[0].op_type = "Nonsense"
    change(saved, name, proto.SerializeToString())
    with pytest.raises(InputError, match="cannot run prompt_ar8_cl24_2_of_3") as error:
        verify(saved, engine)
    assert "\n" not in str(error.value)


def test_engines(saved, monkeypatch):
    with pytest.raises(InputError, match="engine is 'cuda', expected auto, onnxruntime or reference"):
        verify(saved, "cuda")
    monkeypatch.setattr(sys.modules["export.run.engines"], "find_spec", lambda name: None)
    with pytest.raises(InputError, match="onnxruntime is not installed"):
        verify(saved, "onnxruntime")
    assert verify(saved, "auto")  # with the evaluator that is there
    with pytest.raises(InputError, match=r"cannot read .*manifest\.json"):
        verify(saved / "nowhere")
