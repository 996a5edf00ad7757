"""Matrix products that read weights as they are stored, in any `Layout`: never dequantized as a whole, never copied.

    out[t, o] = sum over i of x[t, i] * w[o, i]      x float32 and exact; w the float32 that formats.py dequantizes

One token or many, a product is the same number to the bit: at any number of threads, on any machine, for a prompt at
once and in pieces. For that the order of each sum is fixed.
A row is taken in chunks of 512 numbers, a chunk in lines, a line in vectors of 16, whose lanes are those of
fast/layout.py; fma(a, b, c) is a * b + c in float32, rounded once:

    part[l]  = w * x, then fma(w, x, part[l])     vector after vector of a line; w without the scale of its block
    lane[l]  = fma(part[l], scale[l], lane[l])    line after line of a chunk, from 0
    total[l] = total[l] + lane[l]                 chunk after chunk, from 0
    out      = lane l + lane l+8 of the total, of these l + l+4, then l + l+2, then l + l+1

Where there are no scales, or where there are minima, w is the number itself, and lane[l] = fma(w, x, lane[l]) vector
after vector. So a product takes part in at most n = 32 + I/512 + 4 roundings, w's own among them, and the error is at
most n u / (1 - n u) times the sum of |w x|, with u = 2^-24.

**One token** reads each weight once: the speed of memory is the limit. Four rows go together through their lines, one
load of x for all four, and the next four rows are asked for ahead of time, in the order in which they lie.

**Several tokens** share the work of reading a weight. For 16 rows and a chunk, weights become a tile of floats that
stays in the first cache (32 KiB); then 4 rows by 4 tokens at a time, 16 sums in registers take 8 loads for 16 fma:

             x: 4 tokens            for each vector of a line, 4 + 4 loads, 16 fma
    tile   ┌─────────────┐
    4 rows │ 16 vectors  │          for each line, 16 fma with its scales
           └─────────────┘          for each chunk, 16 totals in the second cache, folded in the end
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.layout import LINE, Layout
from refimpl_kernels.fast.vector import FLOATS, I64, LANES, Emitter

CHUNK = 512  # numbers of a row that are added up before their sum joins the others
TILE = 16  # rows that are unpacked at a time for several tokens
TASK = 32  # rows that a thread takes at a time for one token
TOKENS = 128  # tokens that take turns over a tile, so that their sums stay in the second cache (128 KiB)
SIDE = 4  # rows, and tokens, whose sums are in registers together


class Rows:
    """Some rows of a matrix, by their numbers: `lines` lines each, of codes, scales and zero points."""

    def __init__(self, emit: Emitter, layout: Layout, kinds, arrays, lines: ir.Value, numbers: Sequence[ir.Value]):
        self.emit, self.layout, self.starts = emit, layout, []
        zero = ir.Constant(I64, 0)
        for kind, array, size in zip(kinds, arrays, layout.sizes, strict=True):
            start, length = emit.address(kind, array, zero), emit.times(lines, size)
            self.starts.append([emit.forward(start, emit.builder.mul(number, length)) for number in numbers])

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


class Sum:
    """Products summed up in 16 lanes, line by line: the lanes of a chunk at the top of this file, or of all chunks."""

    def __init__(self, emit: Emitter, scaled: bool = False):
        self.emit, self.scaled, self.lanes = emit, scaled, emit.variable(emit.floats(0.0))
        self.part: ir.Value | None = None

    def begin(self) -> None:
        self.part = None if self.scaled else self.lanes.get()

    def add(self, weights: ir.Value, x: ir.Value) -> None:
        self.part = self.emit.fma(weights, x, self.part) if self.part else self.emit.builder.fmul(weights, x)

    def end(self, scale: ir.Value | None) -> None:
        self.lanes.set(self.emit.fma(self.part, scale, self.lanes.get()) if self.scaled else self.part)


def numbers(emit: Emitter, first: ir.Value, last: ir.Value, count: int) -> list[ir.Value]:
    """`count` numbers from `first` on; for those beyond `last`, `last`."""
    ahead = [emit.builder.add(first, ir.Constant(I64, n)) for n in range(count)]
    return [emit.builder.select(emit.builder.icmp_signed("<", n, last), n, last) for n in ahead]


@intrinsic
def _one_token(typingctx, layout, weights, scales, zeros, row, last, lines, x, sums):
    """The sums of 4 rows from `row` on by x, arranged: sums (16) has each of them four times."""
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, *arrays, row, last, lines, x, sums = arguments
        zero, kinds = ir.Constant(I64, 0), signature.args
        rows = Rows(emit, form, kinds[1:4], arrays, lines, numbers(emit, row, last, SIDE))
        ahead = Rows(emit, form, kinds[1:4], arrays, lines, [builder.add(row, ir.Constant(I64, SIDE))])
        x, sums = emit.address(kinds[7], x, zero), emit.address(kinds[8], sums, zero)
        totals = [emit.variable(emit.floats(0.0)) for _ in range(SIDE)]
        with emit.pieces(lines, CHUNK // form.line) as (first, count):
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

    return types.void(layout, weights, scales, zeros, *[types.intp] * 3, x, sums), generate


def _places(emit: Emitter, layout: Layout, kind, tile: ir.Value, row: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Where the floats of a row of the tile are, and its scales, one vector a line: these lie behind all floats."""
    scales = emit.times(row, CHUNK // layout.line * LANES)
    behind = emit.builder.add(scales, ir.Constant(I64, TILE * CHUNK))
    return emit.address(kind, tile, emit.times(row, CHUNK)), emit.address(kind, tile, behind)


@intrinsic
def _unpack(typingctx, layout, weights, scales, zeros, row, last, lines, first, count, tile, r):
    """`count` lines of a row, from line `first` on, as floats in row r of the tile, and their scales."""
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, *arrays, row, last, lines, first, count, tile, r = arguments
        rows = Rows(emit, form, signature.args[1:4], arrays, lines, numbers(emit, row, last, 1))
        floats, factors = _places(emit, form, signature.args[9], tile, r)
        with emit.loop(count) as n:
            here = emit.forward(floats, emit.times(n, 4 * form.line))
            values, scale = rows.values(0, builder.add(first, n))
            for j, value in enumerate(values):
                emit.store(value, here, 4 * LANES * j)
            if scale is not None:
                emit.store(scale, factors, emit.times(n, 4 * LANES))
        return context.get_dummy_value()

    return types.void(layout, weights, scales, zeros, *[types.intp] * 5, tile, types.intp), generate


@intrinsic
def _multiply(typingctx, layout, tile, row, x, token, last, width, count, sums, at):
    """Adds to vector 4 r + t of sums, from element `at` on: `count` lines of 4 rows of the tile by 4 rows of x.

    x (…, width); rows beyond `last` are not read.
    """
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, tile, row, x, token, last, width, count, sums, at = arguments
        floats, factors = _places(emit, form, signature.args[1], tile, row)
        x = emit.address(signature.args[3], x, ir.Constant(I64, 0))
        sums = emit.address(signature.args[8], sums, at)
        width = emit.times(width, 4)
        tokens = [emit.forward(x, builder.mul(n, width)) for n in numbers(emit, token, last, SIDE)]
        # While 16 rows take their turns over these 4 tokens, each 4 rows ask for one of the next 4.
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

    return types.void(layout, tile, types.intp, x, *[types.intp] * 4, sums, types.intp), generate


@njit(inline="never")
def aligned(size):
    """Uninitialized floats that begin where a cache line does: else every load of a vector touches two lines."""
    room = np.empty(size + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + size]


@njit(inline="never")
def one_token(layout, weights, scales, zeros, start, stop, last, lines, x, out):
    """out (stop - start): rows `start` to `stop` by one token. For Numba."""
    sums = np.empty(16, np.float32)
    for row in range(start, stop, SIDE):
        _one_token(layout, weights, scales, zeros, row, last, lines, x, sums)
        for r in range(min(SIDE, stop - row)):
            out[row - start + r] = sums[SIDE * r]


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
def many_tokens(layout, weights, scales, zeros, start, stop, last, lines, vectors, x, out):
    """out (T, stop - start): up to 16 rows from `start` on by T tokens. For Numba.

    x (chunks, tokens, width): see `chunked`. `vectors`: how many vectors a line has.
    """
    chunks, _, width = x.shape
    rows, per_chunk = stop - start, CHUNK // (LANES * vectors)
    tile = aligned(TILE * (CHUNK + LANES * per_chunk))
    sums = aligned(min(len(out) + SIDE - 1, TOKENS) * TILE * LANES)  # (tokens / 4, TILE, 4, LANES)
    square = aligned(SIDE * SIDE)
    for begin in range(0, len(out), TOKENS):
        tokens = min(TOKENS, len(out) - begin)
        sums[:] = 0
        for chunk in range(chunks):
            line = chunk * per_chunk
            count = min(per_chunk, lines - line)
            for r in range(rows):
                _unpack(layout, weights, scales, zeros, start + r, last, lines, line, count, tile, r)
            token = chunk * len(out) + begin
            for t in range(0, tokens, SIDE):
                for r in range(0, rows, SIDE):
                    at = (t * TILE + r * SIDE) * LANES
                    _multiply(layout, tile, r, x, token + t, token + tokens - 1, width, count, sums, at)
        for t in range(0, tokens, SIDE):
            for r in range(0, rows, SIDE):
                _fold(sums, (t * TILE + r * SIDE) * LANES, square)
                for n in range(min(SIDE, tokens - t)):
                    for m in range(min(SIDE, rows - r)):
                        out[begin + t + n, r + m] = square[SIDE * m + n]


def product(layout, weights, scales, zeros, x, out, lines, vectors):
    """out (T, O) = x by the transposed matrix; rows of `lines` lines with `vectors` vectors each. For Numba.

    `weights`, `scales`, `zeros`: the bytes of each row, uint8 (O, …), or (1, 0) for what the layout does not have.
    """
    tokens, features = out.shape
    if tokens == 1:
        for task in prange((features + TASK - 1) // TASK):
            start, stop = task * TASK, min((task + 1) * TASK, features)
            one_token(layout, weights, scales, zeros, start, stop, features - 1, lines, x, out[0, start:stop])
    else:
        for task in prange((features + TILE - 1) // TILE):
            start, stop = task * TILE, min((task + 1) * TILE, features)
            place = out[:, start:stop]
            many_tokens(layout, weights, scales, zeros, start, stop, features - 1, lines, vectors, x, place)


def chunked(x: np.ndarray, layout: Layout, lines: int) -> np.ndarray:
    """x (T, I), filled up with zeros to whole lines and arranged for a layout, as (chunks, T, width), aligned.

    One token is one chunk of all lines; of several, each chunk of 512 lies together, and what the last has beyond its
    lines is not read.
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
