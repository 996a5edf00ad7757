"""refimpl verify --engine htp and bisect --executor htp: Qualcomm's NPU, emulated here."""

import hashlib
import json
import shutil
from importlib.util import find_spec

import numpy as np
import onnx
import pytest

import refimpl
from export import emit
from refimpl.cli import main
from refimpl.grids.calibrate import calibrate
from refimpl.model import EMBEDDED

installed = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra htp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = refimpl.load()
    ids = model.token_ids((EMBEDDED / "held_out.txt").read_text())[:, :256]
    parts = emit(model, (16, 1), 64, 2, "qdq", encodings=calibrate(model, ids))
    return parts.save(tmp_path_factory.mktemp("htp") / "x")


@installed
def test_the_npu_agrees_with_the_oracle(folder, capsys):
    assert main(["verify", str(folder), "--engine", "htp", "--strict", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["about"]["outputs"].startswith("onnxruntime-qnn 2.")
    assert "nodes on the NPU" in said["remarks"][-1] and "2 besides: Gather" in said["remarks"][-1]
    assert all(tensor["output"] for tensor in said["tensors"]) and len(said["tensors"]) == 32


@installed
def test_without_the_model_a_healthy_npu_is_not_accused(folder, capsys):
    assert main(["bisect", str(folder), "--executor", "htp"]) == 0
    assert capsys.readouterr().out.startswith("agrees")


@installed
def test_the_next_command_runs(folder, tmp_path, capsys):
    assert main(["verify", str(folder), "--engine", "htp", "--model"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"refimpl verify {folder} --engine htp --soc 8-elite --save RUN")
    run = tmp_path / "run.json"
    assert main([*last.split("refimpl ")[1].split()[:-1], str(run)]) == 0 and run.is_file()


@installed
def test_a_graph_of_floats_is_judged_as_float16(tmp_path, capsys):
    emit(refimpl.load(), 8, 32, 2, layers=1).save(tmp_path / "plain")
    assert main(["verify", str(tmp_path / "plain"), "--engine", "htp"]) == 0
    assert capsys.readouterr().out.startswith("agrees")


@installed
def test_bisect_runs_on_the_npu_and_finds_a_broken_weight(folder, tmp_path, capsys):
    """Every second row of gate_proj has scales four times as large, in the graphs that the NPU is given."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    name = "prompt_ar16_cl64_2_of_2"
    proto = onnx.load(broken / name / "model.onnx", load_external_data=False)
    (scales,) = (t for t in proto.graph.initializer if t.name == "model.layers.1.mlp.gate_proj.weight.scales")
    where = {entry.key: entry.value for entry in scales.external_data}
    path = broken / name / "model.data"
    data = np.memmap(path, np.float32, "r+", int(where["offset"]), int(where["length"]) // 4)
    data[::2] *= 4
    data.flush()
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"][f"{name}/model.data"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert (
        main(["bisect", str(broken), "--model", "--executor", "htp", "--soc", "8-gen-3", "--min-sqnr", "20", "--json"])
        == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert found["guilty"] == "model.layers.1.mlp.gate_proj"


def test_what_does_not_belong_together(folder, tmp_path, capsys):
    np.savez(tmp_path / "outputs.npz", x=np.zeros(3))
    for arguments, told in (
        (["verify", str(folder), "--soc", "8-elite"], "--soc and --strict belong to Qualcomm's NPU"),
        (["verify", str(folder), str(tmp_path / "outputs.npz"), "--engine", "htp"], "give one of the two"),
        (["bisect", str(folder), "--strict"], "--soc and --strict belong to Qualcomm's NPU"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err


@installed
def test_an_unknown_soc(folder, capsys):
    assert main(["verify", str(folder), "--engine", "htp", "--soc", "pixel"]) == 2
    assert capsys.readouterr().err.startswith("refimpl: soc is 'pixel', expected one of 8-gen-2, ")
