"""Softmax and sigmoid of float32, with an exponential that is the same everywhere.

For a softmax, each thread takes a row at a time:

    e[s] = exp(x[s] - the row's largest)                  probs[s] = e[s] / sum

A row is taken in vectors of 16 lanes, and in chunks of 512 numbers, so that rounding errors grow with S/512:

    part[l]  = part[l] + e[16 v + l]        vector after vector of a chunk, from 0
    total[l] = total[l] + part[l]           chunk after chunk, from 0
    sum      = lane l + lane l+8, of these l + l+4, then l + l+2, then l + l+1

So a number takes part in at most n = min(S/16, 32) + S/512 + 5 roundings of the sum. A masked number is 0 after exp and
changes no bit, so a prompt in pieces gives the same as at once.

A sigmoid is 1 / (1 + exp(-x)), or for x below 0 exp(x) / (1 + exp(x)): within six roundings.

exp(x), for x up to 0, is 2^k p(r), where k is the whole number nearest to x / ln 2, r = x - k ln 2 with ln 2 in two
parts, and p the Taylor polynomial of degree 7, whose remainder is below 6e-9 for |r| <= ln 2 / 2. With all roundings,
the relative error is at most 2^-23. Below the smallest normal number the result is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl_kernels.fast.vector import FLOATS, I32, I64, INTS, LANES, Emitter

CHUNK = 512 // LANES  # vectors that are added up before their sum joins the others
TASK = 1024  # vectors that a thread takes at a time
LOWEST = math.log(2.0**-126)
LN2_HIGH, LN2_LOW = 0.693359375, math.log(2) - 0.693359375  # the first has 10 bits: k times it is exact
ROUNDER = 1.5 * 2.0**23  # a float that counts in ones: a number that is added to it is rounded to a whole one


def exp(emit: Emitter, x: ir.Value) -> ir.Value:
    """e to the power of x in each lane, for x up to 0 or NaN."""
    b = emit.builder
    tiny = b.fcmp_ordered("<", x, emit.floats(LOWEST))
    x = b.select(tiny, emit.floats(LOWEST), x)
    counted = emit.fma(x, emit.floats(1 / math.log(2)), emit.floats(ROUNDER))
    k = b.fsub(counted, emit.floats(ROUNDER))
    r = emit.fma(k, emit.floats(-LN2_LOW), emit.fma(k, emit.floats(-LN2_HIGH), x))
    p = emit.floats(1 / math.factorial(7))
    for n in range(6, -1, -1):
        p = emit.fma(p, r, emit.floats(1 / math.factorial(n)))
    # The last bits of `counted` are k: plus 127, and shifted to where the exponent is, they are 2^k.
    exponent = b.shl(b.add(b.bitcast(counted, INTS), emit.ints(127)), emit.ints(23))
    return b.select(tiny, emit.floats(0.0), b.fmul(p, b.bitcast(exponent, FLOATS)))


def folded(emit: Emitter, vector: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """All lanes of a vector combined, in each lane."""
    for far in (8, 4, 2, 1):
        vector = combine(vector, emit.shuffle(vector, vector, [(lane + far) % LANES for lane in range(LANES)]))
    return vector


@intrinsic
def _softmax(typingctx, x, row, size, tail, out):
    """The softmax of row `row` of x, `size` numbers, to `out`. `tail` (16): room for numbers that fill no vector."""

    def generate(context, builder, signature, arguments):
        emit, kinds, zero = Emitter(context, builder, portable=True), signature.args, ir.Constant(I64, 0)
        x, row, size, tail, out = arguments
        start = builder.mul(row, size)
        x, out = emit.address(kinds[0], x, start), emit.address(kinds[4], out, start)
        tail = emit.address(kinds[3], tail, zero)
        vectors = builder.udiv(size, ir.Constant(I64, LANES))
        rest = builder.sub(size, emit.times(vectors, LANES))
        ends = emit.times(vectors, 4 * LANES)
        emit.store(emit.floats(-math.inf), tail)
        with emit.loop(rest) as n:
            at = emit.times(n, 4)
            emit.store(emit.load(I32, x, builder.add(ends, at)), tail, at)

        largest = emit.variable(emit.load(FLOATS, tail))

        def larger(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        with emit.loop(vectors) as v:
            largest.set(larger(emit.load(FLOATS, x, emit.times(v, 4 * LANES)), largest.get()))
        top = folded(emit, largest.get(), larger)

        total, before, part = (emit.variable(emit.floats(0.0)) for _ in range(3))
        with emit.pieces(vectors, CHUNK) as (first, count):
            before.set(total.get())
            part.set(emit.floats(0.0))
            with emit.loop(count) as n:
                at = emit.times(builder.add(first, n), 4 * LANES)
                e = exp(emit, builder.fsub(emit.load(FLOATS, x, at), top))
                emit.store(e, out, at)
                part.set(builder.fadd(part.get(), e))
            total.set(builder.fadd(total.get(), part.get()))
        # The tail belongs to the last chunk, or begins one.
        last = exp(emit, builder.fsub(emit.load(FLOATS, tail), top))
        begins = builder.icmp_unsigned("==", builder.urem(vectors, ir.Constant(I64, CHUNK)), zero)
        so_far = builder.select(begins, total.get(), before.get())
        part_so_far = builder.select(begins, emit.floats(0.0), part.get())
        total = folded(emit, builder.fadd(so_far, builder.fadd(part_so_far, last)), builder.fadd)

        with emit.loop(vectors) as v:
            at = emit.times(v, 4 * LANES)
            emit.store(builder.fdiv(emit.load(FLOATS, out, at), total), out, at)
        emit.store(builder.fdiv(last, total), tail)
        with emit.loop(rest) as n:
            at = emit.times(n, 4)
            emit.store(emit.load(I32, tail, at), out, builder.add(ends, at))
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, tail, out), generate


@intrinsic
def _sigmoid(typingctx, x, first, vectors, out):
    """1 / (1 + exp(-x)) of `vectors` vectors from number `first` on, with an exponential that cannot overflow."""

    def generate(context, builder, signature, arguments):
        emit, kinds = Emitter(context, builder, portable=True), signature.args
        x, first, vectors, out = arguments
        x, out = emit.address(kinds[0], x, first), emit.address(kinds[3], out, first)
        one = emit.floats(1.0)
        with emit.loop(vectors) as v:
            at = emit.times(v, 4 * LANES)
            number = emit.load(FLOATS, x, at)
            negative = builder.fcmp_ordered("<", number, emit.floats(0.0))
            e = exp(emit, builder.select(negative, number, builder.fneg(number)))
            emit.store(builder.fdiv(builder.select(negative, e, one), builder.fadd(one, e)), out, at)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, out), generate


def sigmoid(x, out):
    """out (N) = 1 / (1 + exp(-x)), where N is a multiple of 16. For Numba."""
    vectors = x.size // LANES
    for task in prange((vectors + TASK - 1) // TASK):
        _sigmoid(x, task * TASK * LANES, min(TASK, vectors - task * TASK), out)


def softmax(x, out):
    """out (N, S) = the softmax of each row of x. For Numba."""
    rows, size = x.shape
    for row in prange(rows):
        _softmax(x, row, size, np.empty(LANES, np.float32), out)
