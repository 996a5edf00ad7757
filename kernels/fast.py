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

from kernels import fast_linear
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
