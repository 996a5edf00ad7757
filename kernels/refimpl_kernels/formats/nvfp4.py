"""NVFP4: blocks of 16 floats of 4 bits (E2M1) and one scale that is a float of 8 bits (E4M3, positive).

    code  s e e m       the values of MXFP4: 0  0.5  1  1.5  2  3  4  6, and the same negative

    four blocks of 16 weights, 36 bytes:  4 scales (one byte each) | 4 times 8 bytes: byte j has c[j] in the
                                                                     low four bits and c[j + 8] in the high ones

    scale = max|w| / 6, rounded to E4M3          its byte e e e e m m m: (1 + m/8) * 2^(e - 7), and m/512 where e = 0
    code = the value nearest to w / scale; midway, the smaller magnitude
    w' = value * scale                                      4.5 bits a weight

The scale has three bits after the point where MXFP4's has none, and half as many weights share it. It ranges from 1/512
to 448. NVIDIA's files bring scales into that range by one more float32 for the whole matrix. The engine here is
llama.cpp, which has no such number, so weights above 6 * 448 are refused. (llama.cpp replaces every scale from 256 on
by 448; here the nearest is taken.)

**Source**: gguf-py quants.py: NVFP4; ggml-quants.c: quantize_row_nvfp4_ref; ONNX: FLOAT4E2M1, FLOAT8E4M3FN.

>>> parts = quantize(np.linspace(-7, 3, 16, dtype=np.float32)[None])
>>> parts["codes"][0, ::3], parts["scales"], dequantize(**parts)[0, ::3]
(array([15, 14, 13, 10,  2,  5], dtype=uint8), array([[57]], dtype=uint8),
 array([-6.75 , -4.5  , -3.375, -1.125,  1.125,  3.375], dtype=float32))
"""

from __future__ import annotations

import numpy as np

from refimpl_kernels.formats import mxfp4

LARGEST = np.uint8(0x7E)  # 448; 0x7F stands for NaN
BLOCK = np.dtype([("scales", "u1", 4), ("packed", "u1", 32)])


def _scales() -> np.ndarray:
    """The values of the 127 bytes, ascending."""
    byte = np.arange(LARGEST + 1, dtype=np.int32)
    exponent, mantissa = byte >> 3, byte & 7
    significand = np.where(exponent > 0, 8 + mantissa, mantissa).astype(np.float32)
    return np.ldexp(significand, np.maximum(exponent, 1) - 10)


SCALES = _scales()
_MIDDLES = (SCALES[:-1] + SCALES[1:]) / np.float32(2)
_MIDDLES[7] = SCALES[8]  # the engine rounds every number below the normal ones to a subnormal one


def quantize(x: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks (n, 16) of float32 as `codes` (n, 16) uint8 in 0 … 15 and `scales` (n, 1) uint8, E4M3.

    A scale midway between two is rounded up. Raises ValueError for weights beyond 6 * 448.
    """
    wanted = np.abs(x).max(-1, keepdims=True) / np.float32(6)
    if wanted.size and wanted.max() > SCALES[-1]:
        most = 6 * float(SCALES[-1])
        raise ValueError(f"a weight is {6 * float(wanted.max()):.3g}, but nvfp4 reaches {most:g}; scale the layer down")
    scales = np.searchsorted(_MIDDLES, wanted, side="right").astype(np.uint8)
    return dict(codes=mxfp4.nearest(x, SCALES[scales]), scales=scales)


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks (n, 16) of float32: value * scale."""
    return mxfp4.VALUES[codes] * SCALES[scales]


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, I/2): in each block of 16, c[j] low and c[j + 8] high."""
    halves = codes.reshape(len(codes), -1, 2, 8)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, I/2) -> codes (R, I), uint8 in 0 … 15."""
    blocks = packed.reshape(len(packed), -1, 8)
    return np.stack([blocks & 15, blocks >> 4], 2).reshape(len(packed), -1)[:, :count]
