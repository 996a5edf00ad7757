"""INT4 of ONNX: codes -8 … 7, one float32 scale a block and, where it is asymmetric, one zero point a block.

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

`round` takes ties to even. Symmetric codes of round-to-nearest stay within -7 … 7. Of the granularities of ONNX,
blocks are `block_size`=32 and so on, per channel is one block a row, per tensor one block a matrix. Blocks may also
run down the columns (axis 0), which is what a MatMul's (I, O) weight needs. UINT4 is the same with 8 added to codes
and zero points.

**Source**: onnx operators QuantizeLinear and DequantizeLinear, opset 21. Quantizing with the scales given here,
onnxruntime and onnx's ReferenceEvaluator give the same codes, and dequantizing the same float32, to the bit.

>>> parts = quantize(np.array([[0.7, -0.2, 0.1, 0.0], [8.0, 1.0, -7.0, 3.0]], np.float32))
>>> parts["codes"], parts["scales"].round(3)
(array([[ 7, -2,  1,  0], [ 7,  1, -6,  3]], dtype=int8), array([[0.1  ], [1.143]], dtype=float32))
>>> parts = quantize(np.array([[0.5, -0.2, 1.3, 0.0]], np.float32), symmetric=False)
>>> parts["codes"], parts["zero_points"], dequantize(**parts).round(3)
(array([[-1, -8,  7, -6]], dtype=int8), array([[-6]], dtype=int8), array([[ 0.5, -0.2,  1.3,  0. ]], dtype=float32))
"""

from __future__ import annotations

import numpy as np

from kernels.search import best_scales


def quantize(
    x: np.ndarray, symmetric: bool = True, search: int = 0, importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) int8, `scales` (n, 1) float32; asymmetric, `zero_points` (n, 1) int8.

    A block of zeros has scale 0 and codes 0. `search`, `importance`: see search.py.
    """
    if symmetric:
        scales = np.abs(x).max(-1, keepdims=True) / np.float32(7)
        low = None
    else:
        low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
        scales = (np.maximum(x.max(-1, keepdims=True), np.float32(0)) - low) / np.float32(15)

    def encode(scales: np.ndarray) -> dict[str, np.ndarray]:
        zero_points = None
        if low is not None:
            zero_points = np.clip(np.rint(-8 - low / _nonzero(scales)), -8, 7).astype(np.int8)
        return round_to(x, scales, zero_points)

    return best_scales(x, scales, encode, lambda parts: dequantize(**parts), search, importance)


def round_to(x: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """QuantizeLinear: the codes of blocks (n, b) for given scales and zero points, and those with them."""
    codes = np.rint(x / _nonzero(scales))
    parts = dict(codes=codes, scales=scales)
    if zero_points is not None:
        parts.update(codes=codes + zero_points, zero_points=zero_points)
    return {**parts, "codes": np.clip(parts["codes"], -8, 7).astype(np.int8)}


def dequantize(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> np.ndarray:
    """DequantizeLinear: blocks (n, b) of float32, one rounding each, of (code - zero point) * scale."""
    centred = codes if zero_points is None else codes - zero_points
    return centred.astype(np.float32) * scales


def _nonzero(scales: np.ndarray) -> np.ndarray:
    return np.where(scales != 0, scales, np.float32(1))


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, ceil(I/2)), the first of two in the low four bits.

    A row starts on a byte here. ONNX runs on from row to row, which differs where I is odd: pack one long row there.
    """
    nibbles = codes.view(np.uint8) & 15
    if codes.shape[1] % 2:
        nibbles = np.pad(nibbles, ((0, 0), (0, 1)))
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, …) -> codes (R, count), int8 in -8 … 7."""
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :count].view(np.int8)
    return (nibbles ^ 8) - 8  # two's complement of four bits
