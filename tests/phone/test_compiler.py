"""Context binaries made here: whole or not at all, taken up again, and what they say of themselves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from export import emit
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.borders import read_borders
from export.phone.binary import differences, read_binary
from export.phone.compiler import MANIFEST, compile_graphs, read_compiled
from export.phone.provenance import made_of, plain, read_provenance, told
from export.preflight.by_compiler import check_by_compiling
from refimpl import InputError, load
from refimpl.cli import main
from refimpl.grids.calibrate import calibrate

pytest.importorskip("onnxruntime_qnn")
TOKEN, PROMPT = "token_ar1_cl64_{}_of_2", "prompt_ar16_cl64_{}_of_2"


def refused(why, *arguments, **keywords):
    with pytest.raises(InputError, match=why) as caught:
        compile_graphs(*arguments, **keywords)
    assert "\n" not in str(caught.value)


def test_a_binary_for_each_graph(desk_binaries, coded_export):
    compiled = read_compiled(desk_binaries)
    graphs = [form.format(part) for part in (1, 2) for form in (PROMPT, TOKEN)]
    assert list(compiled.binaries) == [f"{graph}.bin" for graph in graphs]
    for graph in graphs:
        binary = read_binary(desk_binaries / f"{graph}.bin")
        assert [one.called for one in binary.graphs] == [graph] and binary.soc_model == 69
        same = differences(binary, coded_export, "8-elite")
        assert same and same.compared == (2 if "1_of_2" in graph else 17)
    past = next(t for t in binary.graphs[0].inputs if t.name == "past_key_0_in")
    border = read_borders(coded_export / graph / "model.onnx")["past_key_0_in"]
    assert (past.scale, past.zero_point, past.bits) == (border.scale, border.zero_point, 8)


def test_a_part_shares_its_weights(coded_export, desk_binaries, tmp_path):
    out = tmp_path / "bin"
    compiled = compile_graphs(coded_export, out, part=1)
    assert compiled.binaries == {"part_1_of_2.bin": (PROMPT.format(1), TOKEN.format(1))}
    binary = read_binary(out / "part_1_of_2.bin")
    assert [one.called for one in binary.graphs] == [PROMPT.format(1), TOKEN.format(1)]
    assert binary.size < 1.2 * (desk_binaries / f"{TOKEN.format(1)}.bin").stat().st_size
    assert differences(binary, coded_export)


def test_what_differs_is_named(desk_binaries, coded_export, tmp_path):
    """Against an export of another context and other grids."""
    model = load()
    other = emit(model, (16, 1), 64, 2, profile="aihub", encodings=calibrate(model, model.token_ids("白日依山尽，")))
    folder = other.save(tmp_path / "other", golden=False)
    found = differences(read_binary(desk_binaries / f"{TOKEN.format(2)}.bin"), folder, "8-gen-3")
    said = str(found)
    assert not found and "is made for 8-elite (soc_model 69), not for 8-gen-3" in said
    assert "token_ar1_cl64_2_of_2: past_key_0_in has the grid scale" in said
    assert "attention_mask" not in said  # -50 to 0 in both
    wide = emit(model, 1, 32, 2, profile="plain").save(tmp_path / "wide", golden=False)
    (wide / "token_ar1_cl32_2_of_2").rename(wide / TOKEN.format(2))
    found = differences(read_binary(desk_binaries / f"{TOKEN.format(2)}.bin"), wide)
    assert "past_key_0_in has the shape (4, 1, 64, 63), exported as (4, 1, 64, 31)" in str(found)
    with pytest.raises(InputError, match="give the export that it was compiled from"):
        differences(read_binary(desk_binaries / f"{PROMPT.format(2)}.bin"), wide)


def test_a_damaged_binary_is_one_line(desk_binaries, tmp_path):
    data = (desk_binaries / f"{TOKEN.format(1)}.bin").read_bytes()
    for number, damaged in enumerate((data[:1000], data[: len(data) // 2], b"\xff" * 64 + data[64:])):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a context binary, or damaged") as caught:
            read_binary(path)
        assert "\n" not in str(caught.value)


def test_what_is_there_is_kept_and_what_is_missing_is_made(desk_binaries, coded_export, tmp_path):
    out = tmp_path / "bin"
    shutil.copytree(desk_binaries, out)
    lost, kept = out / f"{TOKEN.format(1)}.bin", out / f"{TOKEN.format(2)}.bin"
    lost.write_bytes(b"cut off")
    before = kept.stat().st_mtime_ns
    with pytest.raises(InputError, match="is not the binary that was compiled"):
        read_compiled(out)
    compile_graphs(coded_export, out, shared=False)
    assert kept.stat().st_mtime_ns == before and lost.stat().st_size > 1_000_000
    assert read_compiled(out).binaries.keys() == read_compiled(desk_binaries).binaries.keys()


def test_a_kill_leaves_nothing_half_written(coded_export, tmp_path):
    out = tmp_path / "bin"
    command = f"from export.phone.compiler import compile_graphs; compile_graphs({str(coded_export)!r}, {str(out)!r})"
    path = os.pathsep.join(folder for folder in sys.path if folder)
    process = subprocess.Popen([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": path})
    partial = out / ".part_1_of_2.bin.partial"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("*.bin")) and not (out / MANIFEST).exists()
    compile_graphs(coded_export, out, part=1)
    assert read_compiled(out).binaries and not partial.exists()


def test_a_graph_that_does_not_compile_is_one_line(copied, tmp_path):
    """Floats at the border: the embedding's Gather would run on the CPU."""
    model = load()
    encodings = calibrate(model, model.token_ids("白日依山尽，"))
    emit(model, 1, 64, 2, profile="qdq", encodings=encodings).save(tmp_path / "floats", golden=False)
    refused(
        r"token_ar1_cl64_1_of_2 does not compile: the NPU does not take Gather", tmp_path / "floats", tmp_path / "bin"
    )
    assert not (tmp_path / "bin").exists()
    (copied / TOKEN.format(2) / "model.data").write_bytes(b"")
    refused("part_2_of_2.bin for 8-elite: token_ar1_cl64_2_of_2 does not compile", copied, tmp_path / "bin", part=2)


