"""NF4, bitsandbytes' 4-bit normal float: a code is one of 16 values between -1 and 1, the quantiles of a normal curve.

    flattened matrix   w0 w1 … w63 | w64 …            blocks of `block_size` run on from row to row
    bytes              w0 w1 | w2 w3 | …              two codes a byte, the FIRST in the HIGH four bits
    scales             max|w0…w63| | max|w64…| …      float32 ("absmax"), one a block

    w' = VALUES[code] * scale                         4 + 32/block_size bits a weight

A weight gets the code of the value nearest to w / scale; midway between two values, of the smaller one. A full block is
multiplied by the reciprocal of its scale, an incomplete last block is divided by it, and an incomplete block of
zeros gets scale 1e-38. A full block of zeros has scale 0 and codes 7, the code of 0. If the number of weights is odd,
the last byte's low four bits hold the code of 0. The scales may themselves be 8-bit numbers: see dynamic8.py.

A bug to know: bitsandbytes 0.50.2 on a CPU with AVX-512 restarts the blocks on each row when the row length is a
multiple of 32, but not of the block size, and so reads its own matrices of 96 columns wrongly. This file runs on from
row to row, as bitsandbytes' quantizer and GPU code do.

**Source**: bitsandbytes backends/default/ops.py: quantize_4bit, dequantize_4bit. Dettmers 2023, "QLoRA", appendix E.

>>> parts = quantize(np.array([[1.0, -0.5, 0.0, 4.0]], np.float32))
>>> parts["codes"], parts["scales"]
(array([[10,  6,  7, 15]], dtype=uint8), array([[4.]], dtype=float32))
>>> dequantize(**parts).round(3)
array([[ 0.984, -0.364,  0.   ,  4.   ]], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np

from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.formats.search import Rounder, clip, trials

VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

BINS = 4096  # [-1, 1] is cut into so many to find the nearest value
TINY = np.float32(1e-38)


def rounder_of(name: str, values: np.ndarray) -> Rounder:
    """The Rounder for a table of 16 values whose largest magnitude is 1."""
    key = values.tobytes()

    def grid(scale, low):
        return np.float32(1) / np.maximum(scale, TINY), np.float32(0), scale

    def level(x, by, zero):
        return _nearest(key, worth=True)(clip(x * by, -1, 1))

    def code(x, by, zero):
        return _nearest(key)(clip(x * by, -1, 1))

    return Rounder(name, grid, level, values=values, code=code)


ROUNDER = rounder_of("nf4", VALUES)


def quantize(
    x: np.ndarray,
    last: int | None = None,
    search: int = 0,
    importance: np.ndarray | None = None,
    backend: ModuleType = numpy_search,
) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) uint8 in 0 … 15 and `scales` (n, 1) float32.

    `last`: how many weights the last block has, the rest being padding. `search`, `importance`: see search.py.
    """
    return quantize_to(ROUNDER, x, last, search, importance, backend)


def dequantize(codes: np.ndarray, scales: np.ndarray, code: np.ndarray = VALUES) -> np.ndarray:
    """Blocks (n, b) of float32: value * scale. `code`: the 16 values, where a checkpoint brings its own."""
    return code[codes] * scales


def quantize_to(
    rounder: Rounder, x: np.ndarray, last: int | None, search: int, importance: np.ndarray | None, backend: ModuleType
) -> dict[str, np.ndarray]:
    """Blocks (n, b) as codes of the rounder's 16 values: for NF4 and FP4."""
    scales = np.abs(backend.largest(x))
    incomplete = last is not None and last < x.shape[1]
    if incomplete:
        scales[-1] = np.maximum(scales[-1], TINY)
    found = backend.best_scales(x, trials(scales, search), rounder, importance)
    if incomplete:
        found.codes[-1] = rounder.codes(x[-1] / found.scales[-1], np.float32(1), np.float32(0))
    return dict(codes=found.codes, scales=found.scales)


@cache
def _nearest(values: bytes, worth: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """A function from numbers in [-1, 1] to the codes of the nearest values; with `worth`, to the values themselves.

    Midway, the smaller value is taken. It does what `searchsorted` among the midpoints does, several times as fast:
    [-1, 1] is cut into bins so narrow that each has at most one midpoint, even if rounding moves a number to the next
    bin. So one comparison is left in a bin.
    """
    numbers = np.frombuffer(values, np.float32)
    order = np.argsort(numbers, kind="stable")
    middles = (numbers[order[:-1]] + numbers[order[1:]]) / np.float32(2)
    starts = np.arange(BINS + 1) / (BINS / 2) - 1
    below = np.searchsorted(middles, starts - 1e-6)
    if (np.searchsorted(middles, starts + 2 / BINS + 1e-6) - below > 1).any():
        raise ValueError("two of the values are too near to each other")
    edges = np.append(middles, np.float32(np.inf))[below]
    codes = order[np.minimum([below, below + 1], len(order) - 1)].astype(np.uint8)
    lower, upper = numbers[codes] if worth else codes

    def nearest(relative: np.ndarray) -> np.ndarray:
        if not relative.flags.c_contiguous:  # in the order in which they lie in memory
            return nearest(relative.T).T
        bins = ((relative + np.float32(1)) * np.float32(BINS / 2)).astype(np.intp)
        return np.where(relative > edges.take(bins), upper.take(bins), lower.take(bins))

    return nearest


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, ceil(I/2)), the first of two in the high four bits; after an odd last one 7."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=7)
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Bytes (R, …) -> codes (R, count), uint8 in 0 … 15."""
    return np.stack([packed >> 4, packed & 15], -1).reshape(len(packed), -1)[:, :count]
