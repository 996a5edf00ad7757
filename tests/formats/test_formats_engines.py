"""Every format against the engine that defines it, byte by byte; run as a script, this prints a table.

One list of comparisons drives the tests and the table. Each is made on many matrices: normal and heavy-tailed, with
rows of zeros, ties, one sign only, tiny and large, and of sizes that end within a block.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from refimpl_kernels import formats
from refimpl_kernels.formats import dynamic8, gguf, int4, int8, matmulnbits, qlinear8

CASES = 24


def matrices(multiple: int = 1, seed: int = 0) -> Iterator[np.ndarray]:
    """Matrices (O, I) to be quantized, I a multiple."""
    rng = np.random.default_rng(seed)
    for case in range(CASES):
        rows, columns = (int(rng.choice([1, 2, 3, 5, 7, 31, 33])) for _ in range(2))
        shape = rows, columns * multiple
        made = rng.standard_t(3, shape) if case % 3 == 0 else rng.standard_normal(shape)
        made = (made * 10.0 ** rng.uniform(-5, 3)).astype(np.float32)
        if case % 4 == 1:
            made = np.round(made * np.float32(4 / np.abs(made).max()))  # ties everywhere
        if case % 5 == 2:
            made[0] = 0
        if case % 6 == 3:
            made = np.abs(made) * np.float32(rng.choice([-1, 1]))
        yield made


@dataclass(frozen=True)
class Comparison:
    """`pairs()` yields ours and the engine's arrays, which should hold the same bytes (a zero may have either sign)."""

    format: str
    what: str
    engine: str
    pairs: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]

    def __str__(self) -> str:
        return f"{self.format}, {self.what}, {self.engine}"

    def count(self) -> tuple[int, int]:
        """How many numbers are equal, and of how many."""
        equal = total = 0
        for ours, theirs in self.pairs():
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.shape, theirs.shape, self)
            equal += int((ours == theirs).sum())
            total += ours.size
        assert total
        return equal, total


# llama.cpp's formats, by gguf-py --------------------------------------------------------------------------------------


def gguf_quantizes(name):
    def pairs():
        import gguf as engine

        kind = engine.GGMLQuantizationType[name.upper()]
        for weight in matrices(32):
            with np.errstate(all="ignore"):
                yield gguf.to_bytes(formats.quantize(weight, name)), engine.quants.quantize(weight, kind)

    return pairs


def gguf_reads(name, **options):
    def pairs():
        import gguf as engine

        kind = engine.GGMLQuantizationType[name.upper()]
        for weight in matrices({"q4_k": 256, "nvfp4": 64}.get(name, 32)):
            weight = np.clip(weight, -2688, 2688) if name == "nvfp4" else weight  # the largest that it holds
            blocks = formats.quantize(weight, name, **options)
            yield formats.dequantize(blocks), engine.quants.dequantize(gguf.to_bytes(blocks), kind)

    return pairs


def gguf_scales_nvfp4():
    """gguf-py does not quantize to NVFP4, but it has the rounding of its scales."""
    import gguf as engine

    for weight in matrices(64):
        weight = np.clip(weight, -1530, 1530)  # its scales from 256 on all become 448
        largest = np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / np.float32(6)
        yield formats.quantize(weight, "nvfp4").scales, engine.quants.NVFP4.fp32_to_ue4m3(largest)


# bitsandbytes --------------------------------------------------------------------------------------------------------


def bitsandbytes_quantizes(name, size, double):
    def pairs():
        import bitsandbytes.functional as engine
        import torch

        torch.set_num_threads(1)
        for weight in matrices(9):
            packed, state = engine.quantize_4bit(
                torch.from_numpy(weight), blocksize=size, quant_type=name, compress_statistics=double
            )
            blocks = formats.quantize(weight, name, size, double=double)
            yield blocks.packed, packed.numpy().reshape(-1)
            yield blocks.scales, state.absmax.numpy()
            if double:
                yield blocks.extra["offset"].reshape(1), state.offset.numpy().reshape(1)
                yield blocks.extra["nested_scales"], state.state2.absmax.numpy()

    return pairs


def bitsandbytes_reads(name, size):
    def pairs():
        import torch
        from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as generic
        from bitsandbytes.backends.utils import _get_4bit_code

        for weight in matrices(9):
            blocks = formats.quantize(weight, name, size)
            arrays = torch.from_numpy(blocks.packed), torch.from_numpy(blocks.scales)
            code = _get_4bit_code(name, arrays[0].device)
            with torch.compiler.set_stance("force_eager"):  # compiling it takes longer than all the rest
                values = generic(*arrays, code, size, weight.shape, torch.float32)
            yield formats.dequantize(blocks), values.numpy()

    return pairs


