"""INT4 of ONNX: codes -8 … 7, a float32 scale for each block and, if asymmetric, a zero point for each block.

    a row             w0 w1 … w31 | w32 …              blocks of `block_size` neighbours, here 32
    bytes             w1 w0 | w3 w2 | …                two codes a byte, FIRST in the LOW four bits, two's complement
    scales            s0 | s1 …                        float32, (O, I/block_size)
    zero points       z0 | z1 …                        -8 … 7, like the codes, or none: all 0

    symmetric         scale = max|w| / 7                                  code = clip(round(w / scale), -8, 7)
    asymmetric        scale = (max(w, 0) - min(w, 0)) / 15                zero point = round(-8 - min(w, 0) / scale)
                      code = clip(round(w / scale) + zero point, -8, 7)
    w' = (code - zero point) * scale                   4 + 32/block_size bits, 4/block_size more for zero points

A scale of max/7 keeps the largest weight exact whatever its sign; max/8 would be finer by an eighth and clip one of
two signs. One outlier makes the whole block coarse: that is why blocks are small.

`round` takes ties to even. Symmetric codes of round-to-nearest stay within -7 … 7. ONNX has three granularities:
blocks (`block_size`=32 and so on), channels (a row is one block) and tensors (the matrix is one block). Blocks may also
run down the columns (axis 0), as a MatMul's (I, O) weight needs. UINT4 is the same with 8 added to codes and zero
points.

**Source**: onnx operators QuantizeLinear and DequantizeLinear, opset 21. With the scales given here, onnxruntime and
onnx's ReferenceEvaluator give the same codes, and dequantize them to the same float32, to the bit.

>>> parts = quantize(np.array([[0.7, -0.2, 0.1, 0.0], [8.0, 1.0, -7.0, 3.0]], np.float32))
>>> parts["codes"], parts["scales"].round(3)
(array([[ 7, -2,  1,  0], [ 7,  1, -6,  3]], dtype=int8), array([[0.1  ], [1.143]], dtype=float32))
>>> parts = quantize(np.array([[0.5, -0.2, 1.3, 0.0]], np.float32), symmetric=False)
>>> parts["codes"], parts["zero_points"], dequantize(**parts).round(3)
(array([[-1, -8,  7, -6]], dtype=int8), array([[-6]], dtype=int8), array([[ 0.5, -0.2,  1.3,  0. ]], dtype=float32))
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import Rounder, clip, nonzero, trials


def _symmetric(scale, low):
    return nonzero(scale), np.float32(0), scale


def _asymmetric(scale, low):
    by = nonzero(scale)
    return by, clip(np.rint(np.float32(-8) - low / by), -8, 7), scale


def _level(x, by, zero):
    return clip(np.rint(x / by) + zero, -8, 7) - zero


SYMMETRIC = Rounder("int4", _symmetric, _level, "int8")
ASYMMETRIC = Rounder("int4 with zero points", _asymmetric, _level, "int8")


def quantize(
    x: np.ndarray,
    symmetric: bool = True,
    search: int = 0,
    importance: np.ndarray | None = None,
    backend: ModuleType = numpy_search,
) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) int8 and `scales` (n, 1) float32.

    If asymmetric, also as `zero_points` (n, 1) int8. A block of zeros has scale 0 and codes 0. `search`, `importance`:
    see search.py.
    """
    if symmetric:
        scales = np.abs(backend.largest(x)) / np.float32(7)
        found = backend.best_scales(x, trials(scales, search), SYMMETRIC, importance)
        return dict(codes=found.codes, scales=found.scales)
    low, high = backend.ends(x)
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scales = (high - low) / np.float32(15)
    found = backend.best_scales(x, trials(scales, search), ASYMMETRIC, importance, low)
    return dict(codes=found.codes, scales=found.scales, zero_points=found.lows.astype(np.int8))


def dequantize(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> np.ndarray:
    """DequantizeLinear: blocks (n, b) of float32, (code - zero point) * scale, rounded once."""
    centred = codes if zero_points is None else codes - zero_points
    return centred.astype(np.float32) * scales


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, ceil(I/2)), the first of two in the low four bits.

    Here each row starts on a byte. ONNX runs on from row to row, which differs if I is odd; then pack one long row.
    """
    nibbles = codes.view(np.uint8) & 15
    if codes.shape[1] % 2:
        nibbles = np.pad(nibbles, ((0, 0), (0, 1)))
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, …) -> codes (R, count), int8 in -8 … 7."""
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :count].view(np.int8)
    return (nibbles ^ 8) - 8  # two's complement of four bits
