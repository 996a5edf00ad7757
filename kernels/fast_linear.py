"""Matrix products that read weights as they are stored: 4-bit blocks, bfloat16, float16 or float32.

    out[t, o] = sum over i of x[t, i] * w[o, i]            x float32 and exact, w (O, I), never dequantized in memory

One token or many, a product is the same number to the bit: at any number of threads, on any machine, for a prompt at
once and in pieces. For that the order of each sum is fixed. fma(a, b, c) is a * b + c in float32, rounded once.

**Dense weights.** Lane l of 16 takes every sixteenth element, and the lanes are added at the end:

    lane[l] = fma(w[16 c + l], x[16 c + l], lane[l])       c = 0, 1, 2, …, from 0
    out     = total(lane)                                  lane l + lane l+8, of these l + l+4, then l + l+2, l + l+1

**4-bit blocks of 32.** 64 bytes hold 128 neighbours of a row, in the format's own packing. Lane l takes the 32 bits of
eight of them, which lie in one block; x is laid out to match. With i(c, l, j) for the element in bits 4j … 4j+3,

    part[l] = fma(code[i(c, l, j)], x[i(c, l, j)], part[l])                                j = 0 … 7, from 0
    lane[l] = fma(part[l], scale of their block, lane[l])                                  c = 0, 1, 2, …, from 0
    out     = total(lane)

    INT4    i(c, l, j) = 128 c + 8 l + j
    Q4_0    i(c, l, j) = 128 c + 32 (l // 4) + 4 (l % 4) + 16 (j % 2) + j // 2             code - 8 for code

A product takes part in n = I/16 + 4, or 8 + I/128 + 4, roundings, so the error is at most n u / (1 - n u) times the sum
of |w x|, with u = 2^-24. Here w is the exact code * scale: dequantizing would round each weight once more.

A tile is some rows by some tokens, whose sums stay in registers. One token streams the weights at the speed of memory;
several tokens share each weight that was read and decoded.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from kernels.vector import F32, I16, I64, INTS, LANES, Emitter

CHUNK = 128  # 4-bit weights in 16 lanes of 32 bits
BLOCK = 32
TASK = 32  # rows that a thread takes at a time
FEW = (4, 1)  # rows and tokens of the tile for one token
MANY = (2, 6)


class Int4Step:
    """128 4-bit weights of each row: the products with all tokens, added to the lanes."""

    weight_bytes, x_bytes = CHUNK // 2, 4 * CHUNK

    def __init__(self, weight: types.Type, scale: types.Type):
        self.scale, self.scale_bytes = scale, CHUNK // BLOCK * scale.bitwidth // 8
        self.centred = weight == types.int8  # codes 0 … 15 for -8 … 7, which differ in their upper bit

    def __call__(self, emit: Emitter, weights, scales, tokens, lanes) -> None:
        table = emit.int4_table()
        words = [emit.load(INTS, weight) for weight in weights]
        if self.centred:
            words = [emit.builder.xor(word, emit.ints(0x88888888)) for word in words]
        parts = [[emit.floats(0.0) for _ in tokens] for _ in weights]
        for j in range(8):
            codes = [emit.int4_lane(word, j, table) for word in words]
            for t, token in enumerate(tokens):
                x = emit.load(ir.VectorType(F32, LANES), token, 4 * LANES * j)
                for r, code in enumerate(codes):
                    parts[r][t] = emit.fma(code, x, parts[r][t])
        for r, scale in enumerate(scales):
            values = emit.spread(load_floats(emit, self.scale, CHUNK // BLOCK, scale))
            for t in range(len(tokens)):
                lanes[r][t].set(emit.fma(parts[r][t], values, lanes[r][t].get()))


class DenseStep:
    """16 weights of each row: the products with all tokens, added to the lanes."""

    scale_bytes, x_bytes = 0, 4 * LANES

    def __init__(self, weight: types.Type):
        self.weight, self.weight_bytes = weight, LANES * weight.bitwidth // 8

    def __call__(self, emit: Emitter, weights, scales, tokens, lanes) -> None:
        values = [load_floats(emit, self.weight, LANES, weight) for weight in weights]
        for t, token in enumerate(tokens):
            x = emit.load(ir.VectorType(F32, LANES), token)
            for r, value in enumerate(values):
                lanes[r][t].set(emit.fma(value, x, lanes[r][t].get()))


def load_floats(emit: Emitter, kind: types.Type, count: int, pointer: ir.Value) -> ir.Value:
    """`count` numbers from memory as float32; `kind`: float32, uint16 for bfloat16 bits, or int16 for float16 bits."""
    if kind == types.float32:
        return emit.load(ir.VectorType(F32, count), pointer)
    bits = emit.load(ir.VectorType(I16, count), pointer)
    return emit.half(bits) if kind == types.int16 else emit.bfloat(bits)


def _tile(rows: int, tokens: int, portable: bool):
    """The intrinsic of a tile: the sums of `rows` rows from `row` on and `tokens` tokens from `token` on.

    They are written to `sums` (rows * tokens). A row or token beyond the last is computed as the last.
    """

    def tile(typingctx, weights, scales, x, row, token, last_row, last_token, steps, sums):
        blocks = weights.dtype in (types.uint8, types.int8)
        step = Int4Step(weights.dtype, scales.dtype) if blocks else DenseStep(weights.dtype)

        def generate(context, builder, signature, arguments):
            emit = Emitter(context, builder, portable)
            _, _, _, row, token, last_row, last_token, steps, _ = arguments
            zero = ir.Constant(I64, 0)
            weights, scales, x, sums = (emit.address(signature.args[n], arguments[n], zero) for n in (0, 1, 2, 8))

            def lines(start, first, last, count, size):
                """The start of each row, or token: `steps` times `size` bytes long."""
                numbers = [builder.add(first, ir.Constant(I64, n)) for n in range(count)]
                numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
                length = emit.times(steps, size)
                return [emit.forward(start, builder.mul(n, length)) for n in numbers]

            places = [
                (lines(weights, row, last_row, rows, step.weight_bytes), step.weight_bytes),
                (lines(scales, row, last_row, rows, step.scale_bytes), step.scale_bytes),
                (lines(x, token, last_token, tokens, step.x_bytes), step.x_bytes),
            ]
            lanes = [[emit.variable(emit.floats(0.0)) for _ in range(tokens)] for _ in range(rows)]
            with emit.loop(steps) as index:
                here = [[emit.forward(line, emit.times(index, size)) for line in group] for group, size in places]
                if tokens == 1:  # the next tile's rows: what comes from memory is several streams, hard to guess
                    for r in range(rows):
                        ahead = emit.times(steps, rows * step.weight_bytes)
                        emit.prefetch(here[0][r], ahead)
                step(emit, *here, lanes)
            for r in range(rows):
                for t in range(tokens):
                    emit.store(emit.total(lanes[r][t].get()), sums, 4 * (r * tokens + t))
            return context.get_dummy_value()

        return types.void(weights, scales, x, *[types.intp] * 5, sums), generate

    return intrinsic(tile)


_few, _few_portable = (_tile(*FEW, portable) for portable in (False, True))
_many, _many_portable = (_tile(*MANY, portable) for portable in (False, True))


def product(weights, scales, x, out, steps, portable):
    """out (T, O) = x (T, I) @ weights.T; rows of `weights`, `scales` and `x` are `steps` steps long. For Numba.

    `weights` (O, …): uint8 for INT4, int8 for Q4_0, float32, uint16 for bfloat16, int16 for float16. `scales` (O, I/32)
    float32, or int16 for float16; (1, 0) without blocks. `x`: see `arranged`.
    """
    tokens, features = out.shape
    for task in prange((features + TASK - 1) // TASK):
        stop = min((task + 1) * TASK, features)
        sums = np.empty(16, np.float32)
        if tokens == 1:
            for row in range(task * TASK, stop, 4):
                if portable:
                    _few_portable(weights, scales, x, row, 0, features - 1, 0, steps, sums)
                else:
                    _few(weights, scales, x, row, 0, features - 1, 0, steps, sums)
                for r in range(min(4, stop - row)):
                    out[0, row + r] = sums[r]
        else:
            for token in range(0, tokens, 6):
                for row in range(task * TASK, stop, 2):
                    if portable:
                        _many_portable(weights, scales, x, row, token, features - 1, tokens - 1, steps, sums)
                    else:
                        _many(weights, scales, x, row, token, features - 1, tokens - 1, steps, sums)
                    for r in range(min(2, stop - row)):
                        for t in range(min(6, tokens - token)):
                            out[token + t, row + r] = sums[6 * r + t]


def arranged(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x (T, I), filled up with zeros to whole steps, in the order in which `product` reads it for these weights.

    For 4-bit blocks, element i(c, l, j) stands at (c, j, l): what the lanes take together are neighbours.
    """
    size = step_size(weights)
    if x.shape[1] % size:
        x = np.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    if weights.dtype == np.uint8:
        x = x.reshape(len(x), -1, LANES, 8).transpose(0, 1, 3, 2)
    elif weights.dtype == np.int8:
        x = x.reshape(len(x), -1, 4, 2, 4, 4).transpose(0, 1, 5, 3, 2, 4)
    return np.ascontiguousarray(x).reshape(len(x), -1)


def step_size(weights: np.ndarray) -> int:
    """How many elements of a row one step takes."""
    return CHUNK if weights.dtype in (np.uint8, np.int8) else LANES
