"""Every profile and every form of a graph is the same model: proven by engines that are not ours."""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

import refimpl
from export import emit, verify
from export.files.encodings import write_encodings
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.profiles import FORMS, PROFILES
from export.preflight.check import check
from export.run.engines import engine_called
from refimpl.cli import main
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl.grids.recipe import Recipe

ENGINES = ["reference", *(["onnxruntime"] if find_spec("onnxruntime") else [])]
HEXAGON = PROFILES["aihub"].forms


@pytest.fixture
def saved(tiny_model, tmp_path):
    def save(family, quantized=None, **options):
        model = tiny_model(family)
        model = model if quantized is None else model.quantize("int4", block_size=32, **quantized)
        parts = emit(model, tokens=(8, 1), context=24, parts=3, **options)
        return parts, parts.save(tmp_path / "x", overwrite=True)

    return save


@pytest.mark.parametrize(
    "forms", [[f] for f in ("conv", "unpack", "heads", "heads=2", "scale-on-key", "rank4")] + [HEXAGON], ids=str
)
def test_a_form_changes_the_graph_and_not_the_numbers(forms, family, saved):
    if forms == ["heads=2"] and "Qwen" in family:
        return  # whose heads share keys
    plain, _ = saved(family)
    parts, folder = saved(family, forms=forms)
    name = "prompt_ar8_cl24_2_of_3"
    ops = [[node.op_type for node in each.graphs[name].proto.graph.node] for each in (plain, parts)]
    same = forms == ["unpack"] and "Qwen" in family  # whose linears are three
    assert (ops[0] == ops[1]) == same or forms == ["scale-on-key"]
    for engine in ENGINES:
        assert (report := verify(folder, engine)), report


def test_fused_operators(family, saved):
    """Opset 23 has norms, RoPE and attention as operators: what remains is the skeleton of the architecture."""
    parts, folder = saved(family, profile="plain", opset=23)
    rope = parts.model.config.rope_theta is not None
    graph = parts.graphs["prompt_ar8_cl24_2_of_3"].proto.graph
    ops = [node.op_type for node in graph.node]
    counts = {op: ops.count(op) for op in ("RMSNormalization", "RotaryEmbedding", "Attention", "Softmax", "Sqrt")}
    assert [*counts.values()] == [2, 2 * rope, 1, 0, 0]
    for engine in ENGINES:
        assert (report := verify(folder, engine)), report


def test_every_form_is_tested():
    assert {*HEXAGON} == set(FORMS) - {"fused", "norm", "heads=N"}


def test_heads_in_groups(saved):
    """Two heads to a projection and to a product: half as many of each."""
    parts, _ = saved("Baichuan2-7B", forms=["heads=2"])
    graph = parts.graphs["prompt_ar8_cl24_2_of_3"].proto.graph
    ops = [node.op_type for node in graph.node]
    assert parts.model.config.num_attention_heads == 4
    assert ops.count("Softmax") == 2 and ops.count("MatMul") == 4 and ops.count("Gemm") == 3 * 2 + 4
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    assert [shapes[f"model.layers.0.self_attn.scores.{i}"] for i in range(2)] == [[1, 2, 8, 24]] * 2


def test_a_norm_is_one_node(family, saved):
    """Of any profile whose opset has it; attention stays in small operations."""
    for forms in (["norm"], ["norm", "rank4"]):
        parts, folder = saved(family, profile="plain", opset=23, forms=forms)
        ops = [node.op_type for node in parts.graphs["prompt_ar8_cl24_2_of_3"].proto.graph.node]
        assert (ops.count("RMSNormalization"), ops.count("Sqrt"), ops.count("Softmax")) == (2, 0, 1)
        for engine in ENGINES:
            assert (report := verify(folder, engine)), report


