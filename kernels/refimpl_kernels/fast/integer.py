"""Sums of products of 4-bit blocks with activations that are rounded to integers, as other engines do for speed.

It is an option, because an oracle must not round its inputs. Each 32 activations get a scale of their own:

    scale = max|x| / Q        q = round(x * (Q / max|x|)), ties to even        Q = 127 (int8) or 32512 (int16)

A block's products are summed in integers, exactly. Blocks are added in float32, one after the other:

    sum = sum over a block of (code - zero point) * q        below 2^24, so that float32 holds it
    out = fma(sum, weight's scale * x's scale, out)          block after block, from 0

As in linear.py, the result depends neither on threads nor on the machine, nor on how a prompt is cut. Its error has two
parts: the sum of |w| times half a unit of q, and n = I/32 + 2 roundings of the sum.

One instruction multiplies four bytes in each of 16 lanes and adds the products up. A lane is a row. So the codes of 16
rows and a line, 128 numbers, are transposed in registers, and for several tokens kept in the first cache (2 KiB):

    16 rows, 64 bytes each  →  16 words of all rows  →  32 vectors, lane r: 4 codes of row r, a byte each

An activation takes one byte in int8. In int16 it takes two, q = 256 high + low with low in -128 … 127, and so twice as
many instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.layout import LINE, Layout, load_floats
from refimpl_kernels.fast.rows import Rows, aligned, numbers
from refimpl_kernels.fast.vector import F32, FLOATS, I32, I64, INTS, LANES, Emitter

BLOCK = 32  # activations that share a scale
LARGEST = {1: 127, 2: 32512}  # by bytes of an activation; 32512 is 127 * 256
ROWS = 2 * LANES  # rows that go together
COLUMNS = 8  # tokens of one byte that go together; of two bytes, half as many
LINE_BLOCKS = 4
# The order of a block's numbers in the vectors of `_unpack`, which have four of them in each lane.
ORDER = {
    "q4_0": np.arange(BLOCK),
    "int4": np.arange(BLOCK).reshape(4, 4, 2).transpose(2, 0, 1).reshape(-1),
}
ORDER["matmulnbits"] = ORDER["int4"]


def multiplies(layout: Layout) -> bool:
    """Whether products can be summed in integers: with 4-bit codes of whole numbers, and blocks of a multiple of 32."""
    return layout.codes in ORDER and layout.block % BLOCK == 0 and layout.rounded is None


class Integers(NamedTuple):
    """Activations as integers, in blocks of 32.

    `numbers` int8 (blocks, T, size, 32): the bytes, low ones first. `facts` float32 (blocks, T, 2): the scale of a
    block, and minus the sum of its integers.
    """

    numbers: np.ndarray
    facts: np.ndarray


INTEGERS = types.NamedTuple([types.Array(types.int8, 4, "C"), types.Array(types.float32, 3, "C")], Integers)


def blocks_of(emit: Emitter, rows: Rows, line: ir.Value) -> Iterator[tuple[list[ir.Value], ir.Value, ir.Value]]:
    """The blocks of a line of 16 rows: 8 vectors of codes, their scales, and the codes that stand for 0."""
    layout = rows.layout
    codes, scale_rows, zero_rows = rows.starts

    def of_blocks(dtype, starts, size):
        """A vector of all rows for each block of the line; a row may have fewer scales, each for several blocks."""
        count, fours = LINE_BLOCKS * BLOCK // layout.block, []
        for first in range(0, LANES, 4):
            places = [emit.forward(start, emit.times(line, size)) for start in starts[first : first + 4]]
            values = [load_floats(emit, dtype, count, place) for place in places]
            four = emit.joined([emit.shuffle(v, v, [n * count // 4 for n in range(4)]) for v in values])
            fours.append(emit.shuffle(four, four, [4 * r + c for c in range(4) for r in range(4)]))
        return emit.quarters(fours)

    builder = emit.builder
    words = [emit.load(INTS, start, emit.times(line, LINE)) for start in codes]
    flip = emit.ints(0x88888888 if layout.codes == "int4" else 0)
    words = [builder.xor(word, flip) for word in emit.transposed(words)]
    low = [builder.and_(word, emit.ints(0x0F0F0F0F)) for word in words]
    high = [builder.and_(builder.lshr(word, emit.ints(4)), emit.ints(0x0F0F0F0F)) for word in words]
    scales = of_blocks(layout.scales, scale_rows, layout.sizes[1])
    centres = [emit.floats(8.0)] * LINE_BLOCKS
    if layout.zeros:
        centres = [builder.fadd(zero, emit.floats(8.0)) for zero in of_blocks(layout.zeros, zero_rows, layout.sizes[2])]
    for b in range(LINE_BLOCKS):
        four = slice(4 * b, 4 * b + 4)
        yield [*low[four], *high[four]], scales[b], centres[b]


def add_block(emit: Emitter, total: ir.Value, planes: list[ir.Value], scale, centre, fact: ir.Value) -> ir.Value:
    """`total` plus a block. `planes`: the sums of the block's products with the low and the high bytes of x."""
    builder = emit.builder
    low, *high = planes
    if high:
        low = builder.add(low, builder.shl(high[0], emit.ints(8)))
    value = emit.fma(centre, emit.spread(emit.load(F32, fact, 4)), builder.sitofp(low, FLOATS))
    return emit.fma(value, builder.fmul(scale, emit.spread(emit.load(F32, fact))), total)


