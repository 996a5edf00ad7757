"""4-bit blocks as ONNX defines them: symmetric INT4 codes, one float32 scale for each block of a row.

    scale = max|w| / 7          code = round(w / scale), ties to even, in [-8, 7]          w' = scale * code

A block is `block_size` neighbours on the input axis, the axis that a matrix product sums over. Symmetric codes of
round-to-nearest stay within [-7, 7]; -8 is decoded, but not produced. Bit-equal to `QuantizeLinear` and
`DequantizeLinear` (axis 1, `block_size`, opset 21) of onnxruntime and of onnx's ReferenceEvaluator.

>>> blocks = quantize(np.array([[0.7, -0.2, 0.1, 0.0, 8.0, 1.0, -7.0, 3.0]], np.float32), block_size=4)
>>> blocks.codes
array([[ 7, -2,  1,  0,  7,  1, -6,  3]], dtype=int8)
>>> blocks.scales.round(3)
array([[0.1  , 1.143]], dtype=float32)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Int4Blocks:
    """A matrix (O, I) in 4-bit blocks: `packed` (O, I/2) uint8, two codes a byte, the first in the low four bits
    (ONNX's packing), and `scales` (O, I/block_size) float32."""

    packed: np.ndarray
    scales: np.ndarray
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def codes(self) -> np.ndarray:
        """The codes (O, I), int8 in [-8, 7]."""
        both = np.stack([self.packed & 15, self.packed >> 4], axis=-1).reshape(self.shape).astype(np.int8)
        return (both ^ 8) - 8  # two's complement of four bits

    @property
    def bits_per_weight(self) -> float:
        return 4 + 32 / self.block_size

    def rows(self, rows: slice | np.ndarray) -> Int4Blocks:
        """The blocks of some rows."""
        return Int4Blocks(self.packed[rows], self.scales[rows], self.block_size)


def quantize(weight: np.ndarray, block_size: int = 32) -> Int4Blocks:
    """The nearest 4-bit blocks of a float32 matrix (O, I).

    Raises ValueError if the rows are not made of whole blocks, the block size is odd, or a weight is not finite.
    """
    out_features, in_features = weight.shape
    if block_size < 2 or block_size % 2 or in_features % block_size:
        fitting = [b for b in (16, 32, 64, 128, 256) if in_features % b == 0]
        hint = f"; {', '.join(map(str, fitting))} are" if fitting else ""
        raise ValueError(f"row length {in_features} is not a multiple of an even block_size {block_size}{hint}")
    blocks = weight.astype(np.float32, copy=False).reshape(out_features, -1, block_size)
    if not np.isfinite(blocks).all():
        raise ValueError("a weight is NaN or infinite; no scale fits it")
    scales = np.abs(blocks).max(-1) / np.float32(7)
    safe = np.where(scales > 0, scales, np.float32(1))  # a block of zeros has scale 0 and codes 0
    codes = np.clip(np.rint(blocks / safe[..., None]), -8, 7).astype(np.int8).reshape(weight.shape)
    nibbles = codes.view(np.uint8) & 15
    return Int4Blocks(nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales, block_size)


def dequantize(blocks: Int4Blocks) -> np.ndarray:
    """The float32 matrix (O, I) that the codes stand for: one rounding each, of scale * code."""
    codes = blocks.codes.reshape(*blocks.scales.shape, blocks.block_size).astype(np.float32)
    return (codes * blocks.scales[..., None]).reshape(blocks.shape)
