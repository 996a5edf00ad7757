"""A coded border: the same graph, whose inputs and outputs are codes."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export import emit
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.borders import Border, borders_of, coded, decoded, encoded, read_borders
from export.verdict.trial import verify_on_grids
from refimpl import InputError, load
from refimpl.grids.calibrate import calibrate

onnxruntime = pytest.importorskip("onnxruntime")
FORMS = [[], ["conv", "unpack", "heads", "scale-on-key", "rank4"]]


@pytest.fixture(scope="module", params=FORMS, ids=["none", "hexagon"])
def exported(request, tmp_path_factory) -> Path:
    model = load()
    ids = np.array([model.token_ids("登鹳雀楼->王之涣\n夜雨寄北->")[0][:16]])
    parts = emit(model, (8, 1), 32, 2, profile="qdq", encodings=calibrate(model, ids), forms=request.param)
    return parts.save(tmp_path_factory.mktemp("coded") / "export")


def session(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def save_coded(graph: Path) -> Path:
    made = coded(onnx.load(graph / "model.onnx", load_external_data=False))
    path = graph / "coded.onnx"
    path.write_bytes(made.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


def test_codes_in_and_out_are_the_same_computation(exported):
    """From the golden inputs on their grids, coded outputs stand for the other graph's floats, or are a code beside."""
    plan, _ = read_manifest(exported)
    for run in plan.runs:
        for spec in run:
            graph = exported / spec.name
            path, borders = save_coded(graph), read_borders(graph / "model.onnx")
            inputs = read_arrays(exported, spec, "input", spec.inputs)
            assert set(borders) == {v.name for v in [*spec.inputs, *spec.outputs]} - {"input_ids"}
            assert read_borders(path) == borders
            one, other = session(graph / "model.onnx"), session(path)
            assert not any("float" in value.type for value in [*other.get_inputs(), *other.get_outputs()])
            names = [value.name for value in one.get_outputs()]
            wanted = dict(zip(names, one.run(names, inputs), strict=True))
            codes = dict(zip(names, other.run(names, encoded(inputs, borders)), strict=True))
            for name, floats in decoded(codes, borders).items():
                off = np.abs(floats - wanted[name])[..., -spec.real :, :] / borders[name].scale
                assert off.max() < (1.01 if "past" in name else 40), (spec.name, name)


def test_what_the_compiler_reads_wrongly_is_gone(exported):
    for path in exported.glob("*/model.onnx"):
        proto = coded(onnx.load(path, load_external_data=False)).graph
        kinds = {tensor.name: tensor.data_type for tensor in proto.initializer}
        readers: dict[str, int] = {}
        for node in proto.node:
            for name in node.input:
                readers[name] = readers.get(name, 0) + 1
            if kinds.get(node.input[0]) == onnx.TensorProto.INT4:
                assert len(node.input) == 3, f"{node.name} has no zero point"
            if node.op_type == "Gather":
                assert node.input[0] not in kinds, "codes are gathered"
        for node in proto.node:
            if node.op_type == "DequantizeLinear":
                assert readers.get(node.output[0], 0) <= 1 or node.input[0] in kinds


def test_a_float_without_a_grid_is_refused(tmp_path):
    proto = next(iter(emit(load(), 8, 32).graphs.values())).proto
    assert borders_of(proto.graph) == {}
    with pytest.raises(InputError, match="attention_mask is a float without a grid"):
        coded(proto)


def test_border():
    border = Border(0.5, 10, 8)
    codes = border.codes(np.array([-100, 0, 0.25, 0.75, 1000.0]))
    assert codes.tolist() == [0, 10, 10, 12, 255] and codes.dtype == np.uint8
    assert border.floats(codes).tolist() == [-5, 0, 0, 1, 122.5]


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_a_coded_export_is_verified_with_floats(engine, tmp_path):
    """Its goldens are floats; whoever runs it puts them on the grids of its border."""
    model = load()
    encodings = calibrate(model, model.token_ids("登鹳雀楼->王之涣\n夜雨寄北->")[:, :16])
    folder = emit(model, 4, 16, 2, "qdq", encodings=encodings, border="codes").save(tmp_path / "coded")
    values = onnx.load(folder / "prompt_ar4_cl16_2_of_2" / "model.onnx", load_external_data=False).graph
    assert {v.type.tensor_type.elem_type for v in (*values.input, *values.output)} <= {2, 4, 6}
    verdict = verify_on_grids(folder, engine)
    assert verdict and "computes like the quantized simulation" in verdict.summary


def test_only_a_graph_on_grids_has_codes():
    with pytest.raises(InputError, match="needs a graph on grids"):
        emit(load(), 4, 16, border="codes")
    with pytest.raises(InputError, match="border is 'float', expected floats or codes"):
        emit(load(), 4, 16, border="float")
