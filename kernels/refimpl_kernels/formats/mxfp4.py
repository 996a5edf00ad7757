"""MXFP4: blocks of 32 floats of 4 bits (E2M1) and one scale that is a power of two (E8M0).

    code  s e e m       value = (-1)^s * 0  0.5  1  1.5  2  3  4  6          s = 1 for codes 8 … 15

    one block of 32 weights, 17 bytes:    scale (one byte, e) | 16 bytes: byte j has c[j] in the low four bits
                                                                and c[j + 16] in the high ones

    m = the largest magnitude           e = floor(log2 m) - 2 + 127, at least 0
    code = the value nearest to w / 2^(e - 127); midway, the smaller magnitude
    w' = value * 2^(e - 127)                                                4.25 bits a weight

m lies between 4 and 8 times the scale, but the largest value is 6, so a weight may lose a quarter of itself. e = 255
stands for NaN in the standard; blocks that have it are refused. Blocks whose weights all lie below 2^-125 get e = 0;
in gguf-py their exponent wraps around.

**Source**: OCP Microscaling Formats (MX) 1.0, section 5; gguf-py quants.py: MXFP4; ONNX: FLOAT4E2M1, FLOAT8E8M0.

>>> parts = quantize(np.linspace(-7, 3, 32, dtype=np.float32)[None])
>>> parts["codes"][0, ::6], parts["scales"], dequantize(**parts)[0, ::6]
(array([15, 15, 13, 10,  1,  5], dtype=uint8), array([[127]], dtype=uint8),
 array([-6. , -6. , -3. , -1. ,  0.5,  3. ], dtype=float32))
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from refimpl_kernels.formats import q4_0

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES]) + np.float32(0)  # the second zero is positive too
BIAS = 127
BLOCK = np.dtype([("scales", "u1"), ("packed", "u1", 16)])


def quantize(x: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks (n, 32) of float32 as `codes` (n, 32) uint8 in 0 … 15 and `scales` (n, 1) uint8, exponents plus 127."""
    _, exponents = np.frexp(np.abs(x).max(-1, keepdims=True))  # m = f * 2^exponent, 0.5 <= f < 1
    scales = np.maximum(exponents - 1 - 2 + BIAS, 0).astype(np.uint8) * x.any(-1, keepdims=True)
    return dict(codes=nearest(x, power(scales)), scales=scales)


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) of float32: value * 2^(scale - 127)."""
    return VALUES[codes] * power(scales)


def nearest(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The codes whose values times `scales` (n, 1) are nearest to x (n, b); midway, those of the smaller magnitude.

    A midpoint has few bits and is exact in float32, so comparing with it decides as exact arithmetic would.
    """
    magnitude, codes = np.abs(x), np.zeros(x.shape, np.uint8)
    for low, high in pairwise(MAGNITUDES):
        codes += magnitude > (low + high) / 2 * scales
    return codes + np.uint8(8) * ((x < 0) & (codes > 0))


def power(scales: np.ndarray) -> np.ndarray:
    """2^(scale - 127) for exponents stored as bytes, in float32. The least one is subnormal, and exact, too."""
    return np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)


pack, unpack = q4_0.pack, q4_0.unpack
