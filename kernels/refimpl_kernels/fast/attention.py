"""Attention over keys and values where a cache keeps them, in float32, float16 or 8 bits, without a copy.

    scores[r, s]  = sum over d of query[r, d] * key[s, d]
    context[r, d] = sum over s of probs[r, s] * value[s, d]

Float16, and code * scale of `Q8Rows`, become float32 without rounding. Queries, probs and sums are float32, whatever
the cache keeps. fma(a, b, c) is a * b + c in float32, rounded once.

For scores, lanes are neighbours d, in vectors of 16:

    lane[l]      = fma(key[s, 16 v + l], query[r, 16 v + l], lane[l])        v = 0, 1, …, from 0
    scores[r, s] = lane l + lane l+8, of these l + l+4, then l + l+2, then l + l+1

So a product takes part in at most D/16 + 4 roundings. For the context, lanes are neighbours d, too. Keys are taken in
blocks of 64, so that rounding errors grow with S/64 and not with S:

    part[d]    = fma(probs[r, s], value[s, d], part[d])              s = 64 b, 64 b + 1, … 64 b + 63, from 0
    context[d] = context[d] + part[d]                                b = 0, 1, 2, …, from 0

A product takes part in at most min(S, 64) + S/64 + 1 roundings.

For one row of queries memory is the limit, so keys and values are read once, in the order in which they lie, and are
prefetched. Of several rows, four share each number that is read; where fewer than four are left, the last is repeated.
"""

from __future__ import annotations

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.layout import BITS, LINE, Layout, load_floats
from refimpl_kernels.fast.rows import aligned, numbers
from refimpl_kernels.fast.vector import F32, FLOATS, I64, LANES, Emitter

PART = 32  # numbers that are read together, with the scale that they may share
SIDE = 4  # keys, and rows of queries or of probs, whose sums are in registers together
TASK = 256  # keys that a thread takes at a time
AHEAD = 8192  # keys and values are prefetched so many bytes ahead; 2048 and 4096 are slower
BLOCK = 64  # keys whose products are added up before the sum goes on
NARROW, WIDE = 4, 8  # vectors of the head dimension whose sums are in registers: for four rows, and for one
COLUMNS = NARROW * LANES


