"""Attention over keys and values where a cache keeps them, in float32 or float16, without a copy.

    scores[r, s]  = sum over d of query[r, d] * key[s, d]    summed as the dense weights in fast_linear.py are
    context[r, d] = sum over s of probs[r, s] * value[s, d]

For the context, lanes are neighbours d, and keys are taken in blocks of 64, so that rounding errors grow with S/64 and
not with S. fma(a, b, c) is a * b + c in float32, rounded once.

    part[d]    = fma(probs[r, s], value[s, d], part[d])              s = 64 b, 64 b + 1, … 64 b + 63, from 0
    context[d] = context[d] + part[d]                                b = 0, 1, 2, …, from 0

A product takes part in at most n = min(S, 64) + S/64 + 1 roundings. What is stored in float16 is read as the float32 of
the same value, and queries, probs and sums are float32, whatever the cache keeps.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from kernels.fast_linear import _few, _few_portable, _many, _many_portable, load_floats
from kernels.vector import F32, I64, LANES, Emitter

BLOCK = 64  # keys whose products are added up before the sum goes on
WIDTH = 4  # vectors of the head dimension that one tile takes
TASK = 256  # keys that a thread takes at a time


def scores(keys, none, queries, out, heads_apart, steps, portable):
    """out (N, R, S) = queries (N * R, D) @ keys of head n, transposed. For Numba.

    Head n's keys are the rows of length D from n * `heads_apart` on; `keys` is a view whose first element is the first
    of head 0. `none`: no scales. `steps`: D / 16.
    """
    heads, rows, size = out.shape
    tasks = (size + TASK - 1) // TASK
    for task in prange(heads * tasks):
        head = task // tasks
        start = task % tasks * TASK
        stop = min(start + TASK, size)
        first, last = head * heads_apart, head * heads_apart + size - 1
        sums = np.empty(16, np.float32)
        if rows == 1:
            for s in range(start, stop, 4):
                if portable:
                    _few_portable(keys, none, queries, first + s, head, last, head, steps, sums)
                else:
                    _few(keys, none, queries, first + s, head, last, head, steps, sums)
                for k in range(min(4, stop - s)):
                    out[head, 0, s + k] = sums[k]
        else:
            end = (head + 1) * rows - 1
            for r in range(0, rows, 6):
                for s in range(start, stop, 2):
                    if portable:
                        _many_portable(keys, none, queries, first + s, head * rows + r, last, end, steps, sums)
                    else:
                        _many(keys, none, queries, first + s, head * rows + r, last, end, steps, sums)
                    for k in range(min(2, stop - s)):
                        for q in range(min(6, rows - r)):
                            out[head, r + q, s + k] = sums[6 * k + q]


def _block(rows: int, portable: bool):
    """The intrinsic that adds a block of keys to the context of `rows` rows and 64 of the head dimension.

    `value` and `prob` count elements; rows of probs are `size` apart, rows of `context` 64 elements. A row beyond
    `valid` is computed as the last of those.
    """

    def block(typingctx, values, probs, value, prob, width, size, count, valid, context):
        kind = values.dtype

        def generate(ctx, builder, signature, arguments):
            emit = Emitter(ctx, builder, portable)
            values, probs, value, prob, width, size, count, valid, context = arguments
            value = emit.address(signature.args[0], values, value)
            prob = emit.address(signature.args[1], probs, prob)
            context = emit.address(signature.args[8], context, ir.Constant(I64, 0))
            last = builder.sub(valid, ir.Constant(I64, 1))
            weights = []
            for r in range(rows):
                row = ir.Constant(I64, r)
                row = builder.select(builder.icmp_signed("<", row, last), row, last)
                weights.append(emit.forward(prob, emit.times(builder.mul(row, size), 4)))
            item = kind.bitwidth // 8
            parts = [[emit.variable(emit.floats(0.0)) for _ in range(WIDTH)] for _ in range(rows)]
            with emit.loop(count) as key:
                here = emit.forward(value, emit.times(builder.mul(key, width), item))
                loaded = [load_floats(emit, kind, LANES, emit.forward(here, v * LANES * item)) for v in range(WIDTH)]
                for r in range(rows):
                    weight = emit.spread(emit.load(F32, weights[r], emit.times(key, 4)))
                    for v in range(WIDTH):
                        parts[r][v].set(emit.fma(weight, loaded[v], parts[r][v].get()))
            for r in range(rows):
                for v in range(WIDTH):
                    at = 4 * LANES * (r * WIDTH + v)
                    total = emit.load(ir.VectorType(F32, LANES), context, at)
                    emit.store(builder.fadd(total, parts[r][v].get()), context, at)
            return ctx.get_dummy_value()

        return types.void(values, probs, *[types.intp] * 6, context), generate

    return intrinsic(block)


_one, _one_portable = (_block(1, portable) for portable in (False, True))
_four, _four_portable = (_block(4, portable) for portable in (False, True))


def context(values, none, probs, out, heads_apart, steps, portable):
    """out (N, R, D) = probs (N * R, S) @ values of head n. `values` and `heads_apart`: as keys in `scores`. For Numba.

    `steps`: D / 64. `none` is not read.
    """
    heads, rows, width = out.shape
    size = probs.shape[1]
    for task in prange(heads * steps):
        head, column = task // steps, task % steps * LANES * WIDTH
        sums = np.empty((4, LANES * WIDTH), np.float32)
        for r in range(0, rows, 4):
            sums[:] = 0
            valid = min(4, rows - r)
            prob = (head * rows + r) * size
            for key in range(0, size, BLOCK):
                value = (head * heads_apart + key) * width + column
                count = min(BLOCK, size - key)
                if rows == 1:
                    if portable:
                        _one_portable(values, probs, value, prob + key, width, size, count, valid, sums)
                    else:
                        _one(values, probs, value, prob + key, width, size, count, valid, sums)
                elif portable:
                    _four_portable(values, probs, value, prob + key, width, size, count, valid, sums)
                else:
                    _four(values, probs, value, prob + key, width, size, count, valid, sums)
            for q in range(valid):
                out[head, r + q, column : column + LANES * WIDTH] = sums[q]
