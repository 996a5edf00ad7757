"""NF4, FP4 and LLM.int8 against recordings of bitsandbytes 0.50.2, and against itself where it is installed."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from kernels import dynamic8, formats, int8

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def four_bit(shared):
    return load_file(shared / "golden" / "quant-4bit.safetensors")


@pytest.fixture(scope="module")
def eight_bit(shared):
    return load_file(shared / "golden" / "quant-int8.safetensors")


def stored(recorded, prefix, quant, shape, size, double):
    """The blocks of a recorded matrix, as a checkpoint loader makes them."""
    extra = {}
    if double:
        extra = {"offset": recorded[prefix + "offset"], "nested_scales": recorded[prefix + "nested_absmax"]}
        extra["nested_code"] = recorded["code.dynamic8"]
    packed = recorded[prefix + "packed"].reshape(-1)
    return formats.Blocks(quant, shape, size, None, packed, recorded[prefix + "absmax"], None, extra)


def test_every_recorded_matrix_is_byte_equal(four_bit):
    seen = 0
    for key in four_bit:
        if not key.endswith(".packed"):
            continue
        matrix, dtype, quant, size, nesting, _ = key.split(".")
        prefix, size, double = key.removesuffix("packed"), int(size[2:]), nesting == "double"
        weight = four_bit[f"{matrix}.A"].astype(DTYPES[dtype])
        ours = formats.quantize(weight, quant, size, double=double)
        np.testing.assert_array_equal(ours.packed, four_bit[key].reshape(-1), key)
        np.testing.assert_array_equal(ours.scales, four_bit[prefix + "absmax"], key)
        if double:
            for part in ("offset", "nested_absmax"):
                np.testing.assert_array_equal(
                    ours.extra[part.replace("absmax", "scales")].reshape(-1), four_bit[prefix + part], key
                )
        values = formats.dequantize(stored(four_bit, prefix, quant, weight.shape, size, double))
        np.testing.assert_array_equal(values.astype(DTYPES[dtype]), four_bit[prefix + "deq"], key)
        if prefix + "deq_f32" in four_bit:
            np.testing.assert_array_equal(values, four_bit[prefix + "deq_f32"], key)
        seen += 1
    assert seen == 60


def test_the_tables_are_bitsandbytes_own(four_bit):
    for name in ("nf4", "fp4"):
        np.testing.assert_array_equal(formats.FORMATS[name].module.VALUES, four_bit[f"code.{name}"])
    np.testing.assert_array_equal(dynamic8.VALUES, four_bit["code.dynamic8"])


def test_int8_codes_and_scales_are_byte_equal(eight_bit):
    for weight, suffix in (("W", ""), ("W_nozero", "_nozero")):
        parts = int8.quantize(eight_bit[weight])
        np.testing.assert_array_equal(parts["codes"], eight_bit["CB" + suffix])
        np.testing.assert_array_equal(parts["scales"][:, 0], eight_bit["SCB" + suffix])


@pytest.mark.parametrize("short", ["f32", "fp16", "bf16"])
def test_int8_linear_reproduces_the_recording(eight_bit, short):
    codes, scales = eight_bit["CB_nozero"], eight_bit["SCB_nozero"]
    dtype = {"f32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[short]
    x = eight_bit["x"].astype(dtype)
    np.testing.assert_array_equal(int8.linear(x, codes, scales, threshold=0), eight_bit[f"{short}.t0.out"])
    half = x.astype(np.float16)
    np.testing.assert_array_equal(int8.outlier_columns(half), eight_bit[f"{short}.t6.outlier_cols"])
    for rows, key in ((slice(None), "out"), (slice(5, 6), "out_row5")):
        want = eight_bit[f"{short}.t6.{key}"].astype(np.float64)
        got = int8.linear(x[rows], codes, scales).astype(np.float64)
        # one rounding apart, of the dtype: the order in which the outliers' products are summed is PyTorch's own
        unit = float(ml_dtypes.finfo(dtype).eps)
        assert np.abs(got - want).max() <= unit * np.abs(want).max()
        assert (got == want).mean() > 0.9
