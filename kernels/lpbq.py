"""LPBQ, AIMET's low power blockwise quantization: each block's scale is a small integer times the row's float scale.

    a row          w0 … w63 | w64 …                   blocks of `block_size` neighbours
    block_scales   k0 | k1 …                          integers 1 … 16, one a block
    scales         s                                  float32, one a row (an output channel)
    codes          -8 … 7, packed as INT4 (see int4.py)

    delta of a block = max(max(w) / 7, -min(w) / 8), at least 2^-23         s = max(delta) / 16
    k = clip(round(delta / s), 1, 16), ties to even                         code = clip(floor(w / (k s) + 1/2), -8, 7)
    w' = code * (k * s)                               4 + 4/block_size + 32/I bits a weight

A device can so sum a row's blocks in integers: the 4-bit code times the 4-bit block scale is an 8-bit weight with
one scale a row, which is why AIMET's encodings call it compressed_bw 4, bw 8. Halves of the codes are rounded
upwards, exactly: floor(v + 1/2) in float32 is not the same (v = 0.49999997). Quantizer "encodings" give offsets of
-8 and -128: the codes there count from 0.

**Source**: aimet_onnx: Quantizer encodings of enc_type LPBQ, the CPU kernel of libpymo (rounding and float32 steps);
aihub models: set_4bit_weights_to_lpbq (block size 64, 4 to 8 bits).

>>> parts = quantize(np.array([[0.7, -0.2, 0.1, 0.0, 8.0, 1.0, -7.0, 3.0]], np.float32), block_size=4)
>>> parts["codes"], parts["block_scales"], parts["scales"].round(4)
(array([[ 7, -3,  1,  0,  7,  1, -6,  3]], dtype=int8), array([[ 1, 16]], dtype=uint8), array([[0.0714]],
dtype=float32))
"""

from __future__ import annotations

import numpy as np

from kernels import int4
from kernels.search import weighted_error

SMALLEST = 2.0**-23  # of a block's scale: AIMET's floor, float32's epsilon


def quantize(
    x: np.ndarray, block_size: int, search: int = 0, importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Rows (n, I) of float32 as `codes` (n, I) int8, `scales` (n, 1) float32, `block_scales` (n, I/block_size) uint8.

    Any `search` tries all 16 integers for each block and takes that of the least error, weighted by `importance`.
    """
    blocks = x.reshape(len(x), -1, block_size)
    delta = np.maximum(blocks.max(-1).astype(np.float64) / 7, blocks.min(-1).astype(np.float64) / -8)
    delta = np.maximum(delta, SMALLEST)
    row = delta.max(-1, keepdims=True) / 16
    scales, block_scales = row.astype(np.float32), np.clip(np.rint(delta / row), 1, 16).astype(np.uint8)
    if search:
        units = blocks.reshape(-1, block_size)
        weights = None if importance is None else importance.reshape(units.shape)
        trials = np.arange(1, 17, dtype=np.uint8)
        errors = []
        for k in trials:
            scale = np.broadcast_to(scales * np.float32(k), delta.shape)[..., None]
            errors.append(weighted_error(units, (_codes(blocks, scale) * scale).reshape(units.shape), weights))
        block_scales = trials[np.argmin(errors, axis=0)].reshape(delta.shape)
    codes = _codes(blocks, (scales * block_scales.astype(np.float32))[..., None])
    return dict(codes=codes.reshape(x.shape), scales=scales, block_scales=block_scales)


def _codes(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    relative = blocks / scale + np.float32(8)  # AIMET counts from 0, in float32
    whole = np.floor(relative)
    return (np.clip(whole + (relative - whole >= 0.5), 0, 15) - 8).astype(np.int8)


def dequantize(codes: np.ndarray, scales: np.ndarray, block_scales: np.ndarray) -> np.ndarray:
    """Rows (n, I) of float32: code * (block scale * row scale)."""
    scale = block_scales.astype(np.float32) * scales
    return (codes.reshape(*scale.shape, -1).astype(np.float32) * scale[..., None]).reshape(codes.shape)


pack, unpack = int4.pack, int4.unpack
