"""LLM.int8, bitsandbytes' 8-bit linear: one scale for each output row, and outliers left out of the rounding.

    weight, as float16 (O, I)   codes (O, I) int8 = round(w * (1/scale * 127))    scale = max|row|, float32 ("SCB")
    w' = code * scale / 127                                                      8 + 32/I bits a weight

The linear quantizes its input as well, row by row, and multiplies the columns that have an outlier separately:

    x as float16 (T, I)   outlier columns: those with any |x| >= threshold (6.0)
    output = (codes of x without them  @  codes of w.T, exact integers) * x scale * w scale * 6.200124e-05
             + outlier columns of x @ their columns of w'.T, in the dtype of x

1/127² is 6.2000124e-05. bitsandbytes' constant is too large by 1.8e-5 (relative), a slip that is kept here. Only the
outliers themselves are left out of a row's largest magnitude; the other numbers of their columns still count there.
A row of zeros has scale 0 and codes 0.

**Source**: bitsandbytes backends/default/ops.py: int8_vectorwise_quant, int8_mm_dequant, int8_mixed_scaled_mm;
_ops.py: int8_vectorwise_dequant. Dettmers 2022, "LLM.int8()", section 3.

>>> parts = quantize(np.array([[1.0, -0.5, 0.25, 0.0]], np.float32))
>>> parts["codes"], parts["scales"]
(array([[127, -64,  32,   0]], dtype=int8), array([[1.]], dtype=float32))
>>> linear(np.array([[1.0, 1.0, 1.0, 8.0]], np.float32), **parts)
array([[0.748045]], dtype=float32)
"""

from __future__ import annotations

import numpy as np

THRESHOLD = 6.0
PER_PRODUCT = np.float32(6.200124e-05)


def quantize(x: np.ndarray) -> dict[str, np.ndarray]:
    """Rows (n, b) as `codes` (n, b) int8 and `scales` (n, 1) float32, after rounding the weights to float16."""
    half = x.astype(np.float16).astype(np.float32)
    if not np.isfinite(half).all():
        raise ValueError(
            "a weight is beyond 65504, the largest float16, which int8 rounds to first; scale the layer down"
        )
    return _rows(half)


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows (n, b) of float32: code * scale, times 1/127."""
    return codes * scales * np.float32(7.874015718698502e-3)


def linear(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, threshold: float = THRESHOLD, bias: np.ndarray | None = None
) -> np.ndarray:
    """x (…, I) by the codes (O, I) and scales (O, 1) of a weight -> (…, O) in the dtype of x (float32 or 16 bits).

    With a threshold of 0 there are no outliers. The result is bitsandbytes', except for the order in which the
    outliers' 16-bit products are summed: here they are summed in float32 and rounded once.
    """
    rows = x.astype(np.float16).reshape(-1, x.shape[-1]).astype(np.float32)
    columns = outlier_columns(rows, threshold)
    parts = _rows(np.where(np.abs(rows) >= threshold, np.float32(0), rows) if threshold else rows)
    parts["codes"][:, columns] = 0
    # float64 holds these sums of integers exactly; int32 to float32 rounds once, as in bitsandbytes
    sums = (parts["codes"].astype(np.float64) @ codes.T.astype(np.float64)).astype(np.float32)
    out = sums * (parts["scales"] * scales.reshape(1, -1)) * PER_PRODUCT
    if bias is not None:
        out += bias.astype(np.float32)
    out = out.astype(x.dtype)
    if len(columns):
        apart = dequantize(codes[:, columns], scales.reshape(-1, 1)).astype(x.dtype).astype(np.float32)
        kept = x.reshape(rows.shape)[:, columns].astype(np.float32)
        out = (out.astype(np.float32) + kept @ apart.T).astype(x.dtype)
    return out.reshape(*x.shape[:-1], len(codes))


def outlier_columns(rows: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """The numbers of the columns of (T, I) in which any magnitude reaches the threshold."""
    return np.flatnonzero((np.abs(rows) >= threshold).any(0)) if threshold else np.zeros(0, np.int64)


def _rows(x: np.ndarray) -> dict[str, np.ndarray]:
    scales = np.abs(x).max(-1, keepdims=True)
    per_unit = np.float32(1) / np.where(scales > 0, scales, np.float32(1)) * np.float32(127)  # PyTorch's 127 / scale
    return dict(codes=np.rint(x * per_unit).astype(np.int8), scales=scales)


def pack(codes: np.ndarray) -> np.ndarray:
    """The codes, unchanged."""
    return codes


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """The codes, unchanged."""
    return packed[:, :count]
