"""The NumPy meaning of each operation that the decoder is written in.

`NumPyOps(dtype)` computes in one of four number formats:

- float64, the oracle, and float32: every operation in that format;
- bfloat16 and float16, the emulation: tensors are kept in 16 bits, and each operation computes in float32 and rounds
  its result once, as PyTorch does on a CPU. Where the model's code says `.float()`, the decoder says `upcast`, and
  `type_as` rounds back.

Do not multiply 16-bit tensors by Python numbers: `x * 0.5` is float32 for bfloat16, and float16 for float16.

>>> ops = NumPyOps("bfloat16")
>>> x = np.array([1.0, 2.0, 3.0], ops.dtype)
>>> ops.type_as(ops.upcast(x) * (1 / 3), x)
array([0.333984, 0.667969, 1], dtype=bfloat16)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
TILE_BYTES = 64 << 20  # larger weights are converted tile by tile


class Readable(Protocol):
    """A parameter, however it is stored: mapped, quantized, normalised."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray: ...


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) over its sum along the last axis, and exactly 0 where x is -inf.

    The row's largest is subtracted first, so that exp cannot overflow.
    """
    e = np.exp(x - x.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    return e


class NumPyOps:
    """The operations over arrays of `dtype`, whose sums and 16-bit steps are done in `wide` (float32 or float64)."""

    def __init__(self, dtype: str | type | np.dtype = "float32"):
        self.dtype = np.dtype(dtype)
        self.wide = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    def upcast(self, x: np.ndarray) -> np.ndarray:
        """`x.float()`: the same values in the wide format."""
        return x.astype(self.wide, copy=False)

    def type_as(self, x: np.ndarray, other: np.ndarray) -> np.ndarray:
        """`x.type_as(other)`: rounded to the other tensor's format, to nearest, ties to even."""
        return x.astype(other.dtype, copy=False)

    def parameter(self, weight: Readable) -> np.ndarray:
        """The whole parameter as a tensor."""
        return weight.read(self.dtype)

    def take(self, weight: Readable, ids: np.ndarray) -> np.ndarray:
        """Rows of a (V, C) matrix: ids (B, T) -> (B, T, C). Only those rows are read."""
        rows, where = np.unique(ids, return_inverse=True)
        return weight.read(self.dtype, rows)[where.reshape(ids.shape)]

    def linear(self, x: np.ndarray, weight: Readable, bias: Readable | None = None) -> np.ndarray:
        """x @ weight.T + bias: (..., I) by (O, I) -> (..., O), rounded once at the end.

        The weight is read tile by tile, so that a 16-bit matrix is never converted as a whole.
        """
        if hasattr(weight, "linear"):  # a format that quantizes the input as well
            return weight.linear(x, None if bias is None else bias.read(self.dtype))
        out_features, in_features = weight.shape
        wide = self.upcast(x).reshape(-1, in_features)
        out = np.empty((len(wide), out_features), self.wide)
        step = max(1, TILE_BYTES // (in_features * self.wide.itemsize))
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            np.matmul(wide, self.upcast(weight.read(self.dtype, rows)).T, out=out[:, rows])
        if bias is not None:
            out += self.upcast(bias.read(self.dtype))
        return out.astype(x.dtype, copy=False).reshape(*x.shape[:-1], out_features)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a @ b over the last two axes, rounded to the format of `a`."""
        return np.matmul(self.upcast(a), self.upcast(b)).astype(a.dtype, copy=False)

    def weighted_sum(self, probs: np.ndarray, value: np.ndarray) -> np.ndarray:
        """probs (..., R, S) @ value (..., S, D) in the format of `value`: the end of attention.

        Wide probs over a 16-bit value come from a fused attention. PyTorch's CPU kernel multiplies the value by the
        numerators exp(score - max), rounded to 16 bits, and divides by their unrounded sum afterwards. The row's
        largest prob is one over that sum, because its numerator is 1. (Source: flash attention in PyTorch's
        aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.)
        """
        if probs.dtype == value.dtype or self.dtype == self.wide:  # a cache may keep wide values in float16
            return self.matmul(probs, value)
        top = probs.max(-1, keepdims=True)
        numerators = (probs / top).astype(value.dtype)
        return (np.matmul(self.upcast(numerators), self.upcast(value)) * top).astype(value.dtype)

    def mean(self, x: np.ndarray) -> np.ndarray:
        """The mean over the last axis, which is kept with length 1."""
        return x.mean(-1, keepdims=True)

    def rsqrt(self, x: np.ndarray) -> np.ndarray:
        return 1.0 / np.sqrt(x)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """1 / (1 + exp(-x)), in the form whose exponential cannot overflow."""
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, 1.0, e) / (1.0 + e)

    def softmax(self, x: np.ndarray) -> np.ndarray:
        """The softmax over the last axis."""
        return softmax(x)

    def split(self, x: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """The last axis cut into pieces of these sizes."""
        return np.split(x, np.cumsum(sizes)[:-1], axis=-1)

    def concat(self, pieces: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
        """The pieces joined along an axis."""
        return np.concatenate(pieces, axis=axis)
