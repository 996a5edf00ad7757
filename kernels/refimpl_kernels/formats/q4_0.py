"""Q4_0 of GGUF: blocks of 32 codes 0 … 15 and one float16 scale, centred on code 8.

    one block of 32 weights, 18 bytes:    scale (float16) | 16 bytes: byte j has c[j] in the low four bits
                                                            and c[j + 16] in the high ones

    m = the weight of the largest magnitude, with its sign          scale = m / -8
    code = trunc(w / scale + 8.5), at most 15                       w' = (code - 8) * scale
                                                                    4.5 bits a weight

So m gets exactly code 0, whatever its sign, and its side has one code more than the other. The codes are made with the
float32 scale, which is rounded to float16 only afterwards, as in llama.cpp and gguf-py.

**Source**: gguf-py quants.py: Q4_0; ggml-quants.c: quantize_row_q4_0_ref.

>>> parts = quantize(np.linspace(-1, 0.5, 32, dtype=np.float32)[None])
>>> parts["codes"][0, ::6], parts["scales"], dequantize(**parts)[0, ::6]
(array([ 0,  2,  5,  7,  9, 12], dtype=uint8), array([[0.125]], dtype=float16),
 array([-1.   , -0.75 , -0.375, -0.125,  0.125,  0.5  ], dtype=float32))
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import Rounder, clip, half, reciprocal, trials

BLOCK = np.dtype([("scales", "<f2"), ("packed", "u1", 16)])


def _grid(scale, low):
    return reciprocal(scale), np.float32(8), half(scale)


def _level(x, by, zero):
    return clip(np.trunc(x * by + np.float32(8.5)), 0, 15) - zero


ROUNDER = Rounder("q4_0", _grid, _level)


def quantize(
    x: np.ndarray, search: int = 0, importance: np.ndarray | None = None, backend: ModuleType = numpy_search
) -> dict[str, np.ndarray]:
    """Blocks (n, 32) of float32 as `codes` (n, 32) uint8 and `scales` (n, 1) float16. Options: see search.py."""
    found = backend.best_scales(x, trials(backend.largest(x) / np.float32(-8), search), ROUNDER, importance)
    return dict(codes=found.codes, scales=found.scales.astype(np.float16))


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) of float32: (code - 8) * scale."""
    return (codes.astype(np.float32) - np.float32(8)) * scales.astype(np.float32)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, I/2): in each block of 32, c[j] low and c[j + 16] high."""
    halves = codes.reshape(len(codes), -1, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, I/2) -> codes (R, I), uint8 in 0 … 15."""
    blocks = packed.reshape(len(packed), -1, 16)
    return np.stack([blocks & 15, blocks >> 4], 2).reshape(len(packed), -1)[:, :count]
