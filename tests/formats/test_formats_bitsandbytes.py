"""LLM.int8's linear, and the tables of 4-bit values, against recordings of bitsandbytes 0.50.2.

That codes, scales and values are its to the byte is in test_formats_engines.py.
"""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl_kernels import formats
from refimpl_kernels.formats import dynamic8, int8


@pytest.fixture(scope="module")
def recorded(shared):
    return load_file(shared / "golden" / "quant-int8.safetensors")


def test_the_tables_are_bitsandbytes_own(shared):
    tables = load_file(shared / "golden" / "quant-4bit.safetensors")
    for name in ("nf4", "fp4"):
        np.testing.assert_array_equal(formats.FORMATS[name].module.VALUES, tables[f"code.{name}"])
    np.testing.assert_array_equal(dynamic8.VALUES, tables["code.dynamic8"])


@pytest.mark.parametrize("short", ["f32", "fp16", "bf16"])
def test_outliers_are_kept_apart_as_recorded(recorded, short):
    codes, scales = recorded["CB_nozero"], recorded["SCB_nozero"]
    dtype = {"f32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[short]
    x = recorded["x"].astype(dtype)
    for rows, key in ((slice(None), "out"), (slice(5, 6), "out_row5")):
        want = recorded[f"{short}.t6.{key}"].astype(np.float64)
        got = int8.linear(x[rows], codes, scales).astype(np.float64)
        # one rounding apart, of the dtype: the order in which the outliers' products are summed is PyTorch's own
        unit = float(ml_dtypes.finfo(dtype).eps)
        assert np.abs(got - want).max() <= unit * np.abs(want).max()
        assert (got == want).mean() > 0.9


def test_outliers_need_no_recording():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((7, 33)).astype(np.float32), rng.standard_normal((5, 33)).astype(np.float32)
    x[2, 4], x[0, 20], x[4, 4] = 60, -6, 5.9  # a column is apart if any of its magnitudes reaches 6
    parts = int8.quantize(weight)
    assert int8.outlier_columns(x).tolist() == [4, 20]
    exact = x @ int8.dequantize(**parts).T
    apart, within = (np.abs(int8.linear(x, **parts, threshold=t) - exact).max() for t in (6.0, 0.0))
    assert apart < 0.5 * within
    # the constant is 1.8e-5 too large, and outlier columns add nothing to the integers
    ones = int8.linear(np.ones((1, 3), np.float32), np.full((1, 3), 127, np.int8), np.ones((1, 1), np.float32))
    assert ones[0, 0] == pytest.approx(3 * (1 + 1.8e-5), abs=2e-6)
    bias = rng.standard_normal(7).astype(np.float32)
    np.testing.assert_allclose(
        int8.linear(x, **parts, bias=bias) - int8.linear(x, **parts), np.tile(bias, (5, 1)), rtol=1e-4
    )
    three = int8.linear(x[None], **parts)
    assert three.shape == (1, 5, 7)
    np.testing.assert_array_equal(three[0], int8.linear(x, **parts))