def test_other_bad_input(copied, desk_binaries, tmp_path):
    out = tmp_path / "bin"
    refused("soc is '9', expected one of", copied, out, "9")
    refused("has no part 3", copied, out, part=3)
    refused("holds binaries with another soc: 8-elite, not 8-gen-3", copied, desk_binaries, "8-gen-3", False)
    refused("and no compile.json", copied, copied)
    refused("is not a folder", tmp_path / "nowhere", out)
    out.mkdir()
    (out / MANIFEST).write_text(json.dumps({"format": "other"}))
    refused("has the format 'other'", copied, out)
    (copied / TOKEN.format(1)).rename(copied / "second")
    refused(r"second is not called \{prompt", copied, out)


def test_operations_are_known_by_tap(desk_binaries, coded_export):
    found = read_provenance(desk_binaries, TOKEN.format(2))
    assert len(found.operations) > 300
    heads = load().config.num_attention_heads
    softmaxes = found.of("model.layers.0.self_attn.probs")
    assert [one.type for one in softmaxes] == ["Softmax"] * heads
    assert [one.type for one in found.of("model.layers.1.mlp.product")] == ["ElementWiseMultiply"]
    assert set(found.of_nodes([f"model.layers.0.self_attn.probs.{head}" for head in range(heads)])) >= set(softmaxes)
    proto = onnx.load(coded_export / TOKEN.format(2) / "model.onnx", load_external_data=False).graph
    known = {name for node in proto.node for name in (node.name, *node.output)} | {value.name for value in proto.input}
    assert {one.type for one in found.unknown(known)} <= {"Transpose"}
    with pytest.raises(InputError, match="nowhere"):
        read_provenance(desk_binaries, "nowhere")
    assert plain("a.b.raw_token_3") == plain("a.b.codes/duplicated") == plain("a.b.on_grid.reader2_out0") == "a.b"


