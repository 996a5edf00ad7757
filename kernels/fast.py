"""The operations at the speed of memory: `NumbaOps` is `NumPyOps` at float32, with kernels that Numba compiles.

Activations are float32 and stay exact; weights are read as they are stored. `fast_linear.py` has the order of each sum:
results do not depend on the number of threads, nor on how a prompt is cut. They differ from NumPy's by rounding alone.

The first use compiles for some seconds and says so on stderr; Numba keeps the result on disk. `REFIMPL_PORTABLE=1` does
without the instructions that only some machines have: the same bits, more slowly.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import ml_dtypes
import numba
import numpy as np
from numba import types
from numba.core import event

from kernels import fast_attention, fast_linear
from kernels.ops import NumPyOps, Readable


class NumbaOps(NumPyOps):
    """Float32 operations whose matrix products read 4-bit blocks, bfloat16, float16 and float32 in place."""

    def __init__(self, portable: bool | None = None):
        super().__init__(np.float32)
        self.portable = os.environ.get("REFIMPL_PORTABLE", "") not in ("", "0") if portable is None else portable

    def linear(self, x: np.ndarray, weight: Readable, bias: Readable | None = None) -> np.ndarray:
        """x @ weight.T + bias: (..., I) by (O, I) -> (..., O). Other formats are read as NumPyOps reads them."""
        matrix = stored(weight)
        if matrix is None or x.dtype != np.float32:
            return super().linear(x, weight, bias)
        out = matrix.product(x.reshape(-1, x.shape[-1]), self.portable)
        if bias is not None:
            out += bias.read(self.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def upcast(self, x: np.ndarray) -> np.ndarray:
        """Float16 stays: here only a cache holds it, and the products below read it as float32."""
        return x if x.dtype == np.float16 else super().upcast(x)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a (B, K, R, D) @ b (B, K, D, S), where b is a transposed view of keys (B, K, S, D), float32 or float16."""
        keys = b.swapaxes(-1, -2)
        if not _attends(a, keys) or keys.shape[-1] % fast_linear.LANES:
            return super().matmul(a, b)
        keys, heads_apart = _rows(keys)
        out = np.empty((*a.shape[:-1], keys.shape[-2]), np.float32)
        return self._attention(fast_attention.scores, keys, a, out, heads_apart, fast_linear.LANES)

    def weighted_sum(self, probs: np.ndarray, value: np.ndarray) -> np.ndarray:
        """probs (B, K, R, S) @ value (B, K, S, D): float32, whatever the cache keeps."""
        width = fast_linear.LANES * fast_attention.WIDTH
        if not _attends(probs, value) or value.shape[-1] % width:
            return super().matmul(probs, value)
        value, heads_apart = _rows(value)
        out = np.empty((*probs.shape[:-1], value.shape[-1]), np.float32)
        return self._attention(fast_attention.context, value, probs, out, heads_apart, width)

    def _attention(self, function, stored, rows, out, heads_apart: int, step: int) -> np.ndarray:
        stored = stored.view(np.int16) if stored.dtype == np.float16 else stored
        rows = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
        flat = out.reshape(-1, *out.shape[-2:])
        kernel = _attention(function, stored.dtype.name)
        kernel(stored, _NO_SCALES, rows, flat, heads_apart, stored.shape[-1] // step, self.portable)
        return out


def _attends(a: np.ndarray, rows: np.ndarray) -> bool:
    return a.ndim == 4 and a.dtype == np.float32 and rows.dtype in (np.float32, np.float16) and a.size > 0


def _rows(stored: np.ndarray) -> tuple[np.ndarray, int]:
    """Keys or values (B, K, S, D) whose heads lie evenly, and how many rows one is from the next: a cache as it is."""
    item, (batch, head, row, element) = stored.itemsize, stored.strides
    width = stored.shape[-1]
    even = element == item and row == width * item and head % row == 0
    if not even or (stored.shape[0] > 1 and batch != head * stored.shape[1]):
        stored = np.ascontiguousarray(stored)
        head = stored.strides[1]
    return stored, head // (width * item)


@dataclass(frozen=True)
class Matrix:
    """A matrix (O, I) as `fast_linear.product` reads it; `divisors` (O,), if any, divide what comes out."""

    weights: np.ndarray
    scales: np.ndarray
    divisors: np.ndarray | None = None

    def product(self, x: np.ndarray, portable: bool) -> np.ndarray:
        """x (T, I) float32 times the transposed matrix: (T, O)."""
        x = fast_linear.arranged(x, self.weights)
        out = np.empty((len(x), len(self.weights)), np.float32)
        kernel = _product(self.weights.dtype.name, self.scales.dtype.name)
        kernel(self.weights, self.scales, x, out, x.shape[1] // fast_linear.step_size(self.weights), portable)
        return out if self.divisors is None else out / self.divisors


_NO_SCALES = np.zeros((1, 0), np.float32)
_STORED: WeakKeyDictionary[Any, Matrix | None] = WeakKeyDictionary()


def stored(weight: Any) -> Matrix | None:
    """The bytes behind a weight, in place where rows are made of whole steps; None if no kernel reads its format."""
    if weight not in _STORED:
        if hasattr(weight, "in_place"):
            _STORED[weight] = _dense(*weight.in_place)
        elif hasattr(weight, "blocks") and not hasattr(weight, "linear") and getattr(weight, "rounded", None) is None:
            _STORED[weight] = _blocks(weight.blocks)
        else:
            _STORED[weight] = None
    return _STORED[weight]


def _blocks(blocks) -> Matrix | None:
    """Q4_0, and symmetric INT4 along the rows in blocks of a multiple of 32: larger blocks repeat their scales."""
    if blocks.format == "q4_0":
        packed, scales = blocks.packed.view(np.int8), blocks.scales.view(np.int16)
    elif blocks.format == "int4" and blocks.axis == 1 and blocks.zero_points is None:
        if blocks.block_size % fast_linear.BLOCK:
            return None
        packed, scales = blocks.packed, blocks.scales
        if blocks.block_size > fast_linear.BLOCK:
            scales = np.repeat(scales, blocks.block_size // fast_linear.BLOCK, axis=1)
    else:
        return None
    chunks = -(-blocks.shape[1] // fast_linear.CHUNK)
    packed = _filled(packed, chunks * fast_linear.CHUNK // 2)
    return Matrix(packed, _filled(scales, chunks * fast_linear.CHUNK // fast_linear.BLOCK))


def _dense(array: np.ndarray, divisors: np.ndarray | None) -> Matrix | None:
    bits = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.float16): np.int16, np.dtype(np.float32): np.float32}
    if array.ndim != 2 or array.dtype not in bits:
        return None
    array = array.view(bits[array.dtype])
    array = _filled(array, -(-array.shape[1] // fast_linear.LANES) * fast_linear.LANES)
    return Matrix(array, _NO_SCALES, divisors)


def _filled(rows: np.ndarray, columns: int) -> np.ndarray:
    """The same array if it has so many columns, else a copy with zeros on the right."""
    return np.ascontiguousarray(
        rows if rows.shape[1] == columns else np.pad(rows, ((0, 0), (0, columns - rows.shape[1])))
    )


@cache
def _product(weights: str, scales: str):
    matrix = lambda dtype: types.Array(numba.from_dtype(np.dtype(dtype)), 2, "C", readonly=True, aligned=False)
    x, out = matrix("float32"), types.Array(types.float32, 2, "C")
    signature = types.void(matrix(weights), matrix(scales), x, out, types.intp, types.boolean)
    return compiled(fast_linear.product, signature)


@cache
def _attention(function, stored: str):
    """The kernel for keys or values of a dtype, anywhere in memory."""
    anywhere = types.Array(numba.from_dtype(np.dtype(stored)), 4, "A", readonly=True, aligned=False)
    rows, out = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.float32, 3, "C")
    return compiled(function, types.void(anywhere, rows, rows, out, types.intp, types.intp, types.boolean))


@cache
def compiled(function, signature):
    """`function` compiled for one signature, from the disk if it was before."""
    announce = Announcement(f"compiling {function.__module__}.{function.__name__} for {signature.args[0].dtype}, once")
    with event.install_listener("numba:compile", announce):
        return numba.njit([signature], parallel=True, cache=True)(function)


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
