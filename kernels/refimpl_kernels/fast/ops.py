"""The operations at the speed of memory: `NumbaOps` is `NumPyOps` at float32, with kernels that Numba compiles.

Activations are float32 and stay exact; weights are read as they are stored. `fast/linear.py` has the order of each sum:
results depend neither on the number of threads nor on how a prompt is cut. They differ from NumPy's by rounding alone.
NumPy computes whatever has no kernel (see README.md); its BLAS may give other bits with another number of threads.

The first use compiles for some seconds and says so on stderr; Numba keeps the result on disk. `REFIMPL_PORTABLE=1` uses
no instructions that only some machines have: the bits are the same, the speed is not.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from glob import escape
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
from numba import types
from numba.core import event

from refimpl_kernels import formats
from refimpl_kernels.fast import attention, integer, linear, softmax
from refimpl_kernels.fast.layout import LINE, NIBBLES, Layout, LayoutType, nested_bytes
from refimpl_kernels.fast.product import product
from refimpl_kernels.fast.rows import Packed, packed_type
from refimpl_kernels.fast.vector import LANES
from refimpl_kernels.formats import dynamic8
from refimpl_kernels.formats.q8_rows import Q8Rows
from refimpl_kernels.formats.table import Blocks
from refimpl_kernels.ops import NumPyOps, Readable


class NumbaOps(NumPyOps):
    """Float32 operations whose matrix products read blocks of 4 and 8 bits, bfloat16, float16 and float32 in place.

    `activations`: "float32" keeps them exact. "int16" and "int8" round them, block by block, for products with 4-bit
    codes (see integer.py), which is faster for many tokens; for weights of other formats they stay exact.
    """

    def __init__(self, portable: bool | None = None, activations: str = "float32"):
        super().__init__(np.float32)
        self.activation_bytes = {"float32": None, "int16": 2, "int8": 1}[activations]
        self.portable = os.environ.get("REFIMPL_PORTABLE", "") not in ("", "0") if portable is None else portable

    def linear(self, x: np.ndarray, weight: Readable, bias: Readable | None = None) -> np.ndarray:
        """x @ weight.T + bias: (..., I) by (O, I) -> (..., O). NumPy computes it if no kernel reads the weight."""
        matrix = stored(weight, self.portable)
        if matrix is None or x.dtype != np.float32 or not x.size or x.shape[-1] != weight.shape[-1]:
            return super().linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        if self.activation_bytes and integer.multiplies(matrix.packed.layout):
            out = matrix.rounded_product(rows, self.activation_bytes)
        else:
            out = matrix.product(rows)
        if bias is not None:
            out += bias.read(self.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def upcast(self, x: np.ndarray) -> np.ndarray:
        """Float16 and 8 bits, which only a cache holds, are not converted: the products below read them as float32."""
        return x if x.dtype in (np.float16, np.int8) else super().upcast(x)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a (B, K, R, D) @ b (B, K, D, S), where b is a transposed view of keys (B, K, S, D) as a cache keeps them."""
        keys = b.swapaxes(-1, -2)
        if not _attends(a, keys, a.shape[-1] == keys.shape[-1]) or keys.shape[-1] % 32:
            return super().matmul(a, b)
        return self._attention(attention.scores, keys, a, (*a.shape[:-1], keys.shape[-2]))

    def weighted_sum(self, probs: np.ndarray, value: np.ndarray) -> np.ndarray:
        """probs (B, K, R, S) @ value (B, K, S, D): float32, whatever the cache keeps."""
        if not _attends(probs, value, probs.shape[-1] == value.shape[-2]) or value.shape[-1] % attention.COLUMNS:
            return super().matmul(probs, value)
        return self._attention(attention.context, value, probs, (*probs.shape[:-1], value.shape[-1]))

    def softmax(self, x: np.ndarray) -> np.ndarray:
        """The softmax over the last axis."""
        if x.dtype != np.float32 or not x.size:
            return super().softmax(x)
        rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
        out = np.empty_like(rows)
        _softmax(many=x.size > MANY)(rows, out)
        return out.reshape(x.shape)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """1 / (1 + exp(-x))."""
        if x.dtype != np.float32 or not x.size or x.shape[-1] % LANES:
            return super().sigmoid(x)
        numbers = np.ascontiguousarray(x).reshape(-1)
        out = np.empty_like(numbers)
        _sigmoid(many=x.size > MANY)(numbers, out)
        return out.reshape(x.shape)

    def mean(self, x: np.ndarray) -> np.ndarray:
        """The mean over the last axis, which is kept with length 1: the sum of x.mean, without its checks."""
        return np.add.reduce(x, -1, keepdims=True) / np.float32(x.shape[-1])

    def split(self, x: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """The last axis cut into pieces of these sizes: slices, without the checks of np.split."""
        ends = accumulate(sizes)
        return [x[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def _attention(self, function, kept: Any, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        kernel, layout = _attention(function, kept.dtype, self.portable)
        (codes, scales), heads_apart = _evenly(kept)
        rows = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
        out = np.empty(shape, np.float32)
        kernel(layout, codes, scales, rows, out.reshape(-1, *shape[2:]), heads_apart)
        return out


def _attends(a: np.ndarray, kept: Any, fit: bool) -> bool:
    """Whether a kernel multiplies `a` by what a cache keeps. Checked here, because kernels do not check shapes."""
    shapes = a.ndim == kept.ndim == 4 and a.shape[:2] == kept.shape[:2] and fit and min(*a.shape, *kept.shape) > 0
    return shapes and a.dtype == np.float32 and (kept.dtype in (np.float32, np.float16) or isinstance(kept, Q8Rows))


def _evenly(kept: Any) -> tuple[list[np.ndarray], int]:
    """The bytes of keys or values (B, K, S, D) and of their scales, and how many rows lie from one head to the next.

    If the heads lie evenly in the cache, the bytes are the cache's own, else those of a copy.
    """
    parts = [kept.codes, kept.scales] if isinstance(kept, Q8Rows) else [kept]
    apart = [_rows_apart(part) for part in parts]
    if not apart[0] or apart[0] != apart[-1]:
        parts, apart = [np.ascontiguousarray(part) for part in parts], [kept.shape[2]]
    return [*(part.view(np.uint8) for part in parts), _NO_SCALES][:2], apart[0]


def _rows_apart(array: np.ndarray) -> int:
    """How many rows of an array (B, K, S, D) lie from one head to the next; 0 if heads do not lie evenly."""
    (heads, _, width), item = array.shape[1:], array.itemsize
    batch, head, row, element = array.strides
    even = element == item and row == width * item and head % row == 0
    return head // row if even and (len(array) == 1 or batch == head * heads) else 0


@dataclass(frozen=True)
class Matrix:
    """A matrix (O, I) that kernels multiply by; `divisors` (O,), if there are any, divide the result."""

    packed: Packed
    divisors: np.ndarray | None = None

    def product(self, x: np.ndarray) -> np.ndarray:
        """x (T, I) float32 times the transposed matrix: (T, O)."""
        layout, codes, *_ = self.packed
        out = np.empty((len(x), len(codes)), np.float32)
        self._kernel(self.packed, linear.chunked(x, layout, codes.shape[1] // LINE), out)
        return out if self.divisors is None else np.divide(out, self.divisors, out=out)

    def rounded_product(self, x: np.ndarray, size: int) -> np.ndarray:
        """The same product, with activations rounded to integers of `size` bytes."""
        layout, codes, *_ = self.packed
        blocks, out = codes.shape[1] // LINE * integer.LINE_BLOCKS, np.empty((len(x), len(codes)), np.float32)
        rounded = integer.Integers(
            np.empty((blocks, len(x), size, integer.BLOCK), np.int8), np.empty((blocks, len(x), 2), np.float32)
        )
        fill, order = _fill(many=len(x) > 1), integer.ORDER[layout.codes]
        fill(np.ascontiguousarray(x), order, np.float32(integer.LARGEST[size]), rounded)
        _product(layout, integer.INTEGERS)(self.packed, rounded, out)
        return out

    @cached_property
    def _kernel(self):
        return _product(self.packed.layout, types.Array(types.float32, 3, "C", readonly=True))


MANY = 1 << 18  # numbers; for fewer, one thread takes less time (0.05 ms) than waking the others does

_NOTHING = np.zeros((1, 0), np.uint8)
_NO_SCALES = np.zeros((1, 1, 1, 0), np.uint8)
_STORED: WeakKeyDictionary[Any, dict[bool, Matrix | None]] = WeakKeyDictionary()


def stored(weight: Any, portable: bool = False) -> Matrix | None:
    """The bytes of a weight, in place if its rows are whole lines, else a copy; None if no kernel reads its format."""
    found = _STORED.setdefault(weight, {})
    if portable not in found:
        matrix = None
        if hasattr(weight, "in_place"):
            matrix = _dense(*weight.in_place)
        elif hasattr(weight, "blocks") and not hasattr(weight, "linear"):
            matrix = _blocks(weight.blocks, getattr(weight, "rounded", None))
        if matrix:
            layout = replace(matrix.packed.layout, portable=portable)
            matrix = replace(matrix, packed=matrix.packed._replace(layout=layout))
        found[portable] = matrix
    return found[portable]


def _dense(array: np.ndarray, divisors: np.ndarray | None) -> Matrix | None:
    if array.ndim != 2 or array.dtype.name not in ("float32", "float16", "bfloat16"):
        return None
    return Matrix(Packed(Layout(array.dtype.name), _lines(array), _NOTHING, _NOTHING), divisors)


# How a layout names the codes of formats/table.py.
_CODES = {"lpbq": "int4", "qlinear4": "int4", "q8_0": "int8", "qlinear8": "int8"} | {name: name for name in NIBBLES}


def _blocks(blocks: Blocks, rounded: np.dtype | None) -> Matrix | None:
    """Blocks as `Layout` needs them; None if a block runs on from row to row, or divides the numbers of a lane.

    A block that does not divide a line is taken as several that do, with the same scale.
    """
    (rows, columns), size, extra = blocks.shape, blocks.block_size, dict(blocks.extra)
    if blocks.format not in _CODES or blocks.axis == 0 or (blocks.axis is None and columns % size):
        return None
    scales, zeros, mins = blocks.scales, blocks.zero_points, extra.pop("mins", None)
    if "nested_scales" in extra:
        nested = {name: extra.pop(name) for name in formats.NESTED if name in extra}
        scales = dynamic8.unnest(scales, np.arange(len(scales)), **nested)
    if "block_scales" in extra:
        scales = (extra.pop("block_scales") * scales).astype(np.float32)
    if zeros is not None:
        zeros = (zeros.astype(np.int16) - 8 * (blocks.format == "matmulnbits")).astype(np.int8)
    kinds = [None if part is None else part.dtype.name for part in (scales, mins)]
    if blocks.format == "q4_k":
        scales = nested_bytes(scales, extra.pop("sub_scales"))
        mins = nested_bytes(-extra.pop("dmins"), extra.pop("sub_mins"))
        size, kinds = 32, ["nested", "nested"]
    if extra:  # it has a table of values of its own
        return None
    layout = Layout(_CODES[blocks.format], kinds[0], None if zeros is None else "int8", kinds[1])
    narrow = None if rounded is None or rounded == np.float32 else rounded.name
    layout = replace(layout, block=math.gcd(size, layout.line), rounded=narrow)
    if layout.block % (layout.line // LANES):
        return None
    codes = _lines(blocks.packed.reshape(rows, -1))
    lines = codes.shape[1] // LINE

    def of_lines(part: np.ndarray | None, nbytes: int) -> np.ndarray:
        if part is None:
            return _NOTHING
        part = part.reshape(rows, -1)
        return _lines(np.repeat(part, size // layout.block, axis=1) if size != layout.block else part, lines * nbytes)

    third = mins if zeros is None else zeros
    return Matrix(Packed(layout, codes, of_lines(scales, layout.sizes[1]), of_lines(third, layout.sizes[2])))


def _lines(array: np.ndarray, length: int = LINE) -> np.ndarray:
    """The bytes of rows (O, …), in place if they are a multiple of `length`, else a copy with zeros on the right."""
    rows = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % length))) if rows.shape[1] % length else rows


@cache
def _product(layout: Layout, x: types.Type):
    return compiled(product, types.void(packed_type(layout), x, types.Array(types.float32, 2, "C")))


@cache
def _fill(many: bool):
    x, order = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.int64, 1, "C")
    function = integer.fill if many else integer.fill_one
    return compiled(function, types.void(x, order, types.float32, integer.INTEGERS), parallel=many)


@cache
def _attention(function, kept: np.dtype, portable: bool):
    """The kernel for keys or values of a dtype, anywhere in memory, and its layout."""
    layout = Layout(kept.name, "float16" if kept == np.int8 else None, portable=portable)
    part = types.Array(types.uint8, 4, "A", readonly=True, aligned=False)
    rows, out = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.float32, 3, "C")
    return compiled(function, types.void(LayoutType(layout), part, part, rows, out, types.intp)), layout


@cache
def _softmax(many: bool):
    rows = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.float32, 2, "C")
    return compiled(softmax.softmax, types.void(*rows), parallel=many)


@cache
def _sigmoid(many: bool):
    x, out = types.Array(types.float32, 1, "C", readonly=True), types.Array(types.float32, 1, "C")
    return compiled(softmax.sigmoid, types.void(x, out), parallel=many)


# Numba compiles a function anew when the function's own file changes. Instructions come from all files of the package.
SOURCES = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))).hexdigest()[
    :16
]