def test_heads_are_single(saved):
    """Each head has a projection and two products of its own, and a key head serves its group of queries."""
    parts, _ = saved("Qwen2-7B", forms=["heads"])
    graph = parts.graphs["prompt_ar8_cl24_2_of_3"].proto.graph
    config = parts.model.config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    assert heads > keys > 1
    ops = [node.op_type for node in graph.node]
    assert ops.count("Softmax") == heads and ops.count("MatMul") == 2 * heads
    assert ops.count("Gemm") == heads + 2 * keys + 4
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    assert [shapes[f"model.layers.0.self_attn.scores.{h}"] for h in range(heads)] == [[1, 1, 8, 24]] * heads
    made = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    values = [node.input[1] for node in products if "probs" in node.input[0]]
    assert values == [values[h] for head in range(keys) for h in [head * heads // keys] * (heads // keys)]
    assert made["past_key_0_out"].op_type == "Concat" and len(made["past_key_0_out"].input) == keys


def test_what_ai_hub_gets(saved):
    parts, folder = saved("Baichuan2-7B", profile="aihub")
    assert bool(check(folder)), check(folder)
    for name in parts:
        assert {path.name for path in (folder / name).iterdir()} == {"model.onnx", "model.data", "model.encodings"}
        proto = onnx.load(folder / name / "model.onnx", load_external_data=False)
        assert (proto.opset_import[0].version, proto.ir_version) == (17, 8)
        values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
        assert {v.type.tensor_type.elem_type for v in values} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32}
        wide = {i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT64}
        users = {node.op_type for node in proto.graph.node if wide & {*node.input}}
        assert users <= {"Reshape"}, "ONNX wants a Reshape's shape in int64; nothing else has it"
    first, second = (parts.graphs[f"token_ar1_cl24_{i}_of_3"].proto.graph for i in (1, 2))
    assert first.output[0].name == second.input[0].name == "_model_embed_tokens_Gather_Gather_output_0"
    assert second.output[0].name == "_model_layers_0_Add_1_Add_output_0"
    mask = onnx.load_tensor(folder / "test_data" / "prompt_ar8_cl24_2_of_3" / "test_data_set_0" / "input_1.pb")
    assert set(np.unique(onnx.numpy_helper.to_array(mask))) == {-50.0, 0.0}


@pytest.mark.parametrize("options", [{}, {"block_size": 32}, {"block_size": 32, "lpbq": True}], ids=str)
@pytest.mark.parametrize("family", ["Baichuan2-7B", "Baichuan2-13B", "Qwen2-7B"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_on_grids_is_the_simulator(engine, family, options, saved, tiny_model):
    """Both round half to even, so keys and values have the same codes. What remains is the order of float32 sums: now
    and then it crosses a half, which moves a 16-bit tensor by a step, and what follows from it by a few."""
    text = np.random.default_rng(0).integers(3, 90, (1, 60))
    encodings = calibrate(tiny_model(family), text, Recipe(**options))
    _, folder = saved(family, profile="qdq", encodings=encodings)
    plan, _ = read_manifest(folder)
    for spec in (spec for run in plan.runs for spec in run):
        proto = onnx.load(folder / spec.name / "model.onnx", load_external_data=False)
        kinds = {i.data_type for i in proto.graph.initializer if i.name.endswith("_proj.weight.codes")}
        assert kinds <= {onnx.TensorProto.INT4}
        run = engine_called(engine)(folder / spec.name / "model.onnx")
        found = run(None, read_arrays(folder, spec, "input", spec.inputs))
        expected = read_arrays(folder, spec, "simulated", spec.outputs)
        for value, array in zip(spec.outputs, found, strict=True):
            if value.tap in encodings.activations:
                grid = encodings.activations[value.tap]
                codes = np.abs(np.rint((array - expected[value.name]) / np.float32(grid.scale)))
                assert codes.max() <= (0 if grid.bits == 8 else 8), (spec.name, value.name, codes.max())


EXPORT = "import sys, refimpl; from export import emit; emit(refimpl.load(), 8, 24, 2, 'aihub').save(sys.argv[1])"


def test_same_bytes_whatever_the_cores_and_the_blas(tmp_path):
    """Ranges, graphs and what a device should answer: by other kernels of BLAS and NumPy, with another core count."""
    found = []
    for name, more in (("a", {}), ("b", {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1",
                                         "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD"})):  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", EXPORT, str(tmp_path / name)]
        subprocess.run(command, check=True, env={**os.environ, **more}, cwd=Path(__file__).parents[2])
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).digest() for f in files})
    assert len(found[0]) > 30 and found[0] == found[1]


