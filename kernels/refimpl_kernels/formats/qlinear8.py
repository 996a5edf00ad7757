"""Baichuan v1's QLinear with 8 bits: one scale a row, and the codes stored transposed.

    weight  (I, O) int8      round(w / scale), transposed: a row of it is an input        (here `packed` stays (O, I))
    scale   (O,) float32     max|row| / 127, computed in the weight's dtype
    w' = code * scale, in the input's dtype           8 + 32/I bits a weight

The scale of a float16 or bfloat16 weight is rounded to that dtype. A code is the float32 quotient, rounded to nearest,
ties to even. The linear multiplies codes and scale in the dtype of its input, one rounding more than in this file's
float32 values.

**Source**: Baichuan-13B-Base quantizer / modeling_baichuan.py: class QLinear (int8 branch).

>>> quantize(np.array([[1.0, -0.5, 0.25, 0.0]], np.float32))["codes"]
array([[127, -64,  32,   0]], dtype=int8)
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from refimpl_kernels.formats import int8

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def quantize(x: np.ndarray, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Rows (n, b) of float32, which are values of `dtype`, as `codes` (n, b) int8 and `scales` (n, 1) float32."""
    return quantize_to(x, 127, dtype)


def quantize_to(x: np.ndarray, largest: int, dtype: str) -> dict[str, np.ndarray]:
    """Rows as codes of -largest … largest: QLinear with 8 bits (127) and with 4 (7)."""
    if dtype not in _DTYPES:
        raise ValueError(f"the weight's dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    x = x.astype(_DTYPES[dtype]).astype(np.float32)
    scales = (np.abs(x).max(-1, keepdims=True) / np.float32(largest)).astype(_DTYPES[dtype]).astype(np.float32)
    codes = np.rint(x / np.where(scales > 0, scales, np.float32(1)))
    return dict(codes=np.clip(codes, -largest - 1, largest).astype(np.int8), scales=scales)


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows (n, b) of float32: code * scale."""
    return codes.astype(np.float32) * scales


def linear(x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x (…, I) by codes (O, I) and scales (O, 1) -> (…, O): the weight rounded to the dtype of x, sums in float32."""
    weight = dequantize(codes, scales.reshape(-1, 1).astype(x.dtype).astype(np.float32)).astype(x.dtype)
    return (x.astype(np.float32) @ weight.astype(np.float32).T).astype(x.dtype)


pack, unpack = int8.pack, int8.unpack
