"""The Numba twin of quantizers that round to nearest: the bytes of `formats.quantize`, without a copy of the weights.

A thread takes some rows as they are stored, bfloat16 or float32, and writes codes and scales. Each step is the NumPy
twin's, in float32 and in its order, so the bytes are the same; nothing is summed, so no order could show.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numba
import numpy as np
from numba import types
from numba.core import event

from kernels.fast import Announcement
from kernels.formats import Blocks

BLOCK = 32
INFINITE = np.uint32(0x7F800000)  # of the bits of a float32 without its sign: infinity, and above it NaN
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def prepare() -> None:
    """Compiles, or reads from the disk, what threads are about to call."""
    for bits in ("uint16", "uint32"):
        _kernel(bits)


def quantize_q4_0(weight: np.ndarray, divisors: np.ndarray | None = None) -> Blocks:
    """`formats.quantize(weight / divisors[:, None], "q4_0")` for rows (R, I) of bfloat16 or float32.

    `divisors` (R,) float32. Raises ValueError for what the twin refuses.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"row length {columns} is not a multiple of block_size 32")
    bits = weight.view(np.uint16 if weight.dtype == BFLOAT16 else np.uint32)
    packed, scales = np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // BLOCK), np.float32)
    by = np.zeros(0, np.float32) if divisors is None else np.ascontiguousarray(divisors)
    if not _kernel(bits.dtype.name)(np.ascontiguousarray(bits), by, packed, scales):
        raise ValueError("a weight is NaN or infinite; no scale fits it")
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        largest = 8 * float(np.abs(scales).max())
        raise ValueError(f"a scale of q4_0 overflows for weights as large as {largest:.3g}; scale the layer down")
    return Blocks("q4_0", (rows, columns), BLOCK, 1, packed, halves)


def _q4_0(bits, divisors, packed, scales):
    """Codes and float32 scales of all rows; False if a weight is not finite."""
    narrow = bits.itemsize == 2
    x = np.empty(BLOCK, np.float32)
    raw = x.view(np.uint32)
    finite = True
    for row in range(bits.shape[0]):
        for block in range(scales.shape[1]):
            at = block * BLOCK
            for i in range(BLOCK):
                word = np.uint32(bits[row, at + i])
                raw[i] = word << np.uint32(16) if narrow else word
            if len(divisors):
                for i in range(BLOCK):
                    x[i] = x[i] / divisors[row]
            top = np.uint32(0)
            for i in range(BLOCK):
                top = max(top, raw[i] & np.uint32(0x7FFFFFFF))
            if top >= INFINITE:
                finite = False
            first = 0
            while raw[first] & np.uint32(0x7FFFFFFF) != top:
                first += 1
            scale = x[first] / np.float32(-8)
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            if abs(inverse) == np.float32(np.inf):
                inverse = np.float32(0)
            scales[row, block] = scale
            for i in range(BLOCK // 2):
                low = min(max(x[i] * inverse + np.float32(8.5), np.float32(0)), np.float32(15))
                high = min(max(x[i + 16] * inverse + np.float32(8.5), np.float32(0)), np.float32(15))
                packed[row, at // 2 + i] = np.uint8(np.int32(low)) | np.uint8(np.int32(high) << 4)
    return finite


@cache
def _kernel(bits: str):
    """`_q4_0` compiled for words of 16 bits (bfloat16) or of 32 (float32), from the disk if it was before."""
    stored = types.Array(numba.from_dtype(np.dtype(bits)), 2, "C", readonly=True, aligned=False)
    divisors = types.Array(types.float32, 1, "C", readonly=True, aligned=False)
    out = types.Array(types.uint8, 2, "C"), types.Array(types.float32, 2, "C")
    signature = types.boolean(stored, divisors, *out)
    with event.install_listener("numba:compile", Announcement(f"compiling the quantizer of q4_0 for {bits}, once")):
        return numba.njit([signature], nogil=True, cache=True, error_model="numpy")(_q4_0)