@pytest.mark.parametrize("quantized", [{}, {"symmetric": False}], ids=str)
def test_matmulnbits_computes_with_the_same_weights(saved, quantized):
    parts, folder = saved("Qwen2-7B", quantized, profile="matmulnbits")
    graph = parts.graphs["token_ar1_cl24_2_of_3"].proto
    assert [node.op_type for node in graph.graph.node].count("MatMulNBits") == 7
    assert [o.domain for o in graph.opset_import] == ["", "com.microsoft"]
    for engine in ENGINES:
        assert (report := verify(folder, engine)), report
    with pytest.raises(InputError, match="has none; quantize it to int4"):
        saved("Qwen2-7B", profile="matmulnbits")


def test_a_graph_on_grids_agrees_by_the_command_too(saved, tmp_path, capsys):
    """refimpl export --profile qdq --encodings, and what refimpl verify says of it: the weights are rounded once."""
    parts, _ = saved("Qwen2-7B")
    encodings = calibrate(parts.model, np.arange(3, 63)[None])
    write_encodings(encodings, tmp_path / "e.json")
    parts.model.save(tmp_path / "model")
    options = ["--tokens", "8", "--context", "24", "--parts", "2", "--profile", "qdq"]
    command = ["export", str(tmp_path / "model"), *options, "--encodings", str(tmp_path / "e.json")]
    assert main([*command, "--out", str(tmp_path / "q")]) == 0
    emit(parts.model, 8, 24, 2, "qdq", encodings=encodings).save(tmp_path / "same")
    name = "prompt_ar8_cl24_2_of_2"
    assert (tmp_path / "q" / name / "model.data").read_bytes() == (tmp_path / "same" / name / "model.data").read_bytes()
    assert main(["verify", str(tmp_path / "q")]) == 0
    assert "agrees" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "r"), "--int4", "32"]) == 2
    assert main([*command, "--out", str(tmp_path / "r"), "--opset", "17"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "give the unquantized model" in said[0] and "opset is 17" in said[1] and len(said) == 2


def test_what_the_prompt_alone_calibrates_is_said(capsys, tmp_path):
    assert main(["export", "--profile", "aihub", "--tokens", "8", "--context", "24", "--out", str(tmp_path / "x")]) == 0
    assert "tokens of the prompt, too few for a device" in capsys.readouterr().out


def test_a_split_that_does_not_divide():
    with pytest.raises(InputError, match=r"parts is 3, but 3 layers do not divide into 2 .*; 1, 2, 4 do"):
        emit(refimpl.load(), 8, 24, 3, "aihub")
    assert len(emit(refimpl.load(), 8, 24, 3, "plain")) == 3


def test_unknown_words(saved):
    with pytest.raises(InputError, match="expected one of plain, aihub, qdq, matmulnbits"):
        saved("Qwen2-7B", profile="phone")
    with pytest.raises(InputError, match="convolution is not a form"):
        saved("Qwen2-7B", forms=["convolution"])
    with pytest.raises(InputError, match="fused needs 23"):
        saved("Qwen2-7B", forms=["fused"])
    with pytest.raises(InputError, match="norm needs 23"):
        saved("Qwen2-7B", forms=["norm"])
    with pytest.raises(InputError, match="heads=N is not a form"):
        saved("Qwen2-7B", forms=["heads=N"])
    with pytest.raises(InputError, match="4 heads share 2 key heads, but in the form heads=2 each has its own"):
        saved("Qwen2-7B", forms=["heads=2"])
    with pytest.raises(InputError, match="4 heads do not divide into groups of 3"):
        saved("Baichuan2-7B", forms=["heads=3"])
    with pytest.raises(InputError, match="heads, heads=2 take heads apart in different ways"):
        saved("Baichuan2-7B", forms=["heads", "heads=2"])