def _addresses(emit: Emitter, kind: types.NamedTuple, x: ir.Value) -> list[ir.Value]:
    """Where the numbers and the facts of `Integers` begin."""
    parts = [emit.builder.extract_value(x, n) for n in range(2)]
    return [emit.address(each, part, ir.Constant(I64, 0)) for each, part in zip(kind.types, parts, strict=True)]


@intrinsic(prefer_literal=True)
def _one_token(typingctx, matrix, row, x, size, sums):
    """sums (16): 16 rows from `row` on by one token of `size` bytes, a literal; x is `Integers`."""
    if not isinstance(size, types.Literal):
        return None
    planes = size.literal_value

    def generate(context, builder, signature, arguments):
        packed, row, x, _, sums = arguments
        kind, _, kind_of_x, _, kind_of_sums = signature.args
        emit = Emitter(context, builder, kind.types[0].layout.portable)
        rows = Rows(emit, kind, packed, row, LANES)
        ahead = Rows(emit, kind, packed, builder.add(row, ir.Constant(I64, LANES)), 1)
        x, facts = _addresses(emit, kind_of_x, x)
        total = emit.variable(emit.floats(0.0))
        with emit.loop(rows.lines) as line:
            ahead.prefetch(line, LANES)
            for b, (codes, scale, centre) in enumerate(blocks_of(emit, rows, line)):
                block = builder.add(emit.times(line, LINE_BLOCKS), ir.Constant(I64, b))
                here, products = emit.forward(x, emit.times(block, planes * BLOCK)), [emit.ints(0)] * planes
                for n, four_codes in enumerate(codes):
                    fours = [emit.spread(emit.load(I32, here, BLOCK * p + 4 * n)) for p in range(planes)]
                    products = [emit.dot4(sum_, four_codes, four) for sum_, four in zip(products, fours, strict=True)]
                fact = emit.forward(facts, emit.times(block, 8))
                total.set(add_block(emit, total.get(), products, scale, centre, fact))
        emit.store(total.get(), emit.address(kind_of_sums, sums, ir.Constant(I64, 0)))
        return context.get_dummy_value()

    return types.void(matrix, types.intp, x, size, sums), generate


@njit(inline="never")
def one_token(matrix, x, start, out):
    """out (R): rows from `start` on by one token. For Numba."""
    sums = aligned(LANES)
    for row in range(0, len(out), LANES):
        if x.numbers.shape[2] == 1:
            _one_token(matrix, start + row, x, 1, sums)
        else:
            _one_token(matrix, start + row, x, 2, sums)
        for r in range(min(LANES, len(out) - row)):
            out[row + r] = sums[r]


@intrinsic
def _unpack(typingctx, matrix, row, line, tile, at):
    """A line of 16 rows into the tile, from float `at` on: for each block 8 vectors of codes, its scales, its zeros."""

    def generate(context, builder, signature, arguments):
        packed, row, line, tile, at = arguments
        kind = signature.args[0]
        emit = Emitter(context, builder, kind.types[0].layout.portable)
        rows = Rows(emit, kind, packed, row, LANES)
        tile = emit.address(signature.args[3], tile, at)
        for b, (codes, scale, centre) in enumerate(blocks_of(emit, rows, line)):
            for n, vector in enumerate([*codes, scale, centre]):
                emit.store(vector, tile, LINE * (10 * b + n))
        return context.get_dummy_value()

    return types.void(matrix, *[types.intp] * 2, tile, types.intp), generate


