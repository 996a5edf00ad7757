"""Sums of products of float32 activations with weights as they are stored: never dequantized as a whole, never copied.

    out[t, o] = sum over i of x[t, i] * w[o, i]      x float32, exact; w the float32 that formats/table.py dequantizes

The order of each sum is fixed, so that a product has the same bits at any number of threads, on any machine, and for a
prompt at once or in pieces. A row is taken in chunks of 512 numbers, a chunk in lines, a line in vectors of 16 lanes,
which layout.py explains; fma(a, b, c) is a * b + c in float32, rounded once:

    part[l]  = w * x, then fma(w, x, part[l])     vector after vector of a line; w without the scale of its block
    lane[l]  = fma(part[l], scale[l], lane[l])    line after line of a chunk, from 0
    total[l] = total[l] + lane[l]                 chunk after chunk, from 0
    out      = lane l + lane l+8 of the total, of these l + l+4, then l + l+2, then l + l+1

Where there are no scales, or where there are minima, w is the number itself, and lane[l] = fma(w, x, lane[l]) vector
after vector. So a product takes part in at most n = 32 + I/512 + 4 roundings, including w's own. The error is at most
n u / (1 - n u) times the sum of |w x|, with u = 2^-24.

**One token** reads each weight once, so memory is the limit. Four rows go together through their lines: one load of x
serves all four. The next four rows are prefetched in the order in which they lie.

**Several tokens** share the work of reading a weight. The weights of 16 rows and a chunk become a tile of floats, which
stays in the first cache (32 KiB). Then 4 rows by 4 tokens are summed in 16 registers, with 8 loads for 16 fma:

             x: 4 tokens            for each vector of a line, 4 + 4 loads, 16 fma
    tile   ┌─────────────┐
    4 rows │ 16 vectors  │          for each line, 16 fma with its scales
           └─────────────┘          for each chunk, 16 totals in the second cache, folded in the end
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from refimpl_kernels.fast.layout import LINE, Layout
from refimpl_kernels.fast.rows import Rows, aligned, numbers
from refimpl_kernels.fast.vector import FLOATS, I64, LANES, Emitter

CHUNK = 512  # numbers of a row that are added up before their sum joins the others
TILE = 16  # rows that are unpacked at a time for several tokens
TOKENS = 128  # tokens that take turns over a tile, so that their sums stay in the second cache (128 KiB)
SIDE = 4  # rows, and tokens, whose sums are in registers together


class Sum:
    """Products summed in 16 lanes, line by line: `part` and `lane` at the top of this file."""

    def __init__(self, emit: Emitter, scaled: bool = False):
        self.emit, self.scaled, self.lanes = emit, scaled, emit.variable(emit.floats(0.0))
        self.part: ir.Value | None = None

    def begin(self) -> None:
        self.part = None if self.scaled else self.lanes.get()

    def add(self, weights: ir.Value, x: ir.Value) -> None:
        self.part = self.emit.fma(weights, x, self.part) if self.part else self.emit.builder.fmul(weights, x)

    def end(self, scale: ir.Value | None) -> None:
        self.lanes.set(self.emit.fma(self.part, scale, self.lanes.get()) if self.scaled else self.part)


@intrinsic
def _one_token(typingctx, matrix, row, x, sums):
    """sums (16): the sums of 4 rows from `row` on by x (arranged), each of them four times."""

    def generate(context, builder, signature, arguments):
        packed, row, x, sums = arguments
        kind, _, kind_of_x, kind_of_sums = signature.args
        form, zero = kind.types[0].layout, ir.Constant(I64, 0)
        emit = Emitter(context, builder, form.portable)
        rows = Rows(emit, kind, packed, row, SIDE)
        ahead = Rows(emit, kind, packed, builder.add(row, ir.Constant(I64, SIDE)), 1)
        x, sums = emit.address(kind_of_x, x, zero), emit.address(kind_of_sums, sums, zero)
        totals = [emit.variable(emit.floats(0.0)) for _ in range(SIDE)]
        with emit.pieces(rows.lines, CHUNK // form.line) as (first, count):
            sums_of_chunk = [Sum(emit, form.scaled) for _ in totals]
            with emit.loop(count) as n:
                line = builder.add(first, n)
                ahead.prefetch(line, SIDE)
                here = emit.forward(x, emit.times(line, 4 * form.line))
                vectors = [emit.load(FLOATS, here, 4 * at) for at in range(0, form.line, LANES)]
                for r, lane in enumerate(sums_of_chunk):
                    values, scale = rows.values(r, line)
                    lane.begin()
                    for value, vector in zip(values, vectors, strict=True):
                        lane.add(value, vector)
                    lane.end(scale)
            for total, lane in zip(totals, sums_of_chunk, strict=True):
                total.set(builder.fadd(total.get(), lane.lanes.get()))
        emit.store(emit.totals([total.get() for total in totals]), sums)
        return context.get_dummy_value()

    return types.void(matrix, types.intp, x, sums), generate


@njit(inline="never")
def one_token(matrix, x, start, out):
    """out (R): rows from `start` on by one token. For Numba."""
    sums = np.empty(16, np.float32)
    for row in range(0, len(out), SIDE):
        _one_token(matrix, start + row, x, sums)
        for r in range(min(SIDE, len(out) - row)):
            out[row + r] = sums[SIDE * r]


def _places(emit: Emitter, layout: Layout, kind, tile: ir.Value, row: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The addresses of a tile's row: of its floats, and of its scales (a vector for each line), behind all floats."""
    scales = emit.times(row, CHUNK // layout.line * LANES)
    behind = emit.builder.add(scales, ir.Constant(I64, TILE * CHUNK))
    return emit.address(kind, tile, emit.times(row, CHUNK)), emit.address(kind, tile, behind)


@intrinsic
def _unpack(typingctx, matrix, row, first, count, tile, r):
    """`count` lines of a row, from line `first` on, as floats in row r of the tile, and their scales."""

    def generate(context, builder, signature, arguments):
        packed, row, first, count, tile, r = arguments
        form = signature.args[0].types[0].layout
        emit = Emitter(context, builder, form.portable)
        rows = Rows(emit, signature.args[0], packed, row, 1)
        floats, factors = _places(emit, form, signature.args[4], tile, r)
        with emit.loop(count) as n:
            here = emit.forward(floats, emit.times(n, 4 * form.line))
            values, scale = rows.values(0, builder.add(first, n))
            for j, value in enumerate(values):
                emit.store(value, here, 4 * LANES * j)
            if scale is not None:
                emit.store(scale, factors, emit.times(n, 4 * LANES))
        return context.get_dummy_value()

    return types.void(matrix, *[types.intp] * 3, tile, types.intp), generate


@intrinsic
def _multiply(typingctx, layout, tile, row, x, token, count, sums):
    """Multiplies `count` lines of the tile's 4 rows from `row` on by the 4 tokens from `token` on of x (T, width).

    The products are added to sums (T / 4, TILE / 4, 4 rows, 4 tokens, LANES). Beyond the last token, that is repeated.
    """
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, tile, row, x, token, count, sums = arguments
        floats, factors = _places(emit, form, signature.args[1], tile, row)
        tokens, width = emit.shape(signature.args[3], x)
        x, width = emit.address(signature.args[3], x, ir.Constant(I64, 0)), emit.times(width, 4)
        at = builder.add(emit.times(token, TILE * LANES), emit.times(row, SIDE * LANES))
        sums = emit.address(signature.args[6], sums, at)
        last = builder.sub(tokens, ir.Constant(I64, 1))
        tokens = [emit.forward(x, builder.mul(n, width)) for n in numbers(emit, token, last, SIDE)]
        # While 16 rows take their turns over these 4 tokens, each 4 rows prefetch one of the next 4 tokens.
        turn = builder.urem(builder.udiv(row, ir.Constant(I64, SIDE)), ir.Constant(I64, SIDE))
        ahead = emit.forward(tokens[0], builder.mul(builder.add(turn, ir.Constant(I64, SIDE)), width))
        lanes = [[Sum(emit, form.scaled) for _ in range(SIDE)] for _ in range(SIDE)]
        with emit.loop(count) as n:
            for lane in chain(*lanes):
                lane.begin()
            for v in range(0, form.line, LANES):
                here = builder.add(emit.times(n, 4 * form.line), ir.Constant(I64, 4 * v))
                inputs = [emit.load(FLOATS, start, here) for start in tokens]
                emit.prefetch(ahead, here)
                for r, row_lanes in enumerate(lanes):
                    weights = emit.load(FLOATS, emit.forward(floats, 4 * CHUNK * r), here)
                    for lane, vector in zip(row_lanes, inputs, strict=True):
                        lane.add(weights, vector)
            for r, row_lanes in enumerate(lanes):
                place = emit.forward(factors, 4 * LANES * (CHUNK // form.line) * r)
                scale = emit.load(FLOATS, place, emit.times(n, 4 * LANES)) if form.scaled else None
                for lane in row_lanes:
                    lane.end(scale)
        for n, lane in enumerate(chain(*lanes)):
            total = emit.load(FLOATS, sums, 4 * LANES * n)
            emit.store(builder.fadd(total, lane.lanes.get()), sums, 4 * LANES * n)
        return context.get_dummy_value()

    return types.void(layout, tile, types.intp, x, *[types.intp] * 2, sums), generate


@intrinsic
def _fold(typingctx, sums, at, out):
    """out (16): the sums of the lanes of 16 vectors, from sums[at] on."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, portable=True)
        sums, at, out = arguments
        sums = emit.address(signature.args[0], sums, at)
        vectors = [emit.load(FLOATS, sums, 4 * LANES * n) for n in range(LANES)]
        emit.store(emit.totals(vectors), emit.address(signature.args[2], out, ir.Constant(I64, 0)))
        return context.get_dummy_value()

    return types.void(sums, types.intp, out), generate


@njit(inline="never")
def many_tokens(matrix, x, start, out):
    """out (T, R): rows from `start` on by T tokens, x (chunks, T, width): see `chunked`. For Numba."""
    lines, per_chunk = matrix.codes.shape[1] // LINE, CHUNK // matrix.layout.line
    tile = aligned(TILE * (CHUNK + LANES * per_chunk))
    sums = aligned(min(len(out) + SIDE - 1, TOKENS) * TILE * LANES)
    square = aligned(SIDE * SIDE)
    for first in range(0, out.shape[1], TILE):
        for begin in range(0, len(out), TOKENS):
            place = out[begin : begin + TOKENS, first : first + TILE]
            tokens, rows = place.shape
            sums[:] = 0
            for chunk in range(len(x)):
                line = chunk * per_chunk
                count = min(per_chunk, lines - line)
                for r in range(rows):
                    _unpack(matrix, start + first + r, line, count, tile, r)
                inputs = x[chunk, begin : begin + tokens]
                for t in range(0, tokens, SIDE):
                    for r in range(0, rows, SIDE):
                        _multiply(matrix.layout, tile, r, inputs, t, count, sums)
            for t in range(0, tokens, SIDE):
                for r in range(0, rows, SIDE):
                    _fold(sums, (t * TILE + r * SIDE) * LANES, square)
                    for n in range(min(SIDE, tokens - t)):
                        for m in range(min(SIDE, rows - r)):
                            place[t + n, r + m] = square[SIDE * m + n]


def chunked(x: np.ndarray, layout: Layout, lines: int) -> np.ndarray:
    """x (T, I), filled up with zeros to whole lines and arranged for a layout, as (chunks, T, width), aligned.

    One token is one chunk of all lines. Of several tokens, each chunk of 512 numbers lies together. The last chunk may
    have fewer lines; the numbers after them are not read.
    """
    tokens, columns = x.shape
    length = lines * layout.line
    if columns < length:
        x = np.pad(x, ((0, 0), (0, length - columns)))
    x = layout.arranged(x)
    width = length if tokens == 1 or length < CHUNK else CHUNK
    chunks, per_chunk = -(-length // width), width // layout.line
    room = np.empty(chunks * tokens * width + LANES, np.float32)
    start = -(room.__array_interface__["data"][0] // 4) % LANES
    out = room[start : start + chunks * tokens * width].reshape(chunks, tokens, width)
    for chunk in range(chunks):
        part = x[:, chunk * per_chunk : (chunk + 1) * per_chunk]
        place = out[chunk].reshape(tokens, per_chunk, *part.shape[2:])
        place[:, : part.shape[1]] = part
    return out
