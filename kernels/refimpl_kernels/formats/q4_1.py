"""Q4_1 of GGUF: blocks of 32 codes 0 … 15, a float16 scale, and a float16 minimum to count from.

    one block of 32 weights, 20 bytes:    scale (float16) | min (float16) | 16 bytes as in Q4_0 (see q4_0.py)

    min = min(w)        scale = (max(w) - min(w)) / 15        code = trunc((w - min) / scale + 0.5), at most 15
    w' = code * scale + min                                   5 bits a weight

The codes are made with scale and minimum in float32, which are rounded to float16 only afterwards, as in llama.cpp and
gguf-py.

**Source**: gguf-py quants.py: Q4_1; ggml-quants.c: quantize_row_q4_1_ref.

>>> parts = quantize(np.linspace(-1, 0.5, 32, dtype=np.float32)[None])
>>> parts["codes"][0, ::6], parts["scales"], parts["mins"]
(array([ 0,  3,  6,  9, 12, 15], dtype=uint8), array([[0.1]], dtype=float16), array([[-1.]], dtype=float16))
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels.formats import q4_0
from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import FITS, LINE_FACTORS, reciprocal, trials

BLOCK = np.dtype([("scales", "<f2"), ("mins", "<f2"), ("packed", "u1", 16)])


def quantize(
    x: np.ndarray, search: int = 0, importance: np.ndarray | None = None, backend: ModuleType = numpy_search
) -> dict[str, np.ndarray]:
    """Blocks (n, 32) of float32 as `codes` (n, 32) uint8, `scales`, `mins` (n, 1) float16. Options: see search.py."""
    mins, highest = backend.ends(x)
    scales = (highest - mins) / np.float32(15)
    if search:
        _, scales, mins, _ = backend.best_lines(x, trials(scales, search, *LINE_FACTORS), mins.T, importance, FITS)
    codes = np.clip(np.trunc((x - mins) * reciprocal(scales) + np.float32(0.5)), 0, 15).astype(np.uint8)
    return dict(codes=codes, scales=scales.astype(np.float16), mins=mins.astype(np.float16))


def dequantize(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) of float32: code * scale + min, rounded twice."""
    return codes.astype(np.float32) * scales.astype(np.float32) + mins.astype(np.float32)


pack, unpack = q4_0.pack, q4_0.unpack
