"""Q4_K of GGUF: 256 weights in eight sub-blocks, whose scales and minima are 6-bit multiples of two float16 numbers.

    one block of 256 weights, 144 bytes:    d, dmin (float16) | 8 sub_scales, 8 sub_mins (6 bits each, 12 bytes)
                                            | 128 bytes of codes

    12 bytes of 6-bit numbers, s for sub_scales and m for sub_mins, high bits first:
        byte j     = 0 … 3     s[j+4] bits 5-4 | s[j] bits 5-0
        byte 4 + j             m[j+4] bits 5-4 | m[j] bits 5-0
        byte 8 + j             m[j+4] bits 3-0 | s[j+4] bits 3-0
    128 bytes of codes: four runs of 32 bytes; byte j of run k has the code of weight 64k + j in the low four bits
        and that of weight 64k + 32 + j in the high ones

    w' = d * sub_scale * code - dmin * sub_min          code 0 … 15          4.5 bits a weight

The format leaves open how the numbers are found, and gguf-py has no quantizer. Here each sub-block of 32 first gets a
line w ≈ scale * code + min with min <= 0, by `best_lines` (search.py): it tries spans around the full one, and fits
scale and minimum to each set of codes by least squares. Then d = max(scale) / 63 and dmin = max(-min) / 63 are rounded
to float16. Each pair of 6-bit numbers is the best of the nine around the rounded pair. Finally the codes are rounded
for the lines that these numbers give.

**Source** of layout and decoding: gguf-py quants.py: Q4_K; ggml-common.h: block_q4_K; ggml-quants.c:
dequantize_row_q4_K.

>>> parts = quantize(np.linspace(-1, 0.5, 256, dtype=np.float32)[None], search=0)
>>> parts["sub_scales"], parts["sub_mins"]
(array([[23, 23, 23, 23, 23, 23, 39, 63]], dtype=uint8), array([[63, 51, 39, 27, 16,  4,  0,  0]], dtype=uint8))
"""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np

from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import FITS, LINE_FACTORS, reciprocal, trials

BLOCK = np.dtype([("scales", "<f2"), ("dmins", "<f2"), ("six_bits", "u1", 12), ("packed", "u1", 128)])


def quantize(
    x: np.ndarray, search: int = 8, importance: np.ndarray | None = None, backend: ModuleType = numpy_search
) -> dict[str, np.ndarray]:
    """Blocks (n, 256) of float32 as `codes` (n, 256) uint8, `scales` (d) and `dmins` (n, 1) float16, and `sub_scales`
    and `sub_mins` (n, 8) uint8 in 0 … 63. `search`: how many spans are tried for each sub-block beside the full one.
    """
    subs = x.reshape(-1, 32)
    importance = None if importance is None else importance.reshape(-1, 32)
    lowest, highest = backend.ends(subs)
    mins = np.minimum(lowest, np.float32(0))
    scales = (highest - mins) / np.float32(15)
    if search:
        factors = trials(scales, search, *LINE_FACTORS)
        _, scales, mins, _ = backend.best_lines(subs, factors, mins.T, importance, FITS, highest=0.0)
    scales, mins = scales.reshape(-1, 8), np.float32(0) - mins.reshape(-1, 8)
    d, dmins = ((a.max(-1, keepdims=True) / np.float32(63)).astype(np.float16) for a in (scales, mins))
    near_scales, near_mins = (np.rint(a * reciprocal(b.astype(np.float32))) for a, b in ((scales, d), (mins, dmins)))

    steps = np.array([*itertools.product((0, -1, 1), repeat=2)] if search else [(0, 0)], np.float32).T[..., None, None]
    pairs = [np.clip(near + step, 0, 63) for near, step in zip((near_scales, near_mins), steps, strict=True)]
    lines = [part.reshape(len(part), -1) for part in _lines(d, dmins, *pairs)]  # of each pair (9, n * 8)
    found = backend.best_lines(subs, lines[0], -lines[1], importance)
    chosen = [np.take_along_axis(part.reshape(len(part), -1), found.which.T, 0) for part in pairs]
    sub_scales, sub_mins = (part.reshape(-1, 8).astype(np.uint8) for part in chosen)
    return dict(codes=found.codes.reshape(x.shape), scales=d, dmins=dmins, sub_scales=sub_scales, sub_mins=sub_mins)


def dequantize(
    codes: np.ndarray, scales: np.ndarray, dmins: np.ndarray, sub_scales: np.ndarray, sub_mins: np.ndarray
) -> np.ndarray:
    """Blocks (n, 256) of float32: (d * sub_scale) * code - (dmin * sub_min), each step rounded."""
    scale, low = _lines(scales, dmins, sub_scales, sub_mins)
    return (scale[..., None] * codes.reshape(*scale.shape, 32) - low[..., None]).reshape(codes.shape)


def _lines(d: np.ndarray, dmins: np.ndarray, sub_scales: np.ndarray, sub_mins: np.ndarray) -> tuple:
    """The scale of each sub-block and its negated minimum: (n, 8) float32 each."""
    return tuple(a.astype(np.float32) * b.astype(np.float32) for a, b in ((d, sub_scales), (dmins, sub_mins)))


def pack_six_bits(sub_scales: np.ndarray, sub_mins: np.ndarray) -> np.ndarray:
    """Two times eight 6-bit numbers (n, 8) as 12 bytes (n, 12)."""
    s, m = sub_scales, sub_mins
    low = [a[:, :4] | a[:, 4:] >> 4 << 6 for a in (s, m)]
    return np.concatenate([*low, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], -1)


def unpack_six_bits(bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes (n, 12) as sub_scales and sub_mins (n, 8)."""
    s, m, both = bytes_[:, :4], bytes_[:, 4:8], bytes_[:, 8:]
    sub_scales = np.concatenate([s & 63, both & 15 | s >> 6 << 4], -1)
    return sub_scales, np.concatenate([m & 63, both >> 4 | m >> 6 << 4], -1)


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, I/2): of 64 neighbours the first 32 low, the others high."""
    halves = codes.reshape(len(codes), -1, 2, 32)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, I/2) -> codes (R, I), uint8 in 0 … 15."""
    runs = packed.reshape(len(packed), -1, 32)
    return np.stack([runs & 15, runs >> 4], 2).reshape(len(packed), -1)[:, :count]
