"""Attention over keys and values where a cache keeps them, in float32 or float16, without a copy.

    scores[r, s]  = sum over d of query[r, d] * key[s, d]    summed as in fast_linear.py: keys are rows of weights
    context[r, d] = sum over s of probs[r, s] * value[s, d]

For the context, lanes are neighbours d, and keys are taken in blocks of 64, so that rounding errors grow with S/64 and
not with S. fma(a, b, c) is a * b + c in float32, rounded once.

    part[d]    = fma(probs[r, s], value[s, d], part[d])              s = 64 b, 64 b + 1, … 64 b + 63, from 0
    context[d] = context[d] + part[d]                                b = 0, 1, 2, …, from 0

A product takes part in at most n = min(S, 64) + S/64 + 1 roundings. What is stored in float16 is read as the float32 of
the same value, and queries, probs and sums are float32, whatever the cache keeps.
"""

from __future__ import annotations

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from kernels.fast_layout import BITS, load_floats
from kernels.fast_linear import TILE, aligned, many_tokens, one_token
from kernels.vector import F32, FLOATS, I64, LANES, Emitter

BLOCK = 64  # keys whose products are added up before the sum goes on
WIDTH = 4  # vectors of the head dimension that one tile takes
COLUMNS = WIDTH * LANES
ROWS = 4  # rows that share each value that was read
AHEAD = 16  # keys: how early values are asked for
TASK = 256  # keys that a thread takes at a time


def scores(layout, keys, none, queries, out, heads_apart, lines, vectors):
    """out (N, R, S) = the queries of a head by its keys. For Numba.

    `keys`: bytes, a view whose first is the first of head 0; head n's keys are the rows of `lines` lines, with
    `vectors` vectors each, from n * `heads_apart` on. `queries` (1, N * R, D). `none` (1, 0): no scales.
    """
    heads, rows, size = out.shape
    tasks = (size + TASK - 1) // TASK
    for task in prange(heads * tasks):
        head = task // tasks
        start = task % tasks * TASK
        stop = min(start + TASK, size)
        first = head * heads_apart
        last = first + size - 1
        if rows == 1:
            place = out[head, 0, start:stop]
            one_token(layout, keys, none, none, first + start, first + stop, last, lines, queries, head, place)
        else:
            for s in range(start, stop, TILE):
                end = min(s + TILE, stop)
                place = out[head, :, s:end]
                many_tokens(
                    layout, keys, none, none, first + s, first + end, last, lines, vectors, queries, head * rows, place
                )


@intrinsic(prefer_literal=True)
def _add_block(typingctx, layout, values, probs, value, prob, width, size, count, rows, context):
    """Adds a block of `count` keys to the context of `rows` rows (a literal) and 64 of the head dimension.

    `value` and `prob` count elements; a row of values has `width`, rows of probs are `size` apart, of `context` 64.
    """
    form = layout.layout
    if not isinstance(rows, types.Literal):
        return None

    def generate(ctx, builder, signature, arguments):
        emit, item = Emitter(ctx, builder, form.portable), BITS[form.codes] // 8
        _, values, probs, value, prob, width, size, count, _, context = arguments
        value = emit.address(signature.args[1], values, emit.times(value, item))
        prob = emit.address(signature.args[2], probs, prob)
        context = emit.address(signature.args[9], context, ir.Constant(I64, 0))
        weights = [emit.forward(prob, emit.times(size, 4 * r)) for r in range(rows.literal_value)]
        parts = [[emit.variable(emit.floats(0.0)) for _ in range(WIDTH)] for _ in weights]
        with emit.loop(count) as key:
            here = emit.forward(value, emit.times(builder.mul(key, width), item))
            emit.prefetch(here, emit.times(width, item * AHEAD))
            loaded = [load_floats(emit, form.codes, LANES, emit.forward(here, v * LANES * item)) for v in range(WIDTH)]
            for start, row in zip(weights, parts, strict=True):
                weight = emit.spread(emit.load(F32, start, emit.times(key, 4)))
                for part, vector in zip(row, loaded, strict=True):
                    part.set(emit.fma(weight, vector, part.get()))
        for n, part in enumerate(part for row in parts for part in row):
            total = emit.load(FLOATS, context, 4 * LANES * n)
            emit.store(builder.fadd(total, part.get()), context, 4 * LANES * n)
        return ctx.get_dummy_value()

    return types.void(layout, values, probs, *[types.intp] * 5, rows, context), generate


def context(layout, values, none, probs, out, heads_apart, lines, vectors):
    """out (N, R, D) = probs (1, N * R, S) by the values of a head. `values`, `heads_apart`: as keys in `scores`.

    For Numba. D is a multiple of 64. `none`, `lines` and `vectors` are not read.
    """
    heads, rows, width = out.shape
    size, columns = probs.shape[2], width // COLUMNS
    for task in prange(heads * columns):
        head, column = task // columns, task % columns * COLUMNS
        sums = aligned(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
        r = 0
        while r < rows:
            sums[:] = 0
            prob = (head * rows + r) * size
            many = rows - r >= ROWS
            for key in range(0, size, BLOCK):
                value = (head * heads_apart + key) * width + column
                count = min(BLOCK, size - key)
                if many:
                    _add_block(layout, values, probs, value, prob + key, width, size, count, ROWS, sums)
                else:
                    _add_block(layout, values, probs, value, prob + key, width, size, count, 1, sums)
            for q in range(ROWS if many else 1):
                out[head, r + q, column : column + COLUMNS] = sums[q]
            r += ROWS if many else 1
