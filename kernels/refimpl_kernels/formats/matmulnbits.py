"""MatMulNBits of onnxruntime, 4 bits: blocks along each row, codes 0 … 15, a scale and a zero point a block.

    B            (O, blocks, block_size / 2) uint8    two codes a byte, the first in the low four bits
    scales       (O, blocks) float32
    zero_points  (O, ceil(blocks / 2)) uint8          two a byte, likewise; an odd last one is followed by 8
                                                      left out where the quantization is symmetric: all 8

    symmetric    m = max(w) if |max(w)| > |min(w)| else min(w)      scale = m / -8       (as Q4_0, see q4_0.py)
    asymmetric   scale = (max(w, 0) - min(w, 0)) / 15               zero point = round(-min(w, 0) / scale)
    code = clip(round(w * (1 / scale) + zero point), 0, 15)         w' = (code - zero point) * scale
    4 + 32/block_size bits, 4/block_size more for zero points

`round` takes halves away from zero. If a row is not made of whole blocks, the last one is filled up with zeros, which
count in its scale. Block sizes are powers of two from 16.

**Source**: onnxruntime mlas/lib/q4_dq.cpp: BlockwiseQuantizer, range2scale, range2scalezp;
python/tools/quantization/matmul_nbits_quantizer.py; docs/ContribOperators.md: com.microsoft.MatMulNBits.

>>> parts = quantize(np.linspace(-1, 0.5, 16, dtype=np.float32)[None], symmetric=False)
>>> parts["codes"][0, ::5], parts["scales"], parts["zero_points"]
(array([ 0,  5, 10, 15], dtype=uint8), array([[0.1]], dtype=float32), array([[10]], dtype=uint8))
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels.formats import int4
from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import Rounder, half_up, nonzero, reciprocal, trials


def _symmetric(scale, low):
    return reciprocal(scale), np.float32(8), scale


def _asymmetric(scale, low):
    return reciprocal(scale), half_up(-low / nonzero(scale)), scale


def _level(x, by, zero):
    return half_up(x * by + zero) - zero


SYMMETRIC = Rounder("matmulnbits", _symmetric, _level)
ASYMMETRIC = Rounder("matmulnbits with zero points", _asymmetric, _level)


def quantize(
    x: np.ndarray,
    symmetric: bool = True,
    search: int = 0,
    importance: np.ndarray | None = None,
    backend: ModuleType = numpy_search,
) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) uint8 and `scales` (n, 1) float32.

    If asymmetric, also as `zero_points` (n, 1) uint8. `search`, `importance`: see search.py.
    """
    low, high = backend.ends(x)
    if symmetric:
        scales = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-8)
        found = backend.best_scales(x, trials(scales, search), SYMMETRIC, importance)
        return dict(codes=found.codes, scales=found.scales)
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scales = (high - low) / np.float32(15)
    found = backend.best_scales(x, trials(scales, search), ASYMMETRIC, importance, low)
    return dict(codes=found.codes, scales=found.scales, zero_points=found.lows.astype(np.uint8))


def dequantize(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> np.ndarray:
    """Blocks (n, b) of float32: (code - zero point) * scale."""
    centre = np.float32(8) if zero_points is None else zero_points.astype(np.float32)
    return (codes.astype(np.float32) - centre) * scales


def tensors(
    packed: np.ndarray, scales: np.ndarray, block_size: int, zero_points: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The operator's inputs B, scales and, if asymmetric, zero_points, from the arrays that table.py keeps."""
    inputs = {"B": packed.reshape(*scales.shape, block_size // 2), "scales": scales}
    if zero_points is not None:
        missing = scales.shape[1] % 2
        inputs["zero_points"] = int4.pack(np.pad(zero_points, ((0, 0), (0, missing)), constant_values=8))
    return inputs


def from_tensors(B: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The arrays that formats/table.py keeps (`packed`, `scales`, `zero_points`), from the operator's inputs."""
    rows, blocks, _ = B.shape
    parts = {"packed": B.reshape(rows, -1), "scales": scales.reshape(rows, blocks)}
    if zero_points is not None:
        parts["zero_points"] = unpack(zero_points.reshape(rows, -1), blocks)
    return parts


pack = int4.pack


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, …) -> codes (R, count), uint8 in 0 … 15."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :count]