def bitsandbytes_dynamic8():
    import bitsandbytes.functional as engine
    import torch

    rng = np.random.default_rng(1)
    for _ in range(CASES):
        x = (rng.standard_normal((int(rng.integers(1, 9)), 256)) * 10.0 ** rng.uniform(-6, 3)).astype(np.float32)
        codes, state = engine.quantize_blockwise(torch.from_numpy(x), blocksize=256)
        parts = dynamic8.quantize(x)
        yield parts["codes"], codes.numpy()
        yield parts["scales"][:, 0], state.absmax.numpy()
        yield dynamic8.dequantize(**parts), engine.dequantize_blockwise(codes, state).numpy()


def bitsandbytes_int8():
    import torch

    engine = importlib.import_module("bitsandbytes.functional")
    for weight in matrices(9):
        if not np.abs(weight).max(1).all():
            continue  # a row of zeros is 0 times infinity there
        codes, scales, _ = engine.int8_vectorwise_quant(torch.from_numpy(weight).half())
        blocks = formats.quantize(weight, "int8")
        yield blocks.codes, codes.numpy()
        yield blocks.scales[:, 0], scales.numpy()


# ONNX ----------------------------------------------------------------------------------------------------------------


def onnx_model(weight, blocks, axis, block_size):
    """x -> codes -> values by QuantizeLinear and DequantizeLinear with the scales and zero points of `blocks`."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(blocks.scales.reshape(blocks.scales.shape), "scale")]
    names = ["scale"]
    if blocks.zero_points is not None:
        flat = int4.pack(blocks.zero_points.reshape(1, -1)).tobytes()
        constants.append(helper.make_tensor("zero", TensorProto.INT4, blocks.scales.shape, flat, raw=True))
        names.append("zero")
    form = {"axis": axis, **({"block_size": block_size} if block_size else {})}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *names], ["codes"], output_dtype=TensorProto.INT4, **form),
        helper.make_node("DequantizeLinear", ["codes", *names], ["y"], **form),
        helper.make_node("Cast", ["codes"], ["whole"], to=TensorProto.INT32),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, weight.shape) for n in ("x", "y")]
    whole = helper.make_tensor_value_info("whole", TensorProto.INT32, weight.shape)
    graph = helper.make_graph(nodes, "g", values[:1], [whole, values[1]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def onnx_evaluates(engine, granularity, symmetric, axis=1):
    def pairs():
        for weight in matrices(32 if axis else 1):
            if not axis:
                weight = np.tile(weight, (32, 1))
            blocks = formats.quantize(weight, "int4", granularity, axis=axis, symmetric=symmetric)
            if isinstance(granularity, int):
                model = onnx_model(weight, blocks, axis, granularity)
            else:  # a vector of scales for axis 0, or one scale
                shape = (len(weight),) if granularity == "channel" else ()
                zero_points = None if symmetric else blocks.zero_points.reshape(shape)
                flat = formats.Blocks(
                    **{**vars(blocks), "scales": blocks.scales.reshape(shape), "zero_points": zero_points}
                )
                model = onnx_model(weight, flat, 0, 0)
            codes, values = run_onnx(engine, model, weight)
            nonzero = np.repeat(np.atleast_1d(blocks.scales).reshape(-1) != 0, weight.size // blocks.scales.size)
            if axis and nonzero.all():  # 0/0 is not defined there
                yield blocks.codes.astype(np.int32), codes
            yield formats.dequantize(blocks)[np.isfinite(values)], values[np.isfinite(values)]

    return pairs


def run_onnx(engine, model, weight):
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": weight})
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, {"x": weight})


def onnx_lpbq():
    """LPBQ in ONNX: the block scales are themselves dequantized, with a scale for each row.

    ONNX has float32 scales, AIMET doubles: so these are doubles that float32 holds, and no rounding can differ.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    for weight in matrices(64):
        blocks = formats.quantize(weight, "lpbq", 64)
        blocks = replace(blocks, scales=blocks.scales.astype(np.float32).astype(np.float64))
        constants = [
            helper.make_tensor("codes", TensorProto.INT4, weight.shape, blocks.packed.tobytes(), raw=True),
            numpy_helper.from_array(blocks.extra["block_scales"], "integers"),
            numpy_helper.from_array(blocks.scales.reshape(-1).astype(np.float32), "rows"),
        ]
        nodes = [
            helper.make_node("DequantizeLinear", ["integers", "rows"], ["scales"], axis=0),
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=1, block_size=64),
        ]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.shape)
        graph = helper.make_graph(nodes, "g", [], [output], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        yield formats.dequantize(blocks), onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0]


