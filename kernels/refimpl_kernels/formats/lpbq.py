"""LPBQ, AIMET's low-power blockwise quantization: each block's scale is a small integer times the row's float scale.

    a row          w0 … w63 | w64 …                   blocks of `block_size` neighbours
    block_scales   k0 | k1 …                          integers 1 … 16, one a block
    scales         s                                  float64, one a row (an output channel)
    codes          -8 … 7, packed as INT4 (see int4.py)

    step of a block = max(max(w) / 7, -min(w) / 8)                          s = max(step) / 16
    k = clip(round(step / s), 1, 16)                                        code = clip(round(w / (k s)), -8, 7)
    w' = code * float32(k * s)                        4 + 4/block_size + 64/I bits a weight

So a device can sum a row's blocks in integers: the 4-bit code times the 4-bit block scale is an 8-bit weight with one
scale a row. This is why AIMET's encodings say compressed_bw 4 and bw 8. These encodings count codes from 0, with an
offset.

Grids and rounding are AIMET's, as in affine.py: 8 is added in float32, then halves are rounded up. A row's scale is a
double, as in AIMET's encodings files. Only k * s is rounded to float32, because rounding s first would change the last
bit.

**Source**: aimet_onnx: encodings of enc_type LPBQ; the arithmetic of its CPU kernel, observed from outside.

>>> parts = quantize(np.array([[0.7, -0.2, 0.1, 0.0, 8.0, 1.0, -7.0, 3.0]], np.float32), block_size=4)
>>> parts["codes"], parts["block_scales"], parts["scales"].round(4)
(array([[ 7, -3,  1,  0,  7,  1, -6,  3]], dtype=int8), array([[ 1, 16]], dtype=uint8),
 array([[0.0714]]))
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels import affine
from refimpl_kernels.formats import int4
from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import Rounder, half_up


def _grid(scale, low):
    return scale, np.float32(0), scale


def _level(x, by, zero):
    return half_up(x / by + np.float32(8)) - np.float32(8)  # affine.py has the general form


ROUNDER = Rounder("lpbq", _grid, _level, "int8")


def quantize(
    x: np.ndarray,
    block_size: int,
    search: int = 0,
    importance: np.ndarray | None = None,
    backend: ModuleType = numpy_search,
) -> dict[str, np.ndarray]:
    """Rows (n, I) of float32 as `codes` (n, I) int8, `scales` (n, 1) float64, `block_scales` (n, I/block_size) uint8.

    If `search` is not 0, all 16 integers are tried for each block. The one with the least error, weighted by
    `importance`, is kept.
    """
    grid = affine.for_weight(x, 4, block_size, lpbq=True)
    assert grid.block_scale is not None
    blocks, scales = x.reshape(-1, block_size), grid.scale[:, None]
    numbers = np.arange(1, affine.LPBQ_STEPS + 1)[:, None, None] if search else grid.block_scale[None]
    steps = (scales * numbers).astype(np.float32)
    steps = np.broadcast_to(steps, (len(steps), *grid.block_scale.shape)).reshape(len(steps), -1)
    weights = None if importance is None else importance.reshape(blocks.shape)
    found = backend.best_scales(blocks, steps, ROUNDER, weights, fits=0)
    chosen = found.which + 1 if search else grid.block_scale
    chosen = chosen.reshape(grid.block_scale.shape).astype(np.uint8)
    return dict(codes=found.codes.reshape(x.shape), scales=scales, block_scales=chosen)


def dequantize(codes: np.ndarray, scales: np.ndarray, block_scales: np.ndarray) -> np.ndarray:
    """Rows (n, I) of float32: code * (block scale * row scale), rounded after each product."""
    scale = (block_scales * scales).astype(np.float32)
    return (codes.reshape(*scale.shape, -1).astype(np.float32) * scale[..., None]).reshape(codes.shape)


pack, unpack = int4.pack, int4.unpack
