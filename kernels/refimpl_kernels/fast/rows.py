"""A matrix as kernels take it, and some of its rows while they are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types

from refimpl_kernels.fast.layout import LINE, Layout, LayoutType
from refimpl_kernels.fast.vector import I64, Emitter


class Packed(NamedTuple):
    """The bytes of a matrix (O, I): each array is uint8 (O, …), or (1, 0) for scales and zeros that the layout lacks.

    A row of `codes` is made of whole lines. `zeros` are zero points or minima.
    """

    layout: Layout
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def packed_type(layout: Layout) -> types.NamedTuple:
    """Numba's type of a matrix in a layout."""
    part = types.Array(types.uint8, 2, "C", readonly=True, aligned=False)
    return types.NamedTuple([LayoutType(layout), part, part, part], Packed)


class Rows:
    """`count` rows of a matrix from number `first` on; beyond the last, it is repeated. Each has `lines` lines."""

    def __init__(self, emit: Emitter, kind: types.NamedTuple, matrix: ir.Value, first: ir.Value, count: int):
        self.emit, self.layout, self.starts = emit, kind.types[0].layout, []
        parts = [emit.builder.extract_value(matrix, n) for n in range(len(kind))]
        height, width = emit.shape(kind.types[1], parts[1])
        self.lines = emit.builder.udiv(width, ir.Constant(I64, LINE))
        last = emit.builder.sub(height, ir.Constant(I64, 1))
        for array_type, array, size in zip(kind.types[1:], parts[1:], self.layout.sizes, strict=True):
            start, length = emit.address(array_type, array, ir.Constant(I64, 0)), emit.times(self.lines, size)
            self.starts.append(
                [emit.forward(start, emit.builder.mul(number, length)) for number in numbers(emit, first, last, count)]
            )

    def values(self, row: int, line: ir.Value) -> tuple[list[ir.Value], ir.Value | None]:
        """The vectors of a line, and its scales: see `Layout.values`."""
        places = [self.emit.forward(starts[row], self.emit.times(line, size))
                  for starts, size in zip(self.starts, self.layout.sizes, strict=True)]  # fmt: skip
        return self.layout.values(self.emit, *places)

    def prefetch(self, line: ir.Value, count: int) -> None:
        """Asks for as many bytes as a line of `count` rows has, in the order of memory from the first row on."""
        for starts, size in zip(self.starts, self.layout.sizes, strict=True):
            if size:
                place = self.emit.forward(starts[0], self.emit.times(line, count * size))
                for offset in range(0, count * size, LINE):
                    self.emit.prefetch(place, offset)


def numbers(emit: Emitter, first: ir.Value, last: ir.Value, count: int) -> list[ir.Value]:
    """`count` numbers from `first` on; numbers beyond `last` become `last`."""
    ahead = [emit.builder.add(first, ir.Constant(I64, n)) for n in range(count)]
    return [emit.builder.select(emit.builder.icmp_signed("<", n, last), n, last) for n in ahead]


@njit(inline="never")
def aligned(size):
    """Uninitialized floats that begin with a cache line, because otherwise every load of a vector touches two lines."""
    room = np.empty(size + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + size]