def test_a_verdict_is_told_what_the_compiler_made(desk_binaries):
    taps = ["model.layers.0.self_attn.probs", "model.layers.1.mlp.product"]
    said = told(TOKEN.format(2), made_of(desk_binaries, TOKEN.format(2), taps))
    assert said.startswith("in token_ar1_cl64_2_of_2, by the record of Qualcomm's compiler: ")
    assert "model.layers.0.self_attn.probs became 4 Softmax, such as Softmax (model.layers.0.self_attn.probs." in said
    assert "product became ElementWiseMultiply: ElementWiseMultiply (model.layers.1.mlp.product.raw) of " in said
    assert "\n" not in said
    nowhere = made_of(desk_binaries, TOKEN.format(2), ["model.nowhere"])
    assert "model.nowhere is inside of another operation" in told(TOKEN.format(2), nowhere)


def test_a_sentence_names_a_few_operations_and_the_page_all(desk_binaries):
    from export.verdict.report import _made

    mlp = ("gate_proj", "up_proj", "act_fn", "product", "down_proj")
    made = made_of(desk_binaries, TOKEN.format(2), [f"model.layers.{i}.mlp.{part}" for i in range(3) for part in mlp])
    said, page = told(TOKEN.format(2), made), _made(made)
    count = sum(len(one.operations) or 1 for one in made)
    assert said.count(" became ") == 3 and said.endswith("; and 12 more tensors, which --html lists")
    assert page.count("<tr><td>") == count and "ElementWiseMultiply (model.layers.2.mlp.product.raw) of" in page


def test_commands(desk_binaries, coded_export, tmp_path, capsys):
    one = str(desk_binaries / f"{TOKEN.format(2)}.bin")
    assert main(["info", one]) == 0
    assert "MB for HTP of 8-elite (soc_model 69)" in capsys.readouterr().out
    assert main(["info", one, "--export", str(coded_export), "--soc", "8-gen-3"]) == 1
    assert "not for 8-gen-3; compile it for that" in capsys.readouterr().out
    assert main(["info", one, "--export", str(coded_export), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"agrees": True, "compared": 17, "differences": []}
    assert main(["info", "--export", str(coded_export)]) == 2
    out = str(tmp_path / "bin")
    assert main(["compile", str(coded_export), "--out", out, "--part", "1"]) == 0
    assert "1 context binaries for 8-elite, which share a part's weights" in capsys.readouterr().out
    assert main(["compile", str(coded_export), "--out", out, "--soc", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_compiler_as_a_preflight(coded_export, tmp_path, capsys):
    assert check_by_compiling(coded_export, "8-gen-3")
    model = load()
    encodings = calibrate(model, model.token_ids("白日依山尽，"))
    folder = emit(model, 1, 64, 1, "qdq", encodings=encodings).save(tmp_path / "floats", golden=False)
    found = check_by_compiling(folder)
    (refusal,) = found.findings
    assert not found and refusal.graph == "token_ar1_cl64_1_of_1" and "the NPU does not take" in refusal.why
    assert main(["export", "--check", str(folder), "--compile"]) == 1
    assert "error not-compiled: token_ar1_cl64_1_of_1" in capsys.readouterr().out
    assert main(["export", "--check", str(folder), "--compile", "--soc", "9"]) == 2
    assert main(["export", "--compile"]) == 2


def test_verify_names_the_operations_of_what_is_guilty(desk_binaries, coded_export, tmp_path, capsys):
    """A device that gives its logits backwards: the verdict says what the compiler made of that product."""
    plan, _ = read_manifest(coded_export)
    spec = next(spec for run in plan.runs for spec in run if spec.name == TOKEN.format(2))
    outputs = read_arrays(coded_export, spec, "simulated", spec.outputs)
    np.savez(tmp_path / f"{spec.name}.npz", **{**outputs, "logits": outputs["logits"][..., ::-1]})
    words = ["verify", str(coded_export), str(tmp_path / f"{spec.name}.npz"), "--graph", spec.name]
    assert main([*words, "--compiled", str(desk_binaries), "--save", str(tmp_path / "run.json")]) == 1
    said = capsys.readouterr().out
    assert "in token_ar1_cl64_2_of_2, by the record of Qualcomm's compiler: " in said and "lm_head" in said
    assert "the record of Qualcomm's compiler" in (tmp_path / "run.json").read_text()
    assert main([*words, "--compiled", str(desk_binaries), "--html", str(tmp_path / "run.html")]) == 1
    assert "What the compiler made of the suspects" in (tmp_path / "run.html").read_text()
    assert main([*words, "--compiled", str(tmp_path)]) == 2