# onnxruntime's MatMulNBits -------------------------------------------------------------------------------------------


def onnxruntime_packs(symmetric):
    def pairs():
        from onnxruntime.capi._pybind_state import quantize_matmul_4bits as engine

        for case, weight in enumerate(matrices(9)):
            size = (16, 32, 64, 128, 256)[case % 5]
            blocks = formats.quantize(weight, "matmulnbits", size, symmetric=symmetric)
            ours = matmulnbits.tensors(blocks.packed, blocks.scales, size, blocks.zero_points)
            rows, count = blocks.scales.shape
            filled = np.zeros((count * size, rows), np.float32)  # as matmul_nbits_quantizer.py fills rows up
            filled[: weight.shape[1]] = weight.T
            theirs = {"B": np.zeros_like(ours["B"]), "scales": np.zeros((rows, count), np.float32)}
            zero_points = np.zeros((rows, (count + 1) // 2), np.uint8)
            engine(theirs["B"], filled, theirs["scales"], zero_points, size, rows, count * size, symmetric)
            if not symmetric:
                theirs["zero_points"] = zero_points
            for name, array in theirs.items():
                yield ours[name], array

    return pairs


# Recordings of engines, beside a developer's checkout -----------------------------------------------------------------


def recording(name):
    import ml_dtypes
    from conftest import SHARED
    from safetensors.numpy import load_file

    dtypes = {"f32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    path = SHARED / "golden" / f"{name}.safetensors"
    if not path.exists():
        raise ModuleNotFoundError("the recordings are not beside this checkout")
    return load_file(path), {**dtypes, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def recorded_4bit(name, double):
    def pairs():
        recorded, dtypes = recording("quant-4bit")
        for key in recorded:
            matrix, dtype, quant, size, nesting, *_ = (*key.split("."), *5 * [""])
            if not key.endswith(".packed") or quant != name or (nesting == "double") != double:
                continue
            prefix, size = key.removesuffix("packed"), int(size[2:])
            weight = recorded[f"{matrix}.A"].astype(dtypes[dtype])
            ours = formats.quantize(weight, quant, size, double=double)
            yield ours.packed, recorded[key].reshape(-1)
            yield ours.scales, recorded[prefix + "absmax"]
            extra = {}
            if double:
                extra = {"offset": recorded[prefix + "offset"], "nested_scales": recorded[prefix + "nested_absmax"]}
                yield ours.extra["offset"].reshape(1), extra["offset"]
                yield ours.extra["nested_scales"], extra["nested_scales"]
                extra["nested_code"] = recorded["code.dynamic8"]
            # their bytes, as a checkpoint has them
            packed = recorded[key].reshape(-1)
            theirs = formats.Blocks(quant, weight.shape, size, None, packed, recorded[prefix + "absmax"], None, extra)
            values = formats.dequantize(theirs)
            yield values.astype(dtypes[dtype]), recorded[prefix + "deq"]
            if prefix + "deq_f32" in recorded:
                yield values, recorded[prefix + "deq_f32"]

    return pairs


def recorded_int8():
    recorded, _ = recording("quant-int8")
    for weight, suffix in (("W", ""), ("W_nozero", "_nozero")):
        parts = int8.quantize(recorded[weight])
        yield parts["codes"], recorded["CB" + suffix]
        yield parts["scales"][:, 0], recorded["SCB" + suffix]


def recorded_int8_linear():
    recorded, dtypes = recording("quant-int8")
    for short in ("f32", "fp16", "bf16"):
        x = recorded["x"].astype(dtypes[short])
        ours = int8.linear(x, recorded["CB_nozero"], recorded["SCB_nozero"], threshold=0)
        yield ours, recorded[f"{short}.t0.out"]
        yield int8.outlier_columns(x.astype(np.float16)), recorded[f"{short}.t6.outlier_cols"]


def recorded_qlinear(bits):
    def pairs():
        recorded, dtypes = recording("quant-v1-qlinear")
        for dtype, short in (("float32", "f32"), ("float16", "fp16"), ("bfloat16", "bf16")):
            blocks = formats.quantize(recorded["W"], f"qlinear{bits}", dtype=dtype)
            yield blocks.scales[:, 0], recorded[f"int{bits}.{short}.scale"]
            if bits == 4:
                yield blocks.packed.view("<i4"), recorded[f"int4.{short}.packed"]
            else:
                yield blocks.codes.T, recorded[f"int8.{short}.weight_T"]
                if short != "f32":  # a float32 sum depends on its order
                    x = recorded["x"].astype(dtypes[short])
                    yield qlinear8.linear(x, blocks.codes, blocks.scales), recorded[f"int8.{short}.out"]

    return pairs


COMPARISONS = [
    *(
        Comparison("int4", f"{'' if s else 'a'}symmetric, {g}, axis {a}", engine, onnx_evaluates(engine, g, s, a))
        for engine in ("onnxruntime", "onnx ReferenceEvaluator")
        for s in (True, False)
        for g, a in ((32, 1), (16, 1), (32, 0), ("channel", 1), ("tensor", 1))
    ),
    *(
        Comparison(name, f"blocks of {size}, {'8-bit' if double else 'float32'} scales", "bitsandbytes",
                   bitsandbytes_quantizes(name, size, double))
        for name in ("nf4", "fp4") for size in (64, 128) for double in (False, True)
    ),
    *(
        Comparison(name, "values", "bitsandbytes", bitsandbytes_reads(name, 64)) for name in ("nf4", "fp4")
    ),
    *(
        Comparison(name, f"{'8-bit' if double else 'float32'} scales, bytes and values", "bitsandbytes, recorded",
                   recorded_4bit(name, double))
        for name in ("nf4", "fp4") for double in (False, True)
    ),
    Comparison("dynamic8", "8-bit scales of scales", "bitsandbytes", bitsandbytes_dynamic8),
    Comparison("int8", "codes and scales", "bitsandbytes", bitsandbytes_int8),
    Comparison("int8", "codes and scales", "bitsandbytes, recorded", recorded_int8),
    Comparison("int8", "linear, outlier columns", "bitsandbytes, recorded", recorded_int8_linear),
    *(Comparison(name, "bytes", "gguf-py", gguf_quantizes(name)) for name in ("q4_0", "q4_1", "q8_0", "mxfp4")),
    *(
        Comparison(name, "values", "gguf-py", gguf_reads(name))
        for name in ("q4_0", "q4_1", "q8_0", "q4_k", "mxfp4", "nvfp4")
    ),
    Comparison("nvfp4", "scales", "gguf-py", gguf_scales_nvfp4),
    Comparison("q4_k", "values, no search", "gguf-py", gguf_reads("q4_k", search=0)),
    Comparison("matmulnbits", "symmetric", "onnxruntime", onnxruntime_packs(True)),
    Comparison("matmulnbits", "asymmetric", "onnxruntime", onnxruntime_packs(False)),
    Comparison("lpbq", "values, as two DequantizeLinear", "onnxruntime", onnx_lpbq),
    Comparison("qlinear8", "codes, scales, linear", "Baichuan v1, recorded", recorded_qlinear(8)),
    Comparison("qlinear4", "bytes, scales", "Baichuan v1, recorded", recorded_qlinear(4)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_bytes_are_the_engines(comparison):
    try:
        equal, total = comparison.count()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert equal == total


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operator_computes_with_what_the_blocks_stand_for(symmetric):
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(2).standard_normal((31, 200)).astype(np.float32)
    x = np.random.default_rng(3).standard_normal((5, 200)).astype(np.float32)
    blocks = formats.quantize(weight, "matmulnbits", 64, symmetric=symmetric)
    tensors = matmulnbits.tensors(blocks.packed, blocks.scales, 64, blocks.zero_points)
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=200, N=31, bits=4, block_size=64
    )
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [5, 200]), ("y", [5, 31]))]
    constants = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    y = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    back = formats.dequantize(blocks).astype(np.float64)
    # float32 sums of 200 products in any order: at most 200 roundings of what the magnitudes add up to
    assert (np.abs(y - x @ back.T) <= 200 * 2.0**-24 * (np.abs(x) @ np.abs(back).T)).all()
    assert np.abs(y - x @ weight.T.astype(np.float64)).max() > 0.1  # the quantization itself is far larger


def table() -> str:
    """The byte-equality table: format, what was compared, with which engine, how many numbers are equal."""
    lines = ["| format | what | engine | equal |", "| --- | --- | --- | --- |"]
    for comparison in COMPARISONS:
        try:
            equal, total = comparison.count()
            result = f"all of {total:,}" if equal == total else f"{equal:,} of {total:,}"
        except ModuleNotFoundError as missing:
            result = f"not compared: {missing}"
        lines.append(f"| {comparison.format} | {comparison.what} | {comparison.engine} | {result} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
