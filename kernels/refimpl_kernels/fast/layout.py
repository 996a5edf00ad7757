"""How rows of numbers lie in memory, and how 16 lanes read them. Kernels are compiled for a layout.

A row is cut into lines of 64 bytes. A line is loaded at once, as 32 bits for each of 16 lanes, and taken apart into
vectors of 16 floats. Activations are laid out to match (`Layout.arranged`), so that no number has to change lanes:

    codes                         a line has      lane l of vector j is
    int4 lpbq matmulnbits         128 numbers     number 8 l + j                                        j = 0 … 7
    nf4 fp4                       128 numbers     number 8 l + j, the first of two in the high bits     j = 0 … 7
    q4_0 q4_1                     128 numbers     number 32 (l // 4) + 4 (l % 4) + 16 (j // 4) + j % 4
    q4_k                          128 numbers     number 64 (l // 8) + 4 (l % 8) + 32 (j // 4) + j % 4
    int8                           64 numbers     number 4 l + j                                        j = 0 … 3
    bfloat16 float16               32 numbers     number 16 j + l                                       j = 0, 1
    float32                        16 numbers     number l

    value = float32((number of the code - zero point) * scale)            as formats/table.py dequantizes
    value = float32(float32(number of the code * scale) + minimum)        for q4_1 and q4_k, to the bit

Each block of neighbours may have a scale, and a zero point or a minimum, in arrays of their own. A block divides a
line, and a lane's numbers belong to one block, so a block has 8 to 128 numbers of 4 bits. Q4_K's scales and minima are
"nested": each line has a float16 number and, for each of its four blocks, a uint8 that multiplies it; 6 bytes.

    codes     row 0: 64 bytes | 64 bytes | …        row 1: …           scales    row 0: s0 s1 s2 s3 | …    row 1: …
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload_attribute

from refimpl_kernels.fast.vector import F32, I8, I16, INTS, LANES, Emitter, without_bytes
from refimpl_kernels.formats import fp4, nf4

LINE = 64  # bytes
# The numbers that the codes of four bits stand for.
NIBBLES = {
    "int4": [float(n - 16 * (n > 7)) for n in range(16)],
    "q4_0": [float(n - 8) for n in range(16)],
    "q4_1": [float(n) for n in range(16)],
    "q4_k": [float(n) for n in range(16)],
    "matmulnbits": [float(n - 8) for n in range(16)],  # `ops._blocks` takes 8 from its zero points, too
    "nf4": nf4.VALUES.tolist(),
    "fp4": fp4.VALUES.tolist(),
}
BITS = {**dict.fromkeys(NIBBLES, 4), "int8": 8, "bfloat16": 16, "float16": 16, "float32": 32, "nested": 12}
# In these formats the low four bits of so many bytes come first, then their high ones. In all others the two numbers of
# a byte are neighbours.
HALVES = {"q4_0": 16, "q4_1": 16, "q4_k": 32}


@dataclass(frozen=True)
class Layout:
    """How the numbers of a row are stored: `codes`, a key of BITS, and the dtypes of each block's scale and zero point.

    `mins`: the dtype of minima, in place of zero points. `block`: numbers of a block. `rounded`: "float16" or
    "bfloat16" if each value is rounded to that once more. `portable`: without instructions that only some machines
    have.
    """

    codes: str
    scales: str | None = None
    zeros: str | None = None
    mins: str | None = None
    block: int = 32
    rounded: str | None = None
    portable: bool = False

    def __str__(self) -> str:
        """In words, for the message while a kernel is compiled."""
        extras = [f"{self.scales} scales"] * bool(self.scales)
        extras += ["zero points"] * bool(self.zeros) + ["minima"] * bool(self.mins)
        return " with ".join([self.codes, " and ".join(extras)][: 1 + bool(extras)])

    @property
    def line(self) -> int:
        """How many numbers 64 bytes hold."""
        return 8 * LINE // BITS[self.codes]

    @property
    def scaled(self) -> bool:
        """Whether the sum of a lane's products in a line is multiplied by a scale: see `values`."""
        return self.scales is not None and self.rounded is None and self.mins is None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The bytes of a line: of codes, of their scales, of their zero points or minima."""
        bits = (BITS[dtype] if dtype else 0 for dtype in (self.scales, self.zeros or self.mins))
        return LINE, *(self.line // self.block * each // 8 for each in bits)  # type: ignore[return-value]

    def arranged(self, x: np.ndarray) -> np.ndarray:
        """x (T, lines * line) in the order in which the lanes take it: a view (T, lines, …)."""
        lines = (len(x), -1)
        if half := HALVES.get(self.codes):  # run, half, word, number -> half, number, run, word
            return x.reshape(*lines, self.line // half // 2, 2, half // 4, 4).transpose(0, 1, 3, 5, 2, 4)
        if BITS[self.codes] < 16:
            return x.reshape(*lines, LANES, self.line // LANES).transpose(0, 1, 3, 2)
        return x.reshape(*lines, self.line)

    def values(
        self, emit: Emitter, line: ir.Value, scales: ir.Value, zeros: ir.Value
    ) -> tuple[list[ir.Value], ir.Value | None]:
        """The vectors of a line, and a vector of scales if their sums are still to be multiplied by scales.

        `line`, `scales` and `zeros` (or minima) are addresses. A lane has numbers of one block, so its scale can wait
        until they are summed, unless each value has a minimum or is rounded.
        """
        b, values = emit.builder, self._numbers(emit, line)
        if self.zeros:
            values = [b.fsub(*pair) for pair in zip(values, self._of_blocks(emit, self.zeros, zeros), strict=True)]
        if not self.scales:
            return values, None
        factors = self._of_blocks(emit, self.scales, scales)
        if self.scaled:
            return values, factors[0]
        values = [b.fmul(*pair) for pair in zip(values, factors, strict=True)]
        if self.mins:
            values = [b.fadd(*pair) for pair in zip(values, self._of_blocks(emit, self.mins, zeros), strict=True)]
        return [emit.rounded(value, self.rounded) for value in values] if self.rounded else values, None

    def _of_blocks(self, emit: Emitter, dtype: str, pointer: ir.Value) -> list[ir.Value]:
        """One number for each block of a line, from memory, spread over the lanes of each vector."""
        blocks, vectors = self.line // self.block, range(self.line // LANES)
        if dtype == "nested":
            number = load_floats(emit, "float16", 1, pointer)
            times = load_floats(emit, "uint8", blocks, emit.forward(pointer, 2))
            found = emit.builder.fmul(emit.shuffle(number, number, [0] * blocks), times)
        else:
            found = load_floats(emit, dtype, blocks, pointer)
        if half := HALVES.get(self.codes):
            firsts = [[2 * half * (lane // (half // 4)) + half * (j // 4) for lane in range(LANES)] for j in vectors]
        else:
            firsts = [[self.line // LANES * lane for lane in range(LANES)]] * len(vectors)
        return [emit.shuffle(found, found, [first // self.block for first in lanes]) for lanes in firsts]

    def _numbers(self, emit: Emitter, line: ir.Value) -> list[ir.Value]:
        count = self.line // LANES
        if BITS[self.codes] >= 16:
            size = LINE // count
            return [load_floats(emit, self.codes, LANES, emit.forward(line, n * size)) for n in range(count)]
        words = emit.load(INTS, line)
        if self.codes == "int8":
            return [emit.byte(words, n) for n in range(count)]
        if self.codes in HALVES:
            bits = [8 * (j % 4) + 4 * (j // 4) for j in range(count)]
        else:
            bits = [4 * (j ^ (self.codes in ("nf4", "fp4"))) for j in range(count)]
        return [emit.nibble(words, bit, NIBBLES[self.codes]) for bit in bits]


def load_floats(emit: Emitter, dtype: str, count: int, pointer: ir.Value) -> ir.Value:
    """`count` numbers of a dtype from memory, as float32."""
    kind = {"float32": F32, "float16": I16, "bfloat16": I16, "int8": I8, "uint8": I8}[dtype]
    loaded = emit.load(ir.VectorType(kind, count), pointer)
    if kind == I8:
        convert = emit.builder.sitofp if dtype == "int8" else emit.builder.uitofp
        return convert(loaded, ir.VectorType(F32, count))
    return loaded if dtype == "float32" else emit.half(loaded) if dtype == "float16" else emit.bfloat(loaded)


def nested_bytes(numbers: np.ndarray, times: np.ndarray) -> np.ndarray:
    """float16 (O, blocks of 256) and their multiples (O, blocks of 32) as "nested" bytes (O, 6 a line)."""
    halves = np.repeat(numbers, 2, axis=1)[..., None].view(np.uint8)
    return np.concatenate([halves, times.reshape(*halves.shape[:2], 4)], axis=-1).reshape(len(numbers), -1)


@without_bytes
class LayoutType(types.Type):
    """A layout as Numba's type: kernels are compiled for each layout, and its values have no bytes."""

    def __init__(self, layout: Layout):
        self.layout = layout
        super().__init__(name=repr(layout))

    def __str__(self) -> str:
        return str(self.layout)


@overload_attribute(LayoutType, "line")
def _line(layout):
    """`layout.line` inside a kernel: a constant."""
    line = layout.layout.line
    return lambda layout: line
