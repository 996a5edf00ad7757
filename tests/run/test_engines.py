"""Engines on this machine: which one runs a graph, and what is said if none can."""

import numpy as np
import pytest

from export.run.engines import Engine, too_new
from refimpl.errors import InputError


@pytest.fixture
def graph(tmp_path):
    def made(opset):
        import onnx
        from onnx import TensorProto, helper

        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1,)) for name in "xy"]
        proto = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
        (tmp_path / str(opset)).mkdir()
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(model, tmp_path / str(opset) / "model.onnx")
        return tmp_path / str(opset)

    return made


def test_an_old_onnxruntime_is_told_of_a_new_opset(graph):
    old, new = (graph(opset) / "model.onnx" for opset in (21, 23))
    assert too_new(old, "1.20.0") == too_new(new, "1.24.0") == too_new(new, "2.0.1") == ""
    assert too_new(new, "1.23.2").startswith("onnxruntime 1.23.2 does not run opset 23; install 1.24 or newer")


def test_auto_goes_to_onnxs_own_evaluator(graph, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    folder = graph(23)
    assert Engine().run(folder, [{"x": np.ones(1, np.float32)}])[0]["y"] == -1
    with pytest.raises(InputError, match="does not run opset 23"):
        Engine("onnxruntime").run(folder, [{}])