class Kept:
    """Rows of numbers as a cache keeps them: `parts` parts of 32 in each, with a scale each if the layout has scales.

    A place is two addresses: of a part, and of its scale.
    """

    def __init__(self, emit: Emitter, layout: Layout, kinds, arrays, parts: ir.Value):
        self.emit, self.codes, self.scales, self.parts = emit, layout.codes, layout.scales, parts
        self.size = BITS[layout.codes] // 8  # bytes of a number
        zero = ir.Constant(I64, 0)
        self.starts = [emit.address(kind, array, zero) for kind, array in zip(kinds, arrays, strict=True)]

    def place(self, row: ir.Value, part: ir.Value) -> list[ir.Value]:
        """The place of a part of a row."""
        return self.forward(self.starts, self.emit.builder.add(self.emit.builder.mul(row, self.parts), part))

    def forward(self, place: list[ir.Value], parts: ir.Value) -> list[ir.Value]:
        """The place that lies `parts` parts further on."""
        steps = self.emit.times(parts, PART * self.size), self.emit.times(parts, 2)
        return [self.emit.forward(start, step) for start, step in zip(place, steps, strict=True)]

    def vectors(self, place: list[ir.Value], part: int = 0) -> list[ir.Value]:
        """The numbers of the part that lies `part` parts after a place."""
        emit, (codes, scales) = self.emit, place
        offsets = (PART * self.size * part + LANES * self.size * n for n in range(PART // LANES))
        vectors = [load_floats(emit, self.codes, LANES, emit.forward(codes, offset)) for offset in offsets]
        if not self.scales:
            return vectors
        scale = emit.spread(load_floats(emit, self.scales, 1, emit.forward(scales, 2 * part)))
        return [emit.builder.fmul(vector, scale) for vector in vectors]

    def prefetch(self, place: list[ir.Value], parts: int) -> None:
        """Asks for the bytes of so many parts, AHEAD bytes after a place."""
        for offset in range(0, parts * PART * self.size, LINE):
            self.emit.prefetch(place[0], AHEAD + offset)


@intrinsic(prefer_literal=True)
def _scores(typingctx, layout, keys, scales, key, last, width, queries, query, final, rows, out, at, apart):
    """The products of 4 keys by 1 or by 4 queries (`rows`, a literal): out[at + apart * r + k].

    Keys are those from number `key` on, queries those from `query` on. Beyond key `last` and query `final`, these two
    are repeated.
    """
    form = layout.layout
    if not isinstance(rows, types.Literal):
        return None

    def generate(context, builder, signature, arguments):
        emit, kinds, zero = Emitter(context, builder, form.portable), signature.args, ir.Constant(I64, 0)
        _, *arrays, key, last, width, queries, query, final, _, out, at, apart = arguments
        parts = builder.udiv(width, ir.Constant(I64, PART))
        kept = Kept(emit, form, kinds[1:3], arrays, parts)
        queries = emit.address(kinds[6], queries, zero)
        starts = [emit.forward(queries, emit.times(builder.mul(n, width), 4))
                  for n in numbers(emit, query, final, rows.literal_value)]  # fmt: skip
        places = [kept.place(n, zero) for n in numbers(emit, key, last, SIDE)]
        lanes = [[emit.variable(emit.floats(0.0)) for _ in places] for _ in starts]
        with emit.loop(parts) as part:
            kept.prefetch(kept.forward(places[0], emit.times(part, SIDE)), SIDE)
            here = [emit.forward(start, emit.times(part, 4 * PART)) for start in starts]
            given = [[emit.load(FLOATS, start, 4 * n) for n in range(0, PART, LANES)] for start in here]
            for k, place in enumerate(places):
                vectors = kept.vectors(kept.forward(place, part))
                for row, vector in zip(lanes, given, strict=True):
                    for a, b in zip(vectors, vector, strict=True):
                        row[k].set(emit.fma(a, b, row[k].get()))
        total = emit.totals([lane.get() for row in lanes for lane in row])
        if len(starts) == 1:  # each of 4 sums fills a quarter
            total = emit.shuffle(total, total, range(0, LANES, LANES // SIDE))
        place = emit.address(kinds[10], out, at)
        for n in range(len(starts)):
            four = emit.shuffle(total, total, range(SIDE * n, SIDE * (n + 1)))
            emit.store(four, emit.forward(place, emit.times(apart, 4 * n)))
        return context.get_dummy_value()

    kinds = (layout, keys, scales, *[types.intp] * 3, queries, *[types.intp] * 2, rows, out, *[types.intp] * 2)
    return types.void(*kinds), generate


def scores(layout, keys, scales, queries, out, heads_apart):
    """out (N, R, S) = the queries of a head by its keys. For Numba.

    `keys`, `scales`: views of bytes that begin with head 0. The keys of head n are the rows from n * `heads_apart` on.
    `queries` (N * R, D), where D is a multiple of 32.
    """
    heads, rows, size = out.shape
    width, flat = queries.shape[1], out.reshape(-1)
    tasks = (size + TASK - 1) // TASK
    for task in prange(heads * tasks):
        head = task // tasks
        start = task % tasks * TASK
        stop = min(start + TASK, size)
        first, query, final = head * heads_apart, head * rows, (head + 1) * rows - 1
        last = first + size - 1
        sums = aligned(TASK)
        if rows == 1:
            for s in range(start, stop, SIDE):
                _scores(layout, keys, scales, first + s, last, width, queries, query, final, 1, sums, s - start, 0)
            for s in range(start, stop):
                out[head, 0, s] = sums[s - start]
            continue
        for block in range(start, stop, BLOCK):
            for r in range(0, rows, SIDE):
                for s in range(block, min(block + BLOCK, stop), SIDE):
                    whole = s + SIDE <= stop and r + SIDE <= rows
                    place, at, apart = (flat, (query + r) * size + s, size) if whole else (sums, 0, SIDE)
                    _scores(layout, keys, scales, first + s, last, width,
                            queries, query + r, final, SIDE, place, at, apart)  # fmt: skip
                    if not whole:
                        for q in range(min(SIDE, rows - r)):
                            for k in range(min(SIDE, stop - s)):
                                out[head, r + q, s + k] = sums[SIDE * q + k]


@intrinsic(prefer_literal=True)
def _add_block(typingctx, layout, values, scales, first, count, column, width, probs, row, final, key, size, rows,
               vectors, sums):  # fmt: skip
    """Adds `count` values times their probs to sums (rows, 16 * vectors).

    The values are the rows from number `first` on, and in them the columns from `column` on. The probs are the rows
    from number `row` on, `size` in each, and in them the columns from `key` on. Beyond row `final`, that
    row is repeated. `rows` and `vectors` are literals.
    """
    form = layout.layout
    if not isinstance(rows, types.Literal) or not isinstance(vectors, types.Literal):
        return None

    def generate(context, builder, signature, arguments):
        emit, kinds, zero = Emitter(context, builder, form.portable), signature.args, ir.Constant(I64, 0)
        _, *arrays, first, count, column, width, probs, row, final, key, size, _, _, sums = arguments
        across, all_parts = vectors.literal_value * LANES // PART, builder.udiv(width, ir.Constant(I64, PART))
        kept = Kept(emit, form, kinds[1:3], arrays, all_parts)
        values = kept.place(first, builder.udiv(column, ir.Constant(I64, PART)))
        probs = emit.address(kinds[7], probs, zero)
        starts = [emit.forward(probs, emit.times(builder.add(builder.mul(n, size), key), 4))
                  for n in numbers(emit, row, final, rows.literal_value)]  # fmt: skip
        lanes = [[emit.variable(emit.floats(0.0)) for _ in range(vectors.literal_value)] for _ in starts]
        with emit.loop(count) as n:
            here = kept.forward(values, builder.mul(n, all_parts))
            kept.prefetch(here, across)
            weights = [emit.spread(emit.load(F32, start, emit.times(n, 4))) for start in starts]
            loaded = [vector for part in range(across) for vector in kept.vectors(here, part)]
            for weight, row in zip(weights, lanes, strict=True):
                for part, vector in zip(row, loaded, strict=True):
                    part.set(emit.fma(weight, vector, part.get()))
        place = emit.address(kinds[14], sums, zero)
        for n, part in enumerate(part for row in lanes for part in row):
            total = emit.load(FLOATS, place, 4 * LANES * n)
            emit.store(builder.fadd(total, part.get()), place, 4 * LANES * n)
        return context.get_dummy_value()

    kinds = (layout, values, scales, *[types.intp] * 4, probs, *[types.intp] * 4, rows, vectors, sums)
    return types.void(*kinds), generate


def context(layout, values, scales, probs, out, heads_apart):
    """out (N, R, D) = probs (N * R, S) by the values of a head. For Numba.

    `values`, `scales`, `heads_apart`: as keys in `scores`. D is a multiple of 64.
    """
    heads, rows, width = out.shape
    size = probs.shape[1]
    wide = rows == 1 and width % (WIDE * LANES) == 0
    step = (WIDE if wide else NARROW) * LANES
    columns = width // step
    for task in prange(heads * columns):
        head, column = task // columns, task % columns * step
        first, final = head * heads_apart, (head + 1) * rows - 1
        sums = aligned(SIDE * COLUMNS)
        for r in range(0, rows, SIDE):
            sums[:] = 0
            row = head * rows + r
            for key in range(0, size, BLOCK):
                n, here = min(BLOCK, size - key), first + key
                if wide:
                    _add_block(layout, values, scales, here, n, column, width,
                               probs, row, final, key, size, 1, WIDE, sums)  # fmt: skip
                else:
                    _add_block(layout, values, scales, here, n, column, width,
                               probs, row, final, key, size, SIDE, NARROW, sums)  # fmt: skip
            for q in range(min(SIDE, rows - r)):
                for d in range(step):
                    out[head, r + q, column + d] = sums[step * q + d]
