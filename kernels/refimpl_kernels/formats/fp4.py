"""FP4, bitsandbytes' 4-bit float: one sign bit, two exponent bits, one mantissa bit; laid out as NF4 is (see nf4.py).

    code  s e e m         value = (-1)^s * (1, 8, 4, 2 twelfths of …)
    0000 0      0001 1/192    0010 8/12    0011 12/12    0100 4/12    0101 6/12    0110 2/12    0111 3/12
    1000 … 1111 the same, negative

    w' = VALUES[code] * scale                         4 + 32/block_size bits a weight

The largest value is 1, so that a block's scale is its largest magnitude. There are two zeros, codes 0 and 8. An exact
zero and a negative weight that rounds to zero get code 0; a positive weight that rounds to zero gets code 8. So compare
the values of two FP4 matrices, not their codes. Padding is code 0.

**Source**: bitsandbytes backends/default/ops.py: quantize_4bit; functional.py: get_4bit_type.

>>> quantize(np.array([[1.0, -0.5, 0.0, 4.0]], np.float32))["codes"]
array([[ 7, 14,  0,  3]], dtype=uint8)
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl_kernels.formats import nf4
from refimpl_kernels.formats import search as numpy_search

_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
VALUES = np.concatenate([_POSITIVE, -_POSITIVE]) + np.float32(0)  # the second zero is positive too
ROUNDER = nf4.rounder_of("fp4", VALUES)


def quantize(
    x: np.ndarray,
    last: int | None = None,
    search: int = 0,
    importance: np.ndarray | None = None,
    backend: ModuleType = numpy_search,
) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) uint8 in 0 … 15 and `scales` (n, 1) float32; options as in nf4.py."""
    return nf4.quantize_to(ROUNDER, x, last, search, importance, backend)


def dequantize(codes: np.ndarray, scales: np.ndarray, code: np.ndarray = VALUES) -> np.ndarray:
    """Blocks (n, b) of float32: value * scale. `code`: the 16 values, where a checkpoint brings its own."""
    return code[codes] * scales


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (R, I) -> bytes (R, ceil(I/2)), the first of two in the high four bits; after an odd last one 0."""
    return nf4.pack(np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))))


unpack = nf4.unpack
