"""The emitted graphs: their names, shapes and bytes, and that a folder is either whole or not there."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import write_checkpoint
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

import refimpl
from export import emit, verify
from export.folder.manifest import read_scores
from export.graphs.data import Parameter
from export.graphs.part import parts_of
from export.search.bisection import JOURNAL
from golden.compare import compare
from golden.tolerance import largest_scores, tolerances
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.checkpoint.weights import Weight
from refimpl.errors import InputError
from refimpl.names import shape, taps
from refimpl_kernels import formats

PROMPT = [3, 1, 4, 15, 9, 26]


def graph(parts, name):
    return parts.graphs[name].proto.graph


def read(folder, name, kind):
    """The golden inputs or outputs of a graph, by name."""
    files = sorted((folder / "test_data" / name / "test_data_set_0").glob(f"{kind}_*.pb"))
    protos = [onnx.load_tensor(file) for file in files]
    return {proto.name: numpy_helper.to_array(proto) for proto in protos}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_tap_is_a_value_of_its_shape(tiny_model, family):
    model = tiny_model(family)
    parts = emit(model, tokens=(5,), context=12, parts=3)
    found = {}
    for name in parts:
        values = [*graph(parts, name).value_info, *graph(parts, name).output]
        found |= {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    found["lm_head"] = found.pop("logits")
    for name, tap in taps(model.config).items():
        assert found[name] == shape(tap, model.config, batch=1, tokens=5, keys=12), name


def test_names_order_and_types_are_those_of_ai_hub(tiny_model):
    parts = emit(tiny_model("Qwen2-7B"), tokens=(8, 1), context=24, parts=3)
    assert list(parts) == [f"{kind}_{i}_of_3" for kind in ("prompt_ar8_cl24", "token_ar1_cl24") for i in (1, 2, 3)]
    last = graph(parts, "prompt_ar8_cl24_3_of_3")
    assert {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in last.input} == {
        "model.layers.0": (1, 8, 64), "attention_mask": (1, 1, 8, 24), "position_ids_cos": (1, 1, 8, 8),
        "position_ids_sin": (1, 1, 8, 8), "past_key_1_in": (2, 1, 16, 16), "past_value_1_in": (2, 1, 16, 16),
    }  # fmt: skip
    assert [v.name for v in last.output] == ["logits", "past_key_1_out", "past_value_1_out"]
    ids = graph(parts, "token_ar1_cl24_1_of_3").input[0]
    assert (ids.name, ids.type.tensor_type.elem_type) == ("input_ids", TensorProto.INT32)
    assert [node.op_type for node in graph(parts, "token_ar1_cl24_1_of_3").node] == ["Gather"]
    for name in parts:
        values = [*graph(parts, name).input, *graph(parts, name).output]
        assert {v.type.tensor_type.elem_type for v in values} <= {TensorProto.FLOAT, TensorProto.INT32}
    one = emit(tiny_model("Baichuan2-13B"), tokens=1, context=24)
    masks = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph(one, next(iter(one))).input}
    assert masks["attention_mask"] == [1, 4, 1, 24] and "position_ids_cos" not in masks


@pytest.mark.parametrize("layers, parts", [(1, 2), (2, 1), (4, 5), (5, 3), (32, 5), (40, 12)])
def test_split_covers_every_layer_once_and_evenly(layers, parts):
    stretches = parts_of(layers, parts)
    assert [i for part in stretches for i in part.layers] == list(range(layers)) and len(stretches) == parts
    sizes = [len(part.layers) for part in stretches[1:]] or [layers]
    assert max(sizes) - min(sizes) <= 1
    assert [part.embeds for part in stretches] == [True] + [False] * (parts - 1)
    assert [part.heads for part in stretches] == [False] * (parts - 1) + [True]
    for before, after in pairwise(stretches):
        assert before.gives == after.reads


def test_goldens_are_what_the_model_says(tiny_model, family, tmp_path):
    """The padded window with its past outside is the plain model: prompt and the token after it."""
    model = tiny_model(family)
    emit(model, tokens=(8, 1), context=24, parts=2, prompt=PROMPT).save(tmp_path / "x")
    plain = model.trace(PROMPT, "float64")
    prompt, token = (read(tmp_path / "x", f"{kind}_cl24_2_of_2", "output") for kind in ("prompt_ar8", "token_ar1"))
    following = read(tmp_path / "x", "token_ar1_cl24_1_of_2", "input")["input_ids"]
    assert following == plain["lm_head"][0, -1].argmax()
    longer = model.trace([*PROMPT, int(following[0, 0])], "float64")
    for trace, outputs, real in ((plain, prompt, 6), (longer, token, 1)):
        found = {
            "lm_head": outputs["logits"][:, -real:],
            "model.layers.1.self_attn.key": outputs["past_key_1_out"][..., -real:].transpose(1, 0, 3, 2),
            "model.layers.1.self_attn.value": outputs["past_value_1_out"][:, :, -real:].transpose(1, 0, 2, 3),
        }
        expected = {name: trace[name][..., -real:, :] for name in found}
        assert (report := compare(found, expected, tolerances(model.config, "float32", tokens=24))), report
    past = read(tmp_path / "x", "token_ar1_cl24_2_of_2", "input")["past_key_0_in"]
    assert (past[..., -6:] == prompt["past_key_0_out"][..., -6:]).all() and not past[..., :-6].any()


def test_the_size_of_attention_scores_is_on_record(tiny_model, tmp_path):
    model = tiny_model("Baichuan2-7B")
    emit(model, tokens=(8, 1), context=24, parts=2, prompt=PROMPT).save(tmp_path / "x")
    following = read(tmp_path / "x", "token_ar1_cl24_1_of_2", "input")["input_ids"]
    found = read_scores(tmp_path / "x")
    whole = largest_scores(model.trace([*PROMPT, int(following[0, 0])], "float64"))
    assert found.keys() == whole.keys()
    for name, size in found.items():  # later and padded tokens are among the keys, and so it may be larger
        assert 0.99 * whole[name] < size < 3 * whole[name]
    emit(model, tokens=8, context=24, graphs="*.0.self_attn.scores").save(tmp_path / "alone")
    assert read_scores(tmp_path / "alone").keys() == {"model.layers.0.self_attn.scores"}
    emit(model, tokens=8, context=24, graphs="*.mlp").save(tmp_path / "mlp")
    assert read_scores(tmp_path / "mlp") == {}


def test_graphs_alone(tiny_model, tmp_path):
    parts = emit(tiny_model("Qwen2-7B"), tokens=(8, 1), context=24, parts=2)
    whole, graphs = digests(parts.save(tmp_path / "whole")), digests(parts.save(tmp_path / "graphs", golden=False))
    assert {n: d for n, d in whole.items() if "model." in n} == {n: d for n, d in graphs.items() if "manifest" not in n}
    with pytest.raises(InputError, match="without goldens"):
        verify(tmp_path / "graphs")


def test_same_model_same_bytes(tiny_model, tmp_path):
    for name in ("a", "b"):
        emit(tiny_model("Qwen2-7B"), tokens=(8, 1), context=24, parts=2).save(tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    whole = digests(tmp_path / "a")
    whole.pop("manifest.json")
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == whole
    weights = {name: digest for name, digest in whole.items() if name.endswith("model.data")}
    assert weights["prompt_ar8_cl24_2_of_2/model.data"] == weights["token_ar1_cl24_2_of_2/model.data"]
    assert {path.name for path in (tmp_path / "a" / "token_ar1_cl24_2_of_2").iterdir()} == {"model.onnx", "model.data"}
    outputs = manifest["graphs"]["prompt_ar8_cl24_2_of_2"]["outputs"]
    assert {v["name"]: v["tap"] for v in outputs}["logits"] == "lm_head"
    assert set(v["tap"] for v in outputs) <= set(manifest["tolerances"])


def test_weights_are_pages_apart_and_the_same_in_any_tiles(tiny_model, tmp_path, monkeypatch):
    parts = emit(tiny_model("Baichuan2-7B"), tokens=1, context=8)
    (built,) = parts.graphs.values()
    ends = [0, *(offset + length for offset, length in built.layout.values())]
    offsets = [offset for offset, _ in built.layout.values()]
    assert all(offset % 4096 == 0 and 0 <= offset - end < 4096 for offset, end in zip(offsets, ends, strict=False))
    parts.save(tmp_path / "whole")
    monkeypatch.setattr("export.graphs.data.TILE_BYTES", 1000)
    parts.save(tmp_path / "tiles")
    assert digests(tmp_path / "whole") == digests(tmp_path / "tiles")


@pytest.mark.parametrize("opset, ir_version", [(17, 8), (18, 9), (21, 10), (23, 11)])
def test_other_opsets(tiny_model, tmp_path, opset, ir_version):
    parts = emit(tiny_model("Baichuan2-7B"), tokens=1, context=8, opset=opset, ir_version=ir_version)
    proto = parts.graphs["token_ar1_cl8_1_of_1"].proto
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir_version)
    parts.save(tmp_path / "x")  # the checker runs


def test_four_bits_are_bit_for_bit(tiny_model, tmp_path):
    model = tiny_model("Baichuan2-7B").quantize("int4", block_size=32)
    parts = emit(model, tokens=1, context=8, parts=1)
    parts.save(tmp_path / "x")
    path = tmp_path / "x" / "token_ar1_cl8_1_of_1" / "model.onnx"
    proto = onnx.load(path)
    inputs = read(tmp_path / "x", "token_ar1_cl8_1_of_1", "input")
    names = [name for name, weight in model.weights.items() if hasattr(weight, "blocks")]
    assert len(names) == 2 * 5 + 1
    for name in names:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    engines = [ReferenceEvaluator(proto).run]
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        options = onnxruntime.SessionOptions()
        engines.append(onnxruntime.InferenceSession(proto.SerializeToString(), options).run)
    for run in engines:
        for name, values in zip(names, run(names, inputs), strict=True):
            assert values.tobytes() == model.weights[name].read(np.dtype(np.float32)).tobytes(), name
    sizes = {t.name: int(t.external_data[2].value) for t in parts.graphs["token_ar1_cl8_1_of_1"].proto.graph.initializer
             if t.external_data}  # fmt: skip
    assert all(sizes[f"{name}.codes"] == model.weights[name].blocks.packed.nbytes for name in names)
    with pytest.raises(InputError, match="4-bit blocks, which opset 20 lacks"):
        emit(model, tokens=1, context=8, opset=20, ir_version=9)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"parts": 4}, "parts is 4, expected 1 to 3"),
        ({"parts": 0}, "parts is 0"),
        ({"parts": 1.5}, "whole numbers, not 1.5"),
        ({"context": 65}, "context is 65, expected 2 to 64"),
        ({"context": 8}, "tokens is 8, 1, expected different numbers from 1 to 7"),
        ({"tokens": ()}, "tokens is , expected"),
        ({"tokens": (8, 0)}, "tokens is 8, 0, expected"),
        ({"prompt": list(range(9))}, "the prompt has 9 tokens, expected 1 to 8"),
        ({"prompt": [96]}, "token id 96 is outside the vocabulary of 96"),
        ({"prompt": []}, "the prompt is empty"),
        ({"opset": 16}, "opset is 16, expected 17"),
        ({"opset": 999}, "opset is 999"),
        ({"ir_version": 9}, "ir_version is 9, expected 10"),
    ],
)
def test_bad_numbers_are_one_line(tiny_model, options, said):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        emit(tiny_model("Baichuan2-7B"), **{"tokens": (8, 1), "context": 24, **options})
    assert "\n" not in str(error.value)


def test_a_folder_is_whole_or_not_there(tiny_model, tmp_path, monkeypatch):
    parts = emit(tiny_model("Baichuan2-7B"), tokens=1, context=8)
    parts.save(tmp_path / "x")
    before = digests(tmp_path / "x")
    with pytest.raises(InputError, match="holds an export"):
        parts.save(tmp_path / "x")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"also holds notes\.txt"):
        parts.save(tmp_path / "x", overwrite=True)
    (tmp_path / "x" / "notes.txt").unlink()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(onnx.checker, "check_model", fail)
        for name in ("x", "new"):
            with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
                parts.save(tmp_path / name, overwrite=True)
    assert digests(tmp_path / "x") == before and [path.name for path in tmp_path.iterdir()] == ["x"]

    parts.save(tmp_path / "x", overwrite=True)
    assert digests(tmp_path / "x") == before and [path.name for path in tmp_path.iterdir()] == ["x"]

    rename = Path.rename
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", lambda old, new: fail() if old.suffix == ".partial" else rename(old, new))
        with pytest.raises(InputError, match="cannot write"):
            parts.save(tmp_path / "x", overwrite=True)
    assert digests(tmp_path / "x") == before and [path.name for path in tmp_path.iterdir()] == ["x"]

    for kept in ("hub.jsonl", JOURNAL):
        (tmp_path / "x" / kept).write_text("sent")
    parts.save(tmp_path / "x", overwrite=True)
    for kept in ("hub.jsonl", JOURNAL):
        assert (tmp_path / "x" / kept).read_text() == "sent"
        (tmp_path / "x" / kept).unlink()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, said in (("other", "is not empty, and no export"), ("file", "is a file")):
        with pytest.raises(InputError, match=said):
            parts.save(tmp_path / name, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert parts.save(tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.parametrize(
    "form, options", [("int4", {"symmetric": False}), ("int4", {"axis": 0}), ("nf4", {}), ("int8", {})]
)
def test_any_quantized_weight_keeps_its_values(tiny_model, tmp_path, form, options):
    """Zero points are emitted, and what ONNX has no operator for is emitted as float32."""
    model = tiny_model("Qwen2-7B")
    name = "model.layers.0.mlp.up_proj.weight"
    values = model.weights[name].read(np.dtype(np.float32))
    weight = QuantizedWeight(formats.quantize(values, form, **options))
    model = refimpl.Model(model.config, model.weights.replace({name: weight}))
    emit(model, tokens=1, context=8).save(tmp_path / "x")
    proto = onnx.load(tmp_path / "x" / "token_ar1_cl8_1_of_1" / "model.onnx")
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape))
    (found,) = ReferenceEvaluator(proto).run([name], read(tmp_path / "x", "token_ar1_cl8_1_of_1", "input"))
    assert found.tobytes() == weight.read(np.dtype(np.float32)).tobytes()
    assert [node.op_type == "DequantizeLinear" for node in proto.graph.node].count(True) == ("symmetric" in options)
    assert verify(tmp_path / "x", engine="reference")


BIG = """
import resource, sys
import numpy as np
from refimpl.config import Config
from refimpl.model import Model
from refimpl.checkpoint.weights import NormHead, Weight, Weights
from refimpl.checkpoint.resolve import expected_shapes
from export import emit

