"""Vectors of 16 lanes inside Numba functions: LLVM instructions without a C compiler.

Numba turns scalar loops into vectors when it can prove that nothing changes; floating point sums it cannot. Here the
lanes, and so the order of every sum, are written down. An `Emitter` adds LLVM instructions to a function that Numba is
compiling: a kernel is a Python function that runs once, at compile time, so that its Python loops are unrolled.

Everything is plain LLVM vector arithmetic, which lowers on every machine, but for `int4_lane` and `half`: with AVX-512
they take one instruction instead of three. Both ways give the same bits, and `portable=True` forces the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class Emitter:
    """Adds instructions to the function that `builder` is in. A pointer is an `i8*`; offsets are bytes."""

    def __init__(self, context: Any, builder: ir.IRBuilder, portable: bool):
        self.context, self.builder = context, builder
        # What Numba compiles for, which NUMBA_CPU_NAME may set to less than this machine has.
        features = context.codegen().magic_tuple()[2].split(",")
        self.avx512 = not portable and "+avx512f" in features

    def address(self, array_type: types.Array, array: ir.Value, element: ir.Value) -> ir.Value:
        """Where an element of a C-contiguous array lies, counted as if it were flat."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        size = self.context.get_abi_sizeof(self.context.get_data_type(array_type.dtype))
        return self.forward(self.builder.bitcast(data, I8.as_pointer()), self.times(element, size))

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
        """Asks for the cache line there, which need not exist."""
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

    def floats(self, value: float) -> ir.Value:
        """The same number in each lane."""
        return ir.Constant(FLOATS, [value] * LANES)

    def ints(self, value: int, lanes: int = LANES) -> ir.Value:
        return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)

    def spread(self, values: ir.Value) -> ir.Value:
        """A scalar to all lanes, or n values to 16/n neighbouring lanes each."""
        if not isinstance(values.type, ir.VectorType):
            one = ir.Constant(ir.VectorType(values.type, 1), ir.Undefined)
            values = self.builder.insert_element(one, values, ir.Constant(I32, 0))
        mask = [lane * values.type.count // LANES for lane in range(LANES)]
        undefined = ir.Constant(values.type, ir.Undefined)
        return self.builder.shuffle_vector(values, undefined, ir.Constant(INTS, mask))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c in each lane, rounded once."""
        return self._call("llvm.fma.v16f32", FLOATS, a, b, c)

    def total(self, lanes: ir.Value) -> ir.Value:
        """The sum of the lanes: lane l + lane l+8, of those l + l+4, then l + l+2, then l + l+1."""
        return self._fold(lanes, self.builder.fadd)

    def _fold(self, lanes: ir.Value, join: Callable) -> ir.Value:
        undefined, half = ir.Constant(lanes.type, ir.Undefined), LANES // 2
        while half:
            moved = [(lane + half) % LANES for lane in range(LANES)]
            lanes = join(lanes, self.builder.shuffle_vector(lanes, undefined, ir.Constant(INTS, moved)))
            half //= 2
        return self.builder.extract_element(lanes, ir.Constant(I32, 0))

    def int4_lane(self, words: ir.Value, j: int, table: ir.Value) -> ir.Value:
        """The 4-bit number, two's complement, in bits 4j … 4j+3 of each lane, as float32. `table`: see `int4_table`."""
        if self.avx512:  # the permutation looks at the low four bits of each lane
            shifted = self.builder.lshr(words, self.ints(4 * j)) if j else words
            return self._call("llvm.x86.avx512.permvar.sf.512", FLOATS, table, shifted)
        high = self.builder.shl(words, self.ints(28 - 4 * j)) if j < 7 else words
        return self.builder.sitofp(self.builder.ashr(high, self.ints(28)), FLOATS)

    def int4_table(self) -> ir.Value:
        """The value of each 4-bit pattern."""
        return ir.Constant(FLOATS, [float(n - 16 * (n > 7)) for n in range(16)])

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
