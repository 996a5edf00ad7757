"""Qualcomm's NPU as an executor: what it says where it cannot, and, with the extra htp, what it computes."""

import platform
import signal
import sys
import threading
import time
from importlib.util import find_spec
from os import kill
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.run import htp
from export.run.engines import Engine
from export.run.htp import Htp, Taps, reason, tensors, up_to
from refimpl.errors import InputError, Remark

installed = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra htp")
S16, S8 = 2.0**-14, 2.0**-6


def graph(folder: Path, weights=np.int8, out=np.uint16, per_channel=True) -> Path:
    """x (1, 64) on 16 bits times a matrix on 8, on 16 or 8 bits: the NPU takes no product that narrows per channel."""
    rng = np.random.default_rng(0)
    w = rng.integers(-100, 100, (8, 64)).astype(weights)
    scales = np.full(8 if per_channel else (), 0.01, np.float32)
    made = [numpy_helper.from_array(w, "w.codes"), numpy_helper.from_array(scales, "w.scales"),
            numpy_helper.from_array(np.float32(S16), "x.scale"),
            numpy_helper.from_array(np.uint16(32768), "x.zero_point"),
            numpy_helper.from_array(np.float32(S8 if out is np.uint8 else S16 * 64), "y.scale"),
            numpy_helper.from_array(out(np.iinfo(out).max // 2 + 1), "y.zero_point")]  # fmt: skip
    x, y = (["x.scale", "x.zero_point"], ["y.scale", "y.zero_point"])
    nodes = [
        helper.make_node("DequantizeLinear", ["w.codes", "w.scales"], ["w.weight"], "w.weight",
                         **({"axis": 0} if per_channel else {})),
        helper.make_node("QuantizeLinear", ["x", *x], ["x.codes"], "x.codes"),
        helper.make_node("DequantizeLinear", ["x.codes", *x], ["x.on_grid"], "x.on_grid"),
        helper.make_node("Gemm", ["x.on_grid", "w.weight"], ["y.raw"], "y.raw", transB=1),
        helper.make_node("QuantizeLinear", ["y.raw", *y], ["y.codes"], "y.codes"),
        helper.make_node("DequantizeLinear", ["y.codes", *y], ["y"], "y"),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", (1, 64)), ("y", (1, 8)))]
    inner = [helper.make_tensor_value_info("y.raw", TensorProto.FLOAT, (1, 8))]
    proto = helper.make_graph(nodes, "g", ends[:1], ends[1:], made, value_info=inner)
    folder.mkdir()
    onnx.save(
        helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder


FED = {"x": np.linspace(-1, 1, 64, dtype=np.float32)[None]}


def test_an_unknown_soc_is_told():
    with pytest.raises(InputError, match=r"soc is 'pixel', expected one of 8-gen-2, "):
        Htp("pixel")


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(htp, "find_spec", lambda name: None)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    with pytest.raises(InputError, match=r"^onnxruntime-qnn is not installed; install refimpl\[htp\]$"):
        Htp()
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(InputError, match=r"needs Python 3\.11 or newer, and this is 3\.10"):
        Htp()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(InputError, match=r"is made for Linux and Windows .*, not for Darwin on x86_64"):
        Htp()


def test_a_node_is_part_of_its_own_tensor_or_of_the_next_that_has_a_name():
    nodes = [helper.make_node("Mul", ["x", "x"], ["Mul_0"], "Mul_0"),
             helper.make_node("Sqrt", ["Mul_0"], ["model.norm.raw"], "model.norm.raw"),
             helper.make_node("QuantizeLinear", ["model.norm.raw", "s"], ["model.norm.codes"], "model.norm.codes"),
             helper.make_node("DequantizeLinear", ["w.codes", "s"], ["lm_head.weight"], "lm_head.weight"),
             helper.make_node("Relu", ["Mul_0"], ["/act/Relu_3"], "/act/Relu_3")]  # fmt: skip
    taps = Taps(helper.make_graph(nodes, "g", [], []))
    assert [taps.of(node.name) for node in nodes[:4]] == ["model.norm", "model.norm", "model.norm", "lm_head"]
    assert taps.of("model.norm.raw_token_3") == "model.norm"
    assert taps.of("lm_head.weight/duplicated_token_1") == "lm_head"
    assert taps.of("/act/Relu_3") == "/act/Relu_3"  # anybody's graph: nothing behind it has a name


def test_a_reason_is_said_once():
    text = "Failed to finalize. Code: 1002"
    assert (
        reason(f"RuntimeError: {text} | [ONNXRuntimeError] : 11 : EP_FAIL : {text}") == "Failed to finalize. Code: 1002"
    )


def test_a_graph_is_cut_at_a_tensor(tmp_path):
    proto = onnx.load(graph(tmp_path / "g") / "model.onnx")
    assert tensors(proto) == ["y"]
    cut = up_to(proto, "y.raw").graph
    assert [node.op_type for node in cut.node] == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "Gemm"]
    assert [value.name for value in cut.output] == ["y.raw"] and len(cut.initializer) == 4


@installed
def test_the_npu_computes_what_an_engine_computes(tmp_path, capfd):
    folder = graph(tmp_path / "g")
    (right,) = Engine("onnxruntime").run(folder, [FED])
    with Htp(strict=True) as device:
        found = device.run(folder, [FED, {"x": -FED["x"]}])
        assert "emulation of 8-elite (v79)" in device.about() or not device.emulated
    assert [list(one) for one in found] == [["y"], ["y"]]
    assert np.abs(found[0]["y"] - right["y"]).max() <= 2 * S16 * 64  # int8 by channel: at most 1.4 codes (facts)
    assert np.abs(found[1]["y"] + right["y"]).max() <= 3 * S16 * 64
    placement = device.placements["g"]
    assert (placement.on_npu, placement.ends, placement.elsewhere) == (4, 2, ())
    assert "4 nodes on the NPU, 2 at its ends on the CPU" in str(placement)
    assert capfd.readouterr() == ("", "")


@installed
def test_a_node_on_the_cpu_is_a_remark_with_its_tensor_and_reason_or_an_error(tmp_path):
    folder = graph(tmp_path / "g", out=np.uint8)
    with Htp() as device:
        with pytest.warns(Remark, match=r"g: the NPU does not take DequantizeLinear w\.weight of w \(QNN EP does not"):
            device.run(folder, [FED])
        assert [one.tap for one in device.placements["g"].elsewhere] == ["w"]
    with Htp(strict=True) as device, pytest.raises(InputError, match=r"^g: the NPU does not take .* of w \(QNN EP"):
        device.run(folder, [FED])


@installed
def test_a_graph_that_does_not_compile_spoils_no_other(tmp_path):
    """Without throwing all away, the first graph would go on with other numbers."""
    good, bad = graph(tmp_path / "good"), graph(tmp_path / "bad")
    (bad / "model.onnx").write_bytes(b"no graph")
    with Htp() as device:
        before = device.run(good, [FED])[0]["y"]
        process = device._child
        with pytest.raises(
            InputError, match=r"^8-elite's compiler does not take bad: Load model from .*Protobuf parsing"
        ):
            device.run(bad, [FED])
        assert np.array_equal(device.run(good, [FED])[0]["y"], before)
        assert device._child is not process


@installed
def test_an_input_that_does_not_fit_is_told(tmp_path):
    folder = graph(tmp_path / "g")
    with Htp() as device:
        with pytest.raises(InputError, match=r"^the NPU cannot run g: .*dimensions"):
            device.run(folder, [{"x": np.zeros((2, 64), np.float32)}])
        with pytest.raises(InputError, match=r"cannot read .*nowhere"):
            device.run(tmp_path / "nowhere", [FED])


@installed
def test_a_compiler_that_is_killed_or_takes_too_long_is_told(tmp_path):
    folder = graph(tmp_path / "g")
    with Htp() as device:
        child = device._process()
        child.ask("about")
        threading.Timer(0.02, lambda: kill(child._child.pid, signal.SIGKILL)).start()
        with pytest.raises(InputError, match=r"(the process ended by SIGKILL|has ended before)"):
            for _ in range(1000):
                time.sleep(0.005)
                child.ask("about")
        device.run(folder, [FED])  # begins anew
    with Htp(seconds=0.01) as device, pytest.raises(InputError, match=r"does not take g: it was not done in 0\.01 s"):
        device.run(folder, [FED])