config = Config(vocab_size=2048, hidden_size=1280, intermediate_size=2048, num_hidden_layers=int(sys.argv[1]),
                num_attention_heads=10, max_position_embeddings=64)
# arrays of one stored element: the weights of a large model that take no memory themselves
weights = {name: Weight(np.broadcast_to(np.float32(0.01), shape)) for name, shape in expected_shapes(config).items()}
weights["lm_head.weight"] = NormHead(weights["lm_head.weight"].array)
parts = emit(Model(config, Weights(weights)), tokens=1, context=16, parts=2)
parts.save(sys.argv[2])
size = sum(length for built in parts.graphs.values() for _, length in built.layout.values())
print(size >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_weights(tmp_path):
    """A tile of weights at a time: 7 layers take no more than one does, though they are 340 MB more."""
    found = []
    for layers in (1, 7):
        command = [sys.executable, "-c", BIG, str(layers), str(tmp_path / str(layers))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([int(number) for number in done.stdout.split()])
    (small, peak_small), (large, peak_large) = found
    assert large - small > 300 and peak_large - peak_small < 40, found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of mapped pages")
def test_what_has_been_read_of_a_file_is_let_go(tmp_path):
    """Mapped pages count as a process's memory until it says that it is done with them."""

    def mapped():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

    save_file({"w": np.ones((1 << 12, 1 << 12), np.float32)}, tmp_path / "w.safetensors")
    weight = Weight(map_safetensors(tmp_path / "w.safetensors")["w"])
    before = mapped()
    assert sum(float(tile.sum()) for tile in Parameter.whole("w", weight).tiles()) == 1 << 24
    assert mapped() - before < 32  # of 64 MiB


def test_tied_and_random_heads(tmp_path):
    """A model whose head is its embedding has both in its one graph, and the graph agrees."""
    folder = write_checkpoint(tmp_path / "m", "Qwen2-7B", tie_word_embeddings=True)
    emit(refimpl.load(folder), tokens=(4, 1), context=8).save(tmp_path / "x")
    assert verify(tmp_path / "x", engine="reference")


def test_a_model_that_is_no_numbers_is_refused(tmp_path):
    """By the weight that is damaged, without goldens too; or, where weights are sound, by the output that overflows."""
    folder = write_checkpoint(tmp_path / "m", "Baichuan2-7B")
    tensors = load_file(folder / "model.safetensors")
    for name, value in (("model.layers.1.mlp.up_proj.weight", np.nan), ("model.embed_tokens.weight", np.inf)):
        bad = {n: x.copy() for n, x in tensors.items()}
        bad[name][-1, 3] = value
        save_file(bad, folder / "model.safetensors")
        for golden in (True, False):
            with pytest.raises(InputError, match=f"{name} holds 1 numbers that are NaN or infinite"):
                emit(refimpl.load(folder), tokens=4, context=8, prompt=[1, 2]).save(tmp_path / "x", golden=golden)
            assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is half-written"
    huge = {"model.norm.weight": np.full_like(tensors["model.norm.weight"], 3e38)}
    save_file(tensors | huge, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the golden output logits of prompt_ar4_cl8_\S+ is NaN or infinite"):
        emit(refimpl.load(folder), tokens=4, context=8, prompt=[1, 2]).save(tmp_path / "x")


def test_refimpl_does_without_onnx():
    script = "import refimpl, golden, sys; refimpl.load(); assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_graphs_for_ai_hub_share_their_weights_on_disk(tiny_model, tmp_path):
    """Their float32 weights go into a zip of each folder anyway. Others have copies, which ONNX's own loader takes."""
    model = tiny_model("Baichuan2-7B")
    for profile, shared in (("aihub", True), ("plain", False)):
        folder = emit(model, (4, 2, 1), 16, 3, profile).save(tmp_path / profile)
        for part in (1, 2, 3):
            one, other = (folder / f"{kind}_cl16_{part}_of_3" for kind in ("prompt_ar4", "token_ar1"))
            assert os.path.samefile(one / "model.data", other / "model.data") == shared
            for path in () if shared else (one, other):
                onnx.checker.check_model(str(path / "model.onnx"), full_check=True)
        for engine in ("reference", "onnxruntime")[: 1 + bool(find_spec("onnxruntime"))]:
            assert verify(folder, engine)
        assert emit(model, (4, 2, 1), 16, 3, profile).save(folder, overwrite=True)
