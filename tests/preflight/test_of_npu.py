"""What an NPU computes wrongly: each rule finds its fault in a graph that rounds by itself, and nothing else."""

from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import emit
from export.preflight import of_npu
from export.preflight.check import check
from export.preflight.rule import rules_of
from export.run.engines import Engine
from export.run.htp import Htp
from refimpl.errors import Remark
from refimpl.grids.calibrate import calibrate

RULES = {rule.id for rule in rules_of(of_npu)}
U8, U16 = np.uint8, np.uint16


class Maker:
    """A graph on grids while it is written down."""

    def __init__(self):
        self.nodes, self.made, self.inputs, self.infos, self.count = [], [], [], [], 0

    def constant(self, array):
        self.count += 1
        self.made.append(numpy_helper.from_array(np.asarray(array), f"constant{self.count}"))
        return self.made[-1].name

    def op(self, op, *inputs, name="", shape=None, **attributes):
        self.count += 1
        name = name or f"{op.lower()}{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        if shape:
            self.infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def pair(self, x, scale, zero_point, dtype, shape=None):
        grid = [self.constant(np.float32(scale)), self.constant(dtype(zero_point))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *grid), *grid, shape=shape)

    def input(self, name, shape, scale=1e-3, zero_point=32768, dtype=U16):
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return self.pair(name, scale, zero_point, dtype, shape)

    def weight(self, codes, scales, zero_point=None, **attributes):
        inputs = [self.constant(codes), self.constant(np.float32(scales))]
        inputs += [] if zero_point is None else [self.constant(zero_point)]
        return self.op("DequantizeLinear", *inputs, **attributes)

    def save(self, folder, *outputs):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, ends, self.made, value_info=self.infos)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (folder / "g").mkdir(parents=True)
        (folder / "g" / "model.onnx").write_bytes(model.SerializeToString())
        return {breach.rule for breach in check(folder).findings} & RULES


INT4 = np.random.default_rng(0).integers(-8, 8, (4, 8)).astype(ml_dtypes.int4)
ZEROS = np.zeros(4, ml_dtypes.int4)


def linear(maker, weight, op="Gemm", scale=1e-3, zero_point=32768, dtype=U16, shape=(2, 8)):
    attributes = {"transB": 1} if op == "Gemm" else {}
    return maker.pair(maker.op(op, maker.input("x", shape), weight, **attributes), scale, zero_point, dtype)


def blocks(maker, zero_point=None):
    return maker.weight(INT4, np.ones((4, 2)), zero_point, axis=1, block_size=4)


def product(maker, a=(1e-3, 32768, U16), b=(1e-2, 128, U8), keys=(1, 2, 4, 8)):
    query = maker.input("query", (*keys[:2], 1, keys[2]), *a)
    return maker.pair(maker.op("MatMul", query, maker.input("key", keys, *b)), 1e-3, 32768, U16)


def norm(maker, scale, grid=False):
    x = maker.input("x", (1, 8), scale)
    squares = maker.op("Mul", x, x)
    squares = maker.pair(squares, 1e-3, 0, U16) if grid else squares
    mean = maker.op("ReduceMean", squares, maker.constant(np.array([-1])))
    return maker.pair(maker.op("Mul", x, maker.op("Reciprocal", maker.op("Sqrt", mean))), 1e-4, 32768, U16)


def sigmoid(maker, scale, zero_point=0):
    return maker.pair(maker.op("Sigmoid", maker.input("x", (1, 8))), scale, zero_point, U16)


def transposed(maker, zero_point, scale=1e-2):
    x = maker.input("x", (2, 8), 1e-2, 128, U8)
    return maker.pair(maker.op("Transpose", x, perm=[1, 0]), scale, zero_point, U8)


def cut(maker, heads, shape=(32, 1, 128, 4096)):
    x = maker.input("past", shape, 1e-2, 128, U8)
    numbers = [maker.constant(np.array([n], np.int32)) for n in (0, heads, 0)]
    return maker.pair(maker.op("Slice", x, *numbers, shape=(heads, *shape[1:])), 1e-2, 128, U8)


