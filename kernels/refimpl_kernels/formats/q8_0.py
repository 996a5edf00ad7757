"""Q8_0 of GGUF: blocks of 32 codes of 8 bits and one float16 scale. llama.cpp rounds activations to it, too.

    one block of 32 weights, 34 bytes:    scale (float16) | c0 c1 … c31 (int8)

    scale = max|w| / 127         code = round(w / scale), halves away from zero
    w' = code * scale            8.5 bits a weight

The codes are made with the float32 scale, which is rounded to float16 only afterwards, as in llama.cpp and gguf-py.

**Source**: gguf-py quants.py: Q8_0; ggml-quants.c: quantize_row_q8_0_ref.

>>> parts = quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None])
>>> parts["codes"][0, :4], parts["scales"]
(array([-127, -119, -111, -102], dtype=int8), array([[0.00787]], dtype=float16))
"""

from __future__ import annotations

import numpy as np

from refimpl_kernels.formats.search import reciprocal

BLOCK = np.dtype([("scales", "<f2"), ("packed", "u1", 32)])


def quantize(x: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks (n, 32) of float32 as `codes` (n, 32) int8 and `scales` (n, 1) float16."""
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    relative = x * reciprocal(scales)
    whole = np.floor(np.abs(relative))
    rounded = whole + np.floor(2 * (np.abs(relative) - whole))
    return dict(codes=(np.sign(relative) * rounded).astype(np.int8), scales=scales.astype(np.float16))


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) of float32: code * scale."""
    return codes.astype(np.float32) * scales.astype(np.float32)


def pack(codes: np.ndarray) -> np.ndarray:
    """The codes, unchanged."""
    return codes


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """The codes, unchanged."""
    return packed[:, :count]
