"""Numbers kept as Q8_0's blocks along their last axis: a cache of keys and values in 8.5 bits a number.

A float32 that is written becomes a code of 8 bits, with a float16 scale for each 32 neighbours (q8_0.py). Reading gives
code * scale, which float32 holds exactly. So attention over these rows equals attention over those float32 numbers, to
the bit. llama.cpp keeps the same (`--cache-type-k q8_0 --cache-type-v q8_0`).

>>> rows = Q8Rows.empty((3, 64))
>>> rows[:2] = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
>>> rows[:2], rows.nbytes, rows[:2].transpose(1, 0).astype(np.float32)[0].round(2)
(Q8Rows (2, 64), 204, array([-1.  ,  0.01], dtype=float32))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl_kernels.formats import q8_0

BLOCK = q8_0.BLOCK["packed"].shape[0]
STEP = 8192  # blocks rounded at a time: intermediate arrays then stay in the processor's cache, twice as fast


@dataclass(frozen=True, eq=False, repr=False)
class Q8Rows:
    """`codes` int8, of any shape, and float16 `scales`: one for each 32 codes along the axis that is shorter there.

    It is written, sliced and transposed like an array. A slice must keep the axis of the blocks whole.
    """

    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Q8Rows:
        """Room for numbers of a shape. Raises ValueError if its last axis is not made of whole blocks."""
        if shape[-1] % BLOCK:
            raise ValueError(f"{shape[-1]} numbers in a row are not a multiple of {BLOCK}, the block of 8 bit rows")
        return cls(np.empty(shape, np.int8), np.empty((*shape[:-1], shape[-1] // BLOCK), np.float16))

    def __repr__(self) -> str:
        return f"Q8Rows {self.shape}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> np.dtype:
        """int8, as the numbers are kept; they are read as float32."""
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, where: Any) -> Q8Rows:
        return Q8Rows(self.codes[where], self.scales[where])

    def __setitem__(self, where: Any, values: np.ndarray) -> None:
        """Rounds rows of float32. With NaN, infinity or a number beyond 8e6, a block's scale is NaN or infinite."""
        blocks = values.reshape(-1, BLOCK)
        codes, scales = np.empty(blocks.shape, np.int8), np.empty((len(blocks), 1), np.float16)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(blocks), STEP):
                some = slice(start, start + STEP)
                parts = q8_0.quantize(blocks[some])
                codes[some], scales[some] = parts["codes"], parts["scales"]
        self.codes[where] = codes.reshape(values.shape)
        self.scales[where] = scales.reshape(*values.shape[:-1], -1)

    def transpose(self, *axes: int) -> Q8Rows:
        return Q8Rows(self.codes.transpose(*axes), self.scales.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> Q8Rows:
        return Q8Rows(self.codes.swapaxes(a, b), self.scales.swapaxes(a, b))

    def astype(self, dtype: Any, copy: bool = True) -> np.ndarray:
        """The numbers, always as a copy. If a scale is not finite, its whole block is NaN or infinite."""
        scales = self.scales
        for axis, (codes, blocks) in enumerate(zip(self.codes.shape, scales.shape, strict=True)):
            if codes != blocks:
                scales = np.repeat(scales, BLOCK, axis)
        with np.errstate(invalid="ignore"):
            return (self.codes * scales.astype(np.float32)).astype(dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.astype(np.float32 if dtype is None else dtype)
