"""Baichuan v1's QLinear with 4 bits: one scale a row, eight codes in an int32.

    weight  (O, I/8) int32   element 8i + j of a row in bits 4j … 4j+3 of number i, two's complement
    scale   (O,) float32     max|row| / 7, computed in the weight's dtype
    w' = code * scale                                 4 + 32/I bits a weight

In memory, low byte first, this is INT4's packing (see int4.py): `packed.view("<i4")` is the checkpoint's tensor.
Scale and codes are rounded as in qlinear8.py.

**Source**: Baichuan-13B-Base quantizer / modeling_baichuan.py: class QLinear (int4 branch).

>>> parts = quantize(np.array([[7.0, -5.0, 1.0, 0.0, 0.0, 0.0, 0.0, -7.0]], np.float32))
>>> [hex(number) for number in pack(parts["codes"]).view("<u4")[0]]
['0x900001b7']
"""

from __future__ import annotations

import numpy as np

from refimpl_kernels.formats import int4, qlinear8


def quantize(x: np.ndarray, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Rows (n, b) of float32, which are values of `dtype`, as `codes` (n, b) int8 and `scales` (n, 1) float32."""
    return qlinear8.quantize_to(x, 7, dtype)


dequantize = qlinear8.dequantize
pack, unpack = int4.pack, int4.unpack