@cache
def compiled(function, signature, parallel: bool = True, **options):
    """`function` compiled by Numba for one signature with `options`, or loaded from the disk for the same sources."""
    kind = "parallel" if parallel else "serial"  # on the disk, Numba does not keep these apart
    function.__qualname__ = f"{function.__name__}_{kind}_{SOURCES}"  # its name on the disk
    known = signature.args[0].types[0] if isinstance(signature.args[0], types.NamedTuple) else signature.args[0]
    what = f"{function.__module__}.{function.__name__}" + f" for {known}" * (not isinstance(known, types.Array))
    announce = Announcement(f"compiling {what}, once")
    dispatcher = numba.njit(parallel=parallel, cache=True, **options)(function)
    with event.install_listener("numba:compile", announce):
        try:
            dispatcher.compile(signature)
        except Exception:  # whatever a damaged file on the disk leads to
            for file in Path(dispatcher.stats.cache_path).glob(f"*.{escape(function.__qualname__)}-*.nb[ic]"):
                file.unlink(missing_ok=True)
            dispatcher.compile(signature)
    _COMPILED.append(dispatcher)  # else Numba frees the compiled code
    # There is one signature, so the dispatcher need not look at types, which takes 20 µs a call.
    only: Any = dispatcher.overloads[signature.args]
    return only.entry_point


_COMPILED: list[Any] = []


class Announcement(event.Listener):
    """Says on stderr that Numba is compiling, which takes seconds the first time; once, when it starts."""

    def __init__(self, text: str):
        self.text: str | None = text

    def on_start(self, event):
        if self.text:
            print(f"refimpl: {self.text}", file=sys.stderr, flush=True)
            self.text = None

    def on_end(self, event):
        pass
