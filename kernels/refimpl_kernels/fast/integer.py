"""Products of 4-bit blocks with activations that are rounded to integers: what other engines do for speed.

An oracle does not round its inputs: this is an option. Each 32 activations get a scale of their own:

    scale = max|x| / Q        q = round(x * (Q / max|x|)), ties to even        Q = 127 (int8) or 32512 (int16)

A block's products are then summed in integers, exactly, and only blocks are added in float32, one after the other:

    sum = sum over a block of (code - zero point) * q        below 2^24, so that float32 holds it
    out = fma(sum, weight's scale * x's scale, out)          block after block, from 0

The result does not depend on threads, machines, or on how a prompt is cut, as in fast/linear.py. Its error: half a unit
of q times |w|, summed up, and n = I/32 + 2 roundings of what is added.

One instruction multiplies four bytes in each of 16 lanes and adds them up, where a lane is a row. So the codes of 16
rows and a line, 128 numbers, are transposed in registers, and for several tokens kept in the first cache (2 KiB):

    16 rows, 64 bytes each  →  16 words of all rows  →  32 vectors, lane r: 4 codes of row r, a byte each

int8 is one byte of x, int16 two: q = 256 high + low, with low in -128 … 127, and so twice as many instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.layout import LINE, Layout, load_floats
from refimpl_kernels.fast.linear import Rows, aligned, numbers
from refimpl_kernels.fast.vector import F32, FLOATS, I32, I64, INTS, LANES, Emitter

BLOCK = 32  # activations that share a scale
LARGEST = {1: 127, 2: 32512}  # by bytes of an activation; 32512 is 127 * 256
ROWS = 2 * LANES  # rows that go together
COLUMNS, HALF = 8, 4  # tokens that go together, of one byte or two
LINE_BLOCKS = 4
# Which numbers of a block the vectors of `_unpack` have, four each.
ORDER = {
    "q4_0": np.arange(BLOCK),
    "int4": np.arange(BLOCK).reshape(4, 4, 2).transpose(2, 0, 1).reshape(-1),
}
ORDER["matmulnbits"] = ORDER["int4"]


def multiplies(layout: Layout) -> bool:
    """Whether `product` takes weights in this layout: codes of 4 bits that count, a scale for 32 and more."""
    return layout.codes in ORDER and layout.block % BLOCK == 0 and layout.rounded is None


def blocks_of(
    emit: Emitter, layout: Layout, rows: Rows, line: ir.Value
) -> Iterator[tuple[list[ir.Value], ir.Value, ir.Value]]:
    """The blocks of a line of 16 rows: 8 vectors of codes, their scales, and which code is 0."""
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
    """`total` and a block, whose products with the bytes of x, low and high, are summed in `planes`."""
    builder = emit.builder
    low, *high = planes
    if high:
        low = builder.add(low, builder.shl(high[0], emit.ints(8)))
    value = emit.fma(centre, emit.spread(emit.load(F32, fact, 4)), builder.sitofp(low, FLOATS))
    return emit.fma(value, builder.fmul(scale, emit.spread(emit.load(F32, fact))), total)


@intrinsic(prefer_literal=True)
def _one_token(typingctx, layout, weights, scales, zeros, row, last, lines, x, facts, size, sums):
    """sums (16): 16 rows from `row` on by one token of `size` bytes, a literal; x and facts as in `_multiply`."""
    form = layout.layout
    if not isinstance(size, types.Literal):
        return None
    planes = size.literal_value

    def generate(context, builder, signature, arguments):
        emit, zero, kinds = Emitter(context, builder, form.portable), ir.Constant(I64, 0), signature.args
        _, *arrays, row, last, lines, x, facts, _, sums = arguments
        rows = Rows(emit, form, kinds[1:4], arrays, lines, numbers(emit, row, last, LANES))
        ahead = Rows(emit, form, kinds[1:4], arrays, lines, [builder.add(row, ir.Constant(I64, LANES))])
        x, facts = emit.address(kinds[7], x, zero), emit.address(kinds[8], facts, zero)
        total = emit.variable(emit.floats(0.0))
        with emit.loop(lines) as line:
            ahead.prefetch(line, LANES)
            for b, (codes, scale, centre) in enumerate(blocks_of(emit, form, rows, line)):
                block = builder.add(emit.times(line, LINE_BLOCKS), ir.Constant(I64, b))
                here, products = emit.forward(x, emit.times(block, planes * BLOCK)), [emit.ints(0)] * planes
                for n, four_codes in enumerate(codes):
                    fours = [emit.spread(emit.load(I32, here, BLOCK * p + 4 * n)) for p in range(planes)]
                    products = [emit.dot4(sum_, four_codes, four) for sum_, four in zip(products, fours, strict=True)]
                fact = emit.forward(facts, emit.times(block, 8))
                total.set(add_block(emit, total.get(), products, scale, centre, fact))
        emit.store(total.get(), emit.address(kinds[10], sums, zero))
        return context.get_dummy_value()

    kinds = (weights, scales, zeros, *[types.intp] * 3, x, facts, size, sums)
    return types.void(layout, *kinds), generate


@intrinsic
def _unpack(typingctx, layout, weights, scales, zeros, row, last, lines, line, tile, at):
    """A line of 16 rows into the tile, from float `at` on: for each block 8 vectors of codes, its scales, its zeros."""
    form = layout.layout

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, *arrays, row, last, lines, line, tile, at = arguments
        rows = Rows(emit, form, signature.args[1:4], arrays, lines, numbers(emit, row, last, LANES))
        tile = emit.address(signature.args[8], tile, at)
        for b, (codes, scale, centre) in enumerate(blocks_of(emit, form, rows, line)):
            for n, vector in enumerate([*codes, scale, centre]):
                emit.store(vector, tile, LINE * (10 * b + n))
        return context.get_dummy_value()

    return types.void(layout, weights, scales, zeros, *[types.intp] * 4, tile, types.intp), generate


@intrinsic(prefer_literal=True)
def _multiply(typingctx, layout, tile, x, facts, block, token, last, tokens, count, size, sums, at):
    """Adds a line's 4 blocks, from `block` on, to sums[at …] (count, 32 rows).

    x (blocks, tokens, size, 32) int8, and facts (blocks, tokens, 2) float32: scale, and minus the sum of q. `count`
    tokens from `token` on, and `size` bytes of each, are literals; tokens beyond `last` are computed as that.
    """
    form = layout.layout
    if not (isinstance(count, types.Literal) and isinstance(size, types.Literal)):
        return None
    many, planes = count.literal_value, size.literal_value

    def generate(context, builder, signature, arguments):
        emit = Emitter(context, builder, form.portable)
        _, tile, x, facts, block, token, last, tokens, _, _, sums, at = arguments
        zero, kinds = ir.Constant(I64, 0), signature.args
        tile, x, facts = (emit.address(kinds[n], v, zero) for n, v in ((1, tile), (2, x), (3, facts)))
        sums = emit.address(kinds[10], sums, at)
        columns = numbers(emit, token, last, many)
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

    kinds = (tile, x, facts, *[types.intp] * 4, count, size, sums, types.intp)
    return types.void(layout, *kinds), generate


@njit(inline="never")
def one_token(layout, weights, scales, zeros, start, stop, last, lines, x, facts, out):
    """out (stop - start): rows `start` to `stop` by one token. For Numba."""
    sums = aligned(LANES)
    for row in range(start, stop, LANES):
        if x.shape[2] == 1:
            _one_token(layout, weights, scales, zeros, row, last, lines, x, facts, 1, sums)
        else:
            _one_token(layout, weights, scales, zeros, row, last, lines, x, facts, 2, sums)
        for r in range(min(LANES, stop - row)):
            out[row - start + r] = sums[r]


@njit(inline="never")
def many_tokens(layout, weights, scales, zeros, start, stop, last, lines, x, facts, out):
    """out (T, stop - start): up to 32 rows from `start` on by T tokens. For Numba."""
    tokens, size = len(out), x.shape[2]
    tile = aligned(2 * 10 * LINE_BLOCKS * LANES)
    sums = aligned((tokens + COLUMNS) * ROWS)
    sums[:] = 0
    for line in range(lines):
        for r in range(2):
            at = r * 10 * LINE_BLOCKS * LANES
            _unpack(layout, weights, scales, zeros, start + r * LANES, last, lines, line, tile, at)
        block = line * LINE_BLOCKS
        if size == 1:
            for t in range(0, tokens, COLUMNS):
                _multiply(layout, tile, x, facts, block, t, tokens - 1, tokens, COLUMNS, 1, sums, t * ROWS)
        else:
            for t in range(0, tokens, HALF):
                _multiply(layout, tile, x, facts, block, t, tokens - 1, tokens, HALF, 2, sums, t * ROWS)
    for t in range(tokens):
        for r in range(stop - start):
            out[t, r] = sums[t * ROWS + r]


def product(layout, weights, scales, zeros, x, facts, out, lines):
    """out (T, O) = rounded activations (see `rounded`) by the transposed matrix. For Numba."""
    tokens, features = out.shape
    for task in prange((features + ROWS - 1) // ROWS):
        start, stop = task * ROWS, min((task + 1) * ROWS, features)
        if tokens == 1:
            place = out[0, start:stop]
            one_token(layout, weights, scales, zeros, start, stop, features - 1, lines, x, facts, place)
        else:
            place = out[:, start:stop]
            many_tokens(layout, weights, scales, zeros, start, stop, features - 1, lines, x, facts, place)


@njit(inline="never")
def _round(x, t, order, largest, numbers, facts):
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


def fill(x, order, largest, numbers, facts):
    """Rounds x (T, I): fills `numbers` (blocks, T, size, 32) int8 and `facts` (blocks, T, 2). For Numba."""
    for t in prange(len(x)):
        _round(x, t, order, largest, numbers, facts)


def fill_one(x, order, largest, numbers, facts):
    """The same for one token, without waking other threads. For Numba."""
    _round(x, 0, order, largest, numbers, facts)


def rounded(x: np.ndarray, size: int) -> np.ndarray:
    """The activations (T, I) that a product with `size` bytes computes with, float64: what `fill` means, in NumPy."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    top, largest = np.abs(blocks).max(-1, keepdims=True), np.float32(LARGEST[size])
    inverse = np.divide(largest, top, out=np.zeros_like(top), where=top > np.float32(1e-30))
    values = np.rint(blocks * inverse).astype(np.float64) * (top / largest)
    return values.reshape(len(x), -1)[:, : x.shape[1]]
