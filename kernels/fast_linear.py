"""Matrix products that read weights as they are stored, in any `Layout`: never dequantized as a whole, never copied.

    out[t, o] = sum over i of x[t, i] * w[o, i]      x float32 and exact; w the float32 that formats.py dequantizes

One token or many, a product is the same number to the bit: at any number of threads, on any machine, for a prompt at
once and in pieces. For that the order of each sum is fixed. A row is taken in chunks of 512 numbers, in vectors of 16,
whose lanes are those of fast_layout.py; fma(a, b, c) is a * b + c in float32, rounded once:

    lane[l]  = fma(w, x, lane[l])           vector after vector of a chunk, from 0
    total    = lane l + lane l+8, of these l + l+4, then l + l+2, then l + l+1
    out      = out + total                  chunk after chunk, from 0

So a product takes part in at most n = min(I/16, 32) + 4 + I/512 roundings, and the error is at most n u / (1 - n u)
times the sum of |w x|, with u = 2^-24.

**One token** reads each weight once: the speed of memory is the limit. Four rows go together through their lines, one
load of x for all four, and the next four rows are asked for ahead of time, in the order in which they lie.

**Several tokens** share the work of reading a weight. For 16 rows and a chunk, weights become a tile of floats that
stays in the first cache (32 KiB); then 4 rows by 4 tokens at a time, 16 sums in registers take 8 loads for 16 fma:

             x: 4 tokens            for each vector of a chunk, 4 + 4 loads, 16 fma
    tile   ┌─────────────┐
    4 rows │ 16 vectors  │          for each chunk, the 16 vectors are folded into one, lane 4 r + t
           └─────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from kernels.fast_layout import LINE, Layout
from kernels.vector import FLOATS, I64, LANES, Emitter

CHUNK = 512  # numbers of a row that are added up before their sum joins the others
TILE = 16  # rows that are unpacked at a time for several tokens
TASK = 32  # rows that a thread takes at a time for one token
SIDE = 4  # rows, and tokens, whose sums are in registers together


class Rows:
    """Some rows of a matrix, by their numbers: `lines` lines each, of codes, scales and zero points."""

    def __init__(self, emit: Emitter, layout: Layout, kinds, arrays, lines: ir.Value, numbers: Sequence[ir.Value]):
        self.emit, self.layout, self.starts = emit, layout, []
        zero = ir.Constant(I64, 0)
        for kind, array, size in zip(kinds, arrays, layout.sizes, strict=True):
            start, length = emit.address(kind, array, zero), emit.times(lines, size)
            self.starts.append([emit.forward(start, emit.builder.mul(number, length)) for number in numbers])

    def values(self, row: int, line: ir.Value) -> list[ir.Value]:
        """The vectors of a line."""
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
    """`count` numbers from `first` on; for those beyond `last`, `last`."""
    ahead = [emit.builder.add(first, ir.Constant(I64, n)) for n in range(count)]
    return [emit.builder.select(emit.builder.icmp_signed("<", n, last), n, last) for n in ahead]


@intrinsic
def _one_token(typingctx, layout, weights, scales, zeros, row, last, lines, x, token, sums):
    """The sums of 4 rows from `row` on by row `token` of x, arranged: sums (16) has each of them four times."""
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, *arrays, row, last, lines, x, token, sums = arguments
        zero, kinds = ir.Constant(I64, 0), signature.args
        rows = Rows(emit, form, kinds[1:4], arrays, lines, numbers(emit, row, last, SIDE))
        ahead = Rows(emit, form, kinds[1:4], arrays, lines, [builder.add(row, ir.Constant(I64, SIDE))])
        x = emit.address(kinds[7], x, builder.mul(token, emit.times(lines, form.line)))
        sums = emit.address(kinds[9], sums, zero)
        total = emit.variable(emit.floats(0.0))
        with emit.pieces(lines, CHUNK // form.line) as (first, count):
            lanes = [emit.variable(emit.floats(0.0)) for _ in range(SIDE)]
            with emit.loop(count) as n:
                line = builder.add(first, n)
                ahead.prefetch(line, SIDE)
                here = emit.forward(x, emit.times(line, 4 * form.line))
                vectors = [emit.load(FLOATS, here, 4 * at) for at in range(0, form.line, LANES)]
                for r, lane in enumerate(lanes):
                    for value, vector in zip(rows.values(r, line), vectors, strict=True):
                        lane.set(emit.fma(value, vector, lane.get()))
            total.set(builder.fadd(total.get(), emit.totals([lane.get() for lane in lanes])))
        emit.store(total.get(), sums)
        return context.get_dummy_value()

    return types.void(layout, weights, scales, zeros, *[types.intp] * 3, x, types.intp, sums), generate


@intrinsic
def _unpack(typingctx, layout, weights, scales, zeros, row, last, lines, first, count, tile, at):
    """`count` lines of a row, from line `first` on, as floats at `at` in the tile."""
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, *arrays, row, last, lines, first, count, tile, at = arguments
        rows = Rows(emit, form, signature.args[1:4], arrays, lines, numbers(emit, row, last, 1))
        tile = emit.address(signature.args[9], tile, at)
        with emit.loop(count) as n:
            here = emit.forward(tile, emit.times(n, 4 * form.line))
            for j, value in enumerate(rows.values(0, builder.add(first, n))):
                emit.store(value, here, 4 * LANES * j)
        return context.get_dummy_value()

    return types.void(layout, weights, scales, zeros, *[types.intp] * 5, tile, types.intp), generate


@intrinsic
def _multiply(typingctx, tile, row, x, token, last, width, vectors, sums, at):
    """Adds to sums[at …], lane 4 r + t: `vectors` vectors of 4 rows of the tile by 4 rows of x, `width` floats each."""

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, portable=True)
        tile, row, x, token, last, width, vectors, sums, at = arguments
        tile = emit.address(signature.args[0], tile, emit.times(row, CHUNK))
        x = emit.address(signature.args[2], x, ir.Constant(I64, 0))
        sums = emit.address(signature.args[7], sums, at)
        width = emit.times(width, 4)
        tokens = [emit.forward(x, builder.mul(n, width)) for n in numbers(emit, token, last, SIDE)]
        lanes = [[emit.variable(emit.floats(0.0)) for _ in range(SIDE)] for _ in range(SIDE)]
        with emit.loop(vectors) as n:
            offset = emit.times(n, 4 * LANES)
            weights = [emit.load(FLOATS, tile, builder.add(offset, ir.Constant(I64, 4 * CHUNK * r)))
                       for r in range(SIDE)]  # fmt: skip
            for t, start in enumerate(tokens):
                vector = emit.load(FLOATS, start, offset)
                for r, weight in enumerate(weights):
                    lanes[r][t].set(emit.fma(weight, vector, lanes[r][t].get()))
        total = emit.totals([lane.get() for row in lanes for lane in row])
        emit.store(builder.fadd(emit.load(FLOATS, sums), total), sums)
        return context.get_dummy_value()

    return types.void(tile, types.intp, x, *[types.intp] * 4, sums, types.intp), generate


@njit(inline="never")
def aligned(size):
    """Uninitialized floats that begin where a cache line does: else every load of a vector touches two lines."""
    room = np.empty(size + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + size]


@njit(inline="never")
def one_token(layout, weights, scales, zeros, start, stop, last, lines, x, token, out):
    """out (stop - start): rows `start` to `stop` by row `token` of x. For Numba."""
    sums = np.empty(16, np.float32)
    for row in range(start, stop, SIDE):
        _one_token(layout, weights, scales, zeros, row, last, lines, x, token, sums)
        for r in range(min(SIDE, stop - row)):
            out[row - start + r] = sums[SIDE * r]


@njit(inline="never")
def many_tokens(layout, weights, scales, zeros, start, stop, last, lines, vectors, x, first, out):
    """out (T, stop - start): up to 16 rows from `start` on by T rows of x, from `first` on in each chunk. For Numba.

    x (chunks, tokens, width): see `chunked`. `vectors`: how many vectors a line has.
    """
    chunks, all_tokens, width = x.shape
    tokens = len(out)
    groups, per_chunk = (tokens + SIDE - 1) // SIDE, CHUNK // (LANES * vectors)
    tile = aligned(TILE * CHUNK)
    sums = aligned(groups * SIDE * TILE)  # (groups, rows, 4)
    sums[:] = 0
    for chunk in range(chunks):
        line = chunk * per_chunk
        count = min(per_chunk, lines - line)
        for r in range(min(TILE, stop - start)):
            _unpack(layout, weights, scales, zeros, start + r, last, lines, line, count, tile, r * CHUNK)
        token = chunk * all_tokens + first
        for group in range(groups):
            for r in range(0, min(TILE, stop - start), SIDE):
                at = (group * TILE + r) * SIDE
                _multiply(tile, r, x, token + group * SIDE, token + tokens - 1, width, count * vectors, sums, at)
    for t in range(tokens):
        for r in range(stop - start):
            out[t, r] = sums[(t // SIDE * TILE + r) * SIDE + t % SIDE]


def product(layout, weights, scales, zeros, x, out, lines, vectors):
    """out (T, O) = x by the transposed matrix; rows of `lines` lines with `vectors` vectors each. For Numba.

    `weights`, `scales`, `zeros`: the bytes of each row, uint8 (O, …), or (1, 0) for what the layout does not have.
    """
    tokens, features = out.shape
    if tokens == 1:
        for task in prange((features + TASK - 1) // TASK):
            start, stop = task * TASK, min((task + 1) * TASK, features)
            one_token(layout, weights, scales, zeros, start, stop, features - 1, lines, x, 0, out[0, start:stop])
    else:
        for task in prange((features + TILE - 1) // TILE):
            start, stop = task * TILE, min((task + 1) * TILE, features)
            place = out[:, start:stop]
            many_tokens(layout, weights, scales, zeros, start, stop, features - 1, lines, vectors, x, 0, place)


def chunked(x: np.ndarray, layout: Layout, lines: int) -> np.ndarray:
    """x (T, I), filled up with zeros to whole lines and arranged for a layout, as (chunks, T, width), aligned.

    One token is one chunk of all lines; of several, each chunk of 512 lies together, the last filled up with zeros.
    """
    tokens, columns = x.shape
    length = lines * layout.line
    if columns < length:
        x = np.pad(x, ((0, 0), (0, length - columns)))
    x = layout.arranged(x)
    width = length if tokens == 1 or length < CHUNK else CHUNK
    chunks, per_chunk = -(-length // width), width // layout.line
    room = np.empty(chunks * tokens * width + LANES, np.float32)
    start = -(room.ctypes.data // 4) % LANES
    out = room[start : start + chunks * tokens * width].reshape(chunks, tokens, width)
    for chunk in range(chunks):
        part = x[:, chunk * per_chunk : (chunk + 1) * per_chunk]
        place = out[chunk].reshape(tokens, per_chunk, *part.shape[2:])
        place[:, : part.shape[1]] = part
    return out
