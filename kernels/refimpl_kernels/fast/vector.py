"""Vectors of 16 lanes inside Numba functions: LLVM instructions without a C compiler.

Numba turns scalar loops into vectors only where it can prove that no result changes, which excludes floating-point
sums. So here the lanes are written down, and with them the order of every sum. An `Emitter` adds LLVM instructions to a
function that Numba is compiling. A kernel is a Python function that runs once, at compile time, so its Python loops are
unrolled.

Plain LLVM vector arithmetic compiles for every machine. With AVX-512, `nibble`, `half`, `rounded` and `dot4` take one
instruction instead of several. Both ways give the same bits (`rounded`: up to float16's overflow), and `portable=True`
forces the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, models, register_model, unbox

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
# Pairs of shuffles, each of which picks a vector from the lanes of two vectors, 0 … 15 and 16 … 31. `totals` and
# `transposed` use them.
_HALVES = [[n + 16 * v + side for v in (0, 1) for n in range(8)] for side in (0, 8)]
_QUARTERS = [[n + 16 * v + q + side for v in (0, 1) for q in (0, 8) for n in range(4)] for side in (0, 4)]
_PAIRS = [[n + 16 * v + q + side for q in (0, 4, 8, 12) for v in (0, 1) for n in (0, 1)] for side in (0, 2)]
_SINGLES = [[n + 16 * v + q + side for q in (0, 4, 8, 12) for v in (0, 1) for n in (0, 2)] for side in (0, 1)]
_NEIGHBOURS = [[n + 16 * v + q + side for q in (0, 4, 8, 12) for n in (0, 1) for v in (0, 1)] for side in (0, 2)]
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class Emitter:
    """Adds instructions to the function that `builder` is in. A pointer is an `i8*`; offsets are bytes."""

    def __init__(self, context: Any, builder: ir.IRBuilder, portable: bool):
        self.context, self.builder = context, builder
        # The features that Numba compiles for. NUMBA_CPU_NAME may leave out some that this machine has.
        features = context.codegen().magic_tuple()[2].split(",")
        self.avx512 = not portable and "+avx512f" in features
        self.vnni = self.avx512 and "+avx512vnni" in features

    def address(self, array_type: types.Array, array: ir.Value, element: ir.Value) -> ir.Value:
        """The address of an element of a C-contiguous array, counted as if the array were flat."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        size = self.context.get_abi_sizeof(self.context.get_data_type(array_type.dtype))
        return self.forward(self.builder.bitcast(data, I8.as_pointer()), self.times(element, size))

    def shape(self, array_type: types.Array, array: ir.Value) -> list[ir.Value]:
        """The sizes of an array."""
        return cgutils.unpack_tuple(
            self.builder, self.context.make_array(array_type)(self.context, self.builder, array).shape
        )

    def forward(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """The pointer moved by `offset` bytes."""
        return self.builder.gep(pointer, [ir.Constant(I64, offset) if isinstance(offset, int) else offset])

    def times(self, number: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(number, ir.Constant(number.type, factor))

    def load(self, kind: ir.Type, pointer: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """A scalar or vector from memory, aligned or not."""
        value = self.builder.load(self.builder.bitcast(self.forward(pointer, offset), kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: ir.Value, pointer: ir.Value, offset: ir.Value | int = 0) -> None:
        target = self.builder.bitcast(self.forward(pointer, offset), value.type.as_pointer())
        self.builder.store(value, target).align = 1

    def prefetch(self, pointer: ir.Value, offset: ir.Value | int) -> None:
        """Asks for the cache line there. The address need not be valid."""
        read, keep, data = (ir.Constant(I32, n) for n in (0, 3, 1))
        place = self.forward(pointer, offset)
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(prefetch, [place, read, keep, data])

    def variable(self, value: ir.Value) -> Variable:
        """A variable that LLVM keeps in a register."""
        return Variable(self.builder, value)

    @contextmanager
    def loop(self, count: ir.Value):
        """A loop whose index runs from 0 to below `count`."""
        with cgutils.for_range(self.builder, count, intp=count.type) as loop:
            yield loop.index

    @contextmanager
    def pieces(self, count: ir.Value, size: int):
        """A loop that cuts `count` into pieces of `size`: gives where each begins, and how many are in it."""
        whole = ir.Constant(count.type, size)
        pieces = self.builder.udiv(self.builder.add(count, ir.Constant(count.type, size - 1)), whole)
        with self.loop(pieces) as piece:
            first = self.times(piece, size)
            left = self.builder.sub(count, first)
            yield first, self.builder.select(self.builder.icmp_signed("<", left, whole), left, whole)

    def floats(self, value: float) -> ir.Value:
        """The same number in each lane."""
        return ir.Constant(FLOATS, [value] * LANES)

    def ints(self, value: int, lanes: int = LANES) -> ir.Value:
        return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)

    def spread(self, values: ir.Value) -> ir.Value:
        """A scalar in all lanes, or each of n values in 16/n neighbouring lanes."""
        if not isinstance(values.type, ir.VectorType):
            one = ir.Constant(ir.VectorType(values.type, 1), ir.Undefined)
            values = self.builder.insert_element(one, values, ir.Constant(I32, 0))
        mask = [lane * values.type.count // LANES for lane in range(LANES)]
        undefined = ir.Constant(values.type, ir.Undefined)
        return self.builder.shuffle_vector(values, undefined, ir.Constant(INTS, mask))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c in each lane, rounded once."""
        return self._call("llvm.fma.v16f32", FLOATS, a, b, c)

    def totals(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """The sum of each vector's lanes: of 16 vectors as the lanes of one vector, of 4 vectors as its quarters.

        Each sum is lane l + lane l+8, of those l + l+4, then l + l+2, then l + l+1. Several vectors are folded
        together.
        """
        fold, step = self._folded, len(vectors) // 4
        groups = [vectors[first::step] for first in range(step)]
        fours = [fold(fold(a, b, _HALVES), fold(c, d, _HALVES), _QUARTERS) for a, b, c, d in groups]
        return fold(fold(fours[0], fours[step // 3], _PAIRS), fold(fours[step // 2], fours[-1], _PAIRS), _SINGLES)

    def _folded(self, a: ir.Value, b: ir.Value, masks: Sequence[Sequence[int]]) -> ir.Value:
        """Some lanes of two vectors plus the others."""
        one, other = (self.shuffle(a, b, mask) for mask in masks)
        return self.builder.fadd(one, other)

    def shuffle(self, a: ir.Value, b: ir.Value, mask: Sequence[int]) -> ir.Value:
        """Some lanes of two vectors, counted through both."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(mask)), list(mask)))

    def transposed(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """16 vectors: lane r of vector c is lane c of `rows[r]`. It takes 64 shuffles of two vectors each."""
        fours = []
        for a, b, c, d in (rows[first : first + 4] for first in range(0, LANES, 4)):
            ab, cd = ([self.shuffle(*pair, mask) for mask in _NEIGHBOURS] for pair in ((a, b), (c, d)))
            fours.append([self.shuffle(*pair, mask) for pair in zip(ab, cd, strict=True) for mask in _PAIRS])
        # Quarter q of fours[g][c] now has column 4 q + c of the rows 4 g … 4 g + 3.
        columns = [self.quarters([four[c] for four in fours]) for c in range(4)]
        return [columns[c][q] for q in range(4) for c in range(4)]

    def quarters(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """4 vectors: quarter g of vector q is quarter q of `vectors[g]`."""
        a, b, c, d = vectors
        halves = [(self.shuffle(a, b, mask), self.shuffle(c, d, mask)) for mask in _HALVES]
        return [self.shuffle(*pair, mask) for pair in halves for mask in _QUARTERS]

    def joined(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Vectors of one length, one after the other; their number is a power of two."""
        while len(vectors) > 1:
            size = range(2 * vectors[0].type.count)
            vectors = [self.shuffle(a, b, size) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def dot4(self, total: ir.Value, codes: ir.Value, numbers: ir.Value) -> ir.Value:
        """In each lane, `total` plus four products of integers: `codes` (bytes 0 … 255) by `numbers` (-128 … 127)."""
        if self.vnni:
            return self._call("llvm.x86.avx512.vpdpbusd.512", INTS, total, codes, numbers)
        for n in range(4):
            code = self.builder.and_(self.builder.lshr(codes, self.ints(8 * n)), self.ints(255))
            number = self.builder.ashr(self.builder.shl(numbers, self.ints(24 - 8 * n)), self.ints(24))
            total = self.builder.add(total, self.builder.mul(code, number))
        return total

    def nibble(self, words: ir.Value, bit: int, values: Sequence[float]) -> ir.Value:
        """`values[n]` as float32 in each lane, where n is the number in its four bits from `bit` on.

        With AVX-512 there are two ways to make values that are consecutive whole numbers, which keep different units of
        a core busy. The permutation is shorter where it needs no shift, and where the other way needs one, too.
        """
        permuted = self.avx512 and not 0 < bit <= 16
        if not permuted and all(value - values[0] == n for n, value in enumerate(values)):
            return self._counted(words, bit, flip=0, lowest=values[0])
        if not permuted and list(values) == [*range(8), *range(-8, 0)]:
            # Two's complement: with the upper bit flipped, the codes stand for consecutive numbers.
            return self._counted(words, bit, flip=8, lowest=-8.0)
        if self.avx512:  # the permutation looks at the low four bits of each lane
            shifted = self.builder.lshr(words, self.ints(bit)) if bit else words
            return self._call("llvm.x86.avx512.permvar.sf.512", FLOATS, ir.Constant(FLOATS, list(values)), shifted)
        chosen = [self.floats(value) for value in values]
        for n in range(4):
            odd = self.builder.icmp_unsigned("!=", self.builder.and_(words, self.ints(1 << bit + n)), self.ints(0))
            chosen = [self.builder.select(odd, b, a) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
        return chosen[0]

    def _counted(self, words: ir.Value, bit: int, flip: int, lowest: float) -> ir.Value:
        """n + lowest, for n in four bits, without a conversion: the bits are put where a float counts in ones.

        In the float 2^(23 - bit), bit `bit` stands for 1. With n in the bits from there on, and zeros below, the float
        is 2^(23 - bit) + n.
        """
        if bit > 16:
            words, bit = self.builder.lshr(words, self.ints(12)), bit - 12
        one = (127 + 23 - bit) << 23
        merged = self.builder.xor(self.builder.and_(words, self.ints(15 << bit)), self.ints(one | flip << bit))
        return self.builder.fsub(self.builder.bitcast(merged, FLOATS), self.floats(2.0 ** (23 - bit) - lowest))

    def byte(self, words: ir.Value, n: int) -> ir.Value:
        """The signed number in byte `n` of each lane, as float32."""
        up = self.builder.shl(words, self.ints(24 - 8 * n)) if n < 3 else words
        return self.builder.sitofp(self.builder.ashr(up, self.ints(24)), FLOATS)

    def bfloat(self, bits: ir.Value) -> ir.Value:
        """bfloat16 bits (<n x i16>) as float32: they are its upper half."""
        wide = ir.VectorType(I32, bits.type.count)
        shifted = self.builder.shl(self.builder.zext(bits, wide), self.ints(16, bits.type.count))
        return self.builder.bitcast(shifted, ir.VectorType(F32, bits.type.count))

    def half(self, bits: ir.Value) -> ir.Value:
        """float16 bits (<n x i16>) as float32, exactly; subnormal numbers, infinities and NaN too."""
        count, b = bits.type.count, self.builder
        ints, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
        if self.avx512:
            return b.fpext(b.bitcast(bits, ir.VectorType(F16, count)), floats)
        wide = b.zext(bits, ints)
        magnitude = b.shl(b.and_(wide, self.ints(0x7FFF, count)), self.ints(13, count))
        # Read as float32, the exponent is 112 too small; infinities and NaN have the largest exponent in both formats.
        scaled = b.bitcast(b.fmul(b.bitcast(magnitude, floats), ir.Constant(floats, [2.0**112] * count)), ints)
        special = b.icmp_unsigned(">=", magnitude, self.ints(0x0F800000, count))
        magnitude = b.select(special, b.or_(magnitude, self.ints(0x7F800000, count)), scaled)
        sign = b.shl(b.and_(wide, self.ints(0x8000, count)), self.ints(16, count))
        return b.bitcast(b.or_(magnitude, sign), floats)

    def rounded(self, values: ir.Value, dtype: str) -> ir.Value:
        """Floats rounded to the nearest bfloat16 or float16, ties to even; to float16 only below its overflow."""
        b = self.builder
        if dtype == "float16" and self.avx512:
            return b.fpext(b.fptrunc(values, ir.VectorType(F16, LANES)), FLOATS)
        lost = 16 if dtype == "bfloat16" else 13  # bits at the end of a float that are rounded away
        bits = b.bitcast(values, INTS)
        odd = b.and_(b.lshr(bits, self.ints(lost)), self.ints(1))
        bits = b.add(bits, b.add(odd, self.ints((1 << lost - 1) - 1)))
        near = b.bitcast(b.and_(bits, self.ints(-1 << lost)), FLOATS)
        if dtype == "bfloat16":
            return near
        # Below 2^-14 float16 has steps of 2^-24, as float32 has between 1/2 and 1.
        tiny = b.fsub(b.fadd(values, self.floats(0.75)), self.floats(0.75))
        size = b.bitcast(b.and_(b.bitcast(values, INTS), self.ints(0x7FFFFFFF)), FLOATS)
        return b.select(b.fcmp_ordered("<", size, self.floats(2.0**-14)), tiny, near)

    def _call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)


class Variable:
    """A value that changes in a loop."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self._builder, self._place = builder, cgutils.alloca_once(builder, value.type)
        self.set(value)

    def get(self) -> ir.Value:
        return self._builder.load(self._place)

    def set(self, value: ir.Value) -> None:
        self._builder.store(value, self._place)


def without_bytes(kind: type[types.Type]) -> type[types.Type]:
    """Makes a type whose values have no bytes at run time, because kernels are compiled for each type separately."""
    register_model(kind)(models.OpaqueModel)
    unbox(kind)(lambda kind, value, c: NativeValue(c.context.get_dummy_value()))
    return kind