@intrinsic(prefer_literal=True)
def _multiply(typingctx, layout, tile, x, block, token, size, sums):
    """Adds a line's 4 blocks, from `block` on, to sums (T, 32 rows), for the 8 / `size` tokens from `token` on.

    Beyond the last token, that is repeated. `size`, a literal: bytes of a number.
    """
    form = layout.layout
    if not isinstance(size, types.Literal):
        return None
    planes = size.literal_value

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, tile, x, block, token, _, sums = arguments
        kinds = signature.args
        tokens = emit.shape(kinds[2].types[0], builder.extract_value(x, 0))[1]
        columns = numbers(emit, token, builder.sub(tokens, ir.Constant(I64, 1)), COLUMNS // planes)
        x, facts = _addresses(emit, kinds[2], x)
        tile = emit.address(kinds[1], tile, ir.Constant(I64, 0))
        sums = emit.address(kinds[6], sums, emit.times(token, ROWS))
        group = LINE * 10 * LINE_BLOCKS
        with emit.loop(ir.Constant(I64, LINE_BLOCKS)) as b:
            here = emit.forward(tile, emit.times(b, LINE * 10))
            first = builder.mul(builder.add(block, b), tokens)
            places = [builder.add(first, column) for column in columns]
            numbers_of = [emit.forward(x, emit.times(place, planes * BLOCK)) for place in places]
            facts_of = [emit.forward(facts, emit.times(place, 8)) for place in places]
            totals = [[[emit.variable(emit.ints(0)) for _ in range(planes)] for _ in columns] for _ in range(2)]
            with emit.loop(ir.Constant(I64, 8)) as n:
                codes = [emit.load(INTS, emit.forward(here, emit.times(n, LINE)), group * r) for r in range(2)]
                for t, start in enumerate(numbers_of):
                    for p in range(planes):
                        four = emit.spread(emit.load(I32, emit.forward(start, emit.times(n, 4)), BLOCK * p))
                        for r in range(2):
                            total = totals[r][t][p]
                            total.set(emit.dot4(total.get(), codes[r], four))
            for r in range(2):
                scale = emit.load(FLOATS, here, group * r + LINE * 8)
                centre = emit.load(FLOATS, here, group * r + LINE * 9)
                for t, fact in enumerate(facts_of):
                    place, planes_of = LINE * (2 * t + r), [total.get() for total in totals[r][t]]
                    total = add_block(emit, emit.load(FLOATS, sums, place), planes_of, scale, centre, fact)
                    emit.store(total, sums, place)
        return context.get_dummy_value()

    return types.void(layout, tile, x, *[types.intp] * 2, size, sums), generate


@njit(inline="never")
def many_tokens(matrix, x, start, out):
    """out (T, R): up to 32 rows from `start` on by T tokens. For Numba."""
    tokens, rows = out.shape
    tile = aligned(2 * 10 * LINE_BLOCKS * LANES)
    sums = aligned((tokens + COLUMNS) * ROWS)
    sums[:] = 0
    for line in range(matrix.codes.shape[1] // LINE):
        for r in range(2):
            _unpack(matrix, start + r * LANES, line, tile, r * 10 * LINE_BLOCKS * LANES)
        block = line * LINE_BLOCKS
        if x.numbers.shape[2] == 1:
            for t in range(0, tokens, COLUMNS):
                _multiply(matrix.layout, tile, x, block, t, 1, sums)
        else:
            for t in range(0, tokens, COLUMNS // 2):
                _multiply(matrix.layout, tile, x, block, t, 2, sums)
    for t in range(tokens):
        for r in range(rows):
            out[t, r] = sums[t * ROWS + r]


@njit(inline="never")
def _round(x, t, order, largest, out):
    numbers, facts = out
    for b in range(len(numbers)):
        start = b * BLOCK
        top = np.float32(0)
        for i in range(start, min(start + BLOCK, x.shape[1])):
            top = max(top, abs(x[t, i])) if x[t, i] == x[t, i] else np.float32(np.inf)
        usable = np.float32(1e-30) < top < np.float32(np.inf)
        inverse = largest / top if usable else np.float32(0)
        total = 0
        for n in range(BLOCK):
            i = start + order[n]
            number = 0
            if usable and i < x.shape[1]:
                number = int(np.rint(x[t, i] * inverse))
            total += number
            low = ((number + 128) & 255) - 128
            numbers[b, t, 0, n] = low
            if numbers.shape[2] == 2:
                numbers[b, t, 1, n] = (number - low) >> 8
        facts[b, t, 0] = top / largest if top < np.float32(np.inf) else np.float32(np.nan)
        facts[b, t, 1] = -total


def fill(x, order, largest, out):
    """Rounds x (T, I) to `out`, `Integers`. For Numba."""
    for t in prange(len(x)):
        _round(x, t, order, largest, out)


def fill_one(x, order, largest, out):
    """The same for one token, without waking other threads. For Numba."""
    _round(x, 0, order, largest, out)


def rounded(x: np.ndarray, size: int) -> np.ndarray:
    """The activations (T, I) rounded to `size` bytes, in float64: `fill` in NumPy."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    top, largest = np.abs(blocks).max(-1, keepdims=True), np.float32(LARGEST[size])
    inverse = np.divide(largest, top, out=np.zeros_like(top), where=top > np.float32(1e-30))
    values = np.rint(blocks * inverse).astype(np.float64) * (top / largest)
    return values.reshape(len(x), -1)[:, : x.shape[1]]