# rule -> a graph that breaks it, and one that does not
FAULTS = {
    "int4-without-zero-point": (
        lambda m: linear(m, m.weight(INT4, np.ones(4), axis=0)),
        lambda m: linear(m, m.weight(INT4, np.ones(4), ZEROS, axis=0)),
    ),
    "int4-blocks-off-center": (
        lambda m: linear(m, blocks(m, np.ones((4, 2), ml_dtypes.int4))),
        lambda m: linear(m, blocks(m, np.zeros((4, 2), ml_dtypes.int4))),
    ),
    "conv-in-blocks": (
        lambda m: linear(m, m.weight(INT4.reshape(4, 8, 1, 1), np.ones((4, 2, 1, 1)), axis=1, block_size=4), "Conv",
                         shape=(1, 8, 1, 2)),
        lambda m: linear(m, blocks(m)),
    ),
    "linear-narrows": (
        lambda m: linear(m, m.weight(INT4, np.ones(4), ZEROS, axis=0), scale=1e-2, zero_point=128, dtype=U8),
        lambda m: m.pair(linear(m, m.weight(INT4, np.ones(4), ZEROS, axis=0)), 1e-2, 128, U8),
    ),
    "product-16x16": (
        lambda m: product(m, b=(1e-4, 32768, U16)),
        lambda m: product(m),
    ),
    "product-off-center": (
        lambda m: product(m, b=(1e-2, 124, U8)),
        lambda m: product(m, a=(1e-2, 128, U8), b=(1e-2, 3, U8)),
    ),
    "sigmoid-range": (
        lambda m: sigmoid(m, 0.9 / 65535),
        lambda m: sigmoid(m, 1 / 65536),
    ),
    "transpose-changes-grid": (
        lambda m: transposed(m, 127),
        lambda m: transposed(m, 128),
    ),
    "squares-overflow": (
        lambda m: norm(m, 2e-2),
        lambda m: norm(m, 1e-3),
    ),
    "squares-on-grid": (
        lambda m: norm(m, 1e-3, grid=True),
        lambda m: norm(m, 1e-3),
    ),
    "product-too-large": (
        lambda m: product(m, keys=(1, 24, 128, 4096)),
        lambda m: product(m, keys=(1, 16, 128, 4096)),
    ),
    "slice-too-large": (
        lambda m: cut(m, 16),
        lambda m: cut(m, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_found_and_nothing_in_what_is_right(rule, tmp_path):
    wrong, right = FAULTS[rule]
    maker = Maker()
    assert maker.save(tmp_path / "wrong", wrong(maker)) == {rule}
    maker = Maker()
    assert maker.save(tmp_path / "right", right(maker)) == set()


@pytest.mark.parametrize("forms", [None, ["conv", "heads", "scale-on-key", "rank4"]], ids=str)
def test_our_own_exports_on_grids_have_none(forms, family, tiny_model, tmp_path):
    model = tiny_model(family)
    encodings = calibrate(model, np.random.default_rng(0).integers(3, 90, (1, 60)))
    folder = emit(model, (8, 1), 24, 3, "qdq", encodings=encodings, forms=forms).save(tmp_path / "x", golden=False)
    assert {breach.rule for breach in check(folder).findings} <= {"opset-unproven", "ir-version-new", "int4-blocks",
                                                                  "alibi"}  # fmt: skip


def test_small_values_are_read_as_onnx_has_them(tmp_path):
    """Written as raw bytes, in the field of their type, one or several."""
    from export.files.skeleton import read_onnx

    made = [helper.make_tensor("a", TensorProto.FLOAT, (), [0.5]), numpy_helper.from_array(np.float32(-2.5), "b"),
            helper.make_tensor("c", TensorProto.UINT16, (), [40000]), numpy_helper.from_array(np.uint16(40000), "d"),
            helper.make_tensor("e", TensorProto.INT8, (1,), [-3]), numpy_helper.from_array(np.zeros(7, np.int8), "f"),
            helper.make_tensor("g", TensorProto.INT4, (4,), [0, 0, 1, 0]),
            helper.make_tensor("h", TensorProto.UINT8, (2,), [0, 0])]  # fmt: skip
    model = helper.make_model(helper.make_graph([], "g", [], [], made))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    found = {
        tensor.name: (tensor.value, tensor.zeros) for tensor in read_onnx(tmp_path / "model.onnx").graph.initializers
    }
    assert {name: value for name, (value, _) in found.items()} == {
        "a": 0.5, "b": -2.5, "c": 40000, "d": 40000, "e": -3, "f": None, "g": None, "h": None}  # fmt: skip
    assert {name: zeros for name, (_, zeros) in found.items() if name > "e"} == {"f": True, "g": False, "h": True}


# How many codes the emulation is off in what is wrong, at least, and in what is right, at most.
MEASURED = {
    "int4-without-zero-point": (5000, 500),
    "product-16x16": (15, 6),
    "product-off-center": (4, 2),
    "sigmoid-range": (1000, 4),
    "transpose-changes-grid": (0.9, 0.1),
}


@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra htp")
@pytest.mark.parametrize("rule", MEASURED)
def test_the_emulation_takes_what_is_wrong_and_computes_other_numbers(rule, tmp_path):
    """Against ONNX Runtime on the CPU, which computes what the graph says. Nothing is said, and nothing falls back."""
    off = []
    for name, build in zip(("wrong", "right"), FAULTS[rule], strict=True):
        maker = Maker()
        maker.save(tmp_path / name, output := build(maker))
        graph, rng = tmp_path / name / "g", np.random.default_rng(1)
        sizes = {v.name: [axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in maker.inputs}
        fed = {key: rng.uniform(-1.35, 1.35, size).astype(np.float32) for key, size in sizes.items()}
        with Htp(strict=True) as device:
            (found,), (right,) = device.run(graph, [fed]), Engine("onnxruntime").run(graph, [fed])
        last = next(node for node in maker.nodes if output in node.output)
        scale = numpy_helper.to_array(next(tensor for tensor in maker.made if tensor.name == last.input[1]))
        off.append(float(np.abs(found[output] - right[output]).max() / scale))
    assert off[0] >= MEASURED[rule][0] and off[1] <= MEASURED[rule][1], off


@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra htp")
def test_a_linear_that_narrows_has_its_weight_read_on_the_cpu(tmp_path):
    maker = Maker()
    maker.save(tmp_path / "x", FAULTS["linear-narrows"][0](maker))
    with Htp() as device, pytest.warns(Remark, match="DequantizeLinear"):
        device.compile(tmp_path / "x" / "g")
