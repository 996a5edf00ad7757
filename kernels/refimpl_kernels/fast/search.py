"""The Numba twin of `search.py`, byte for byte: the same functions, for `formats.quantize(…, backend=fast_search)`.

128 blocks are computed at a time. They are laid out so that the first weights of all of them are neighbours in memory,
then the second ones, and so on. A loop over 128 neighbours is what Numba turns into vector instructions, while the
terms of each block's sum are still added one after the other, in the order that `search.py` states.

The formats' rounders are compiled unchanged, for numbers instead of arrays. The functions that rounders are made of
stand at the end of this file.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from refimpl_kernels.fast.ops import compiled
from refimpl_kernels.fast.vector import without_bytes
from refimpl_kernels.formats import search
from refimpl_kernels.formats.search import FITS, Rounded, Rounder, fitted_line, fitted_scale, line_code, reciprocal

LANES = 128
LONGEST = 1 << 12  # weights of a block; longer ones are few, and NumPy is as fast


@without_bytes
class RounderType(types.Type):
    """A rounder as Numba's type: kernels are compiled for each rounder, and its values have no bytes."""

    def __init__(self, rounder: Rounder):
        self.rounder = rounder
        super().__init__(name=f"rounded as {rounder.name}")

    def __str__(self) -> str:
        return self.rounder.name


def best_scales(
    x: np.ndarray,
    scales: np.ndarray,
    rounder: Rounder,
    importance: np.ndarray | None = None,
    lows: np.ndarray | None = None,
    fits: int = FITS,
) -> Rounded:
    """See `search.best_scales`."""
    if x.shape[1] > LONGEST:
        return search.best_scales(x, scales, rounder, importance, lows, fits)
    arrays = [x, scales, np.zeros((1, len(x))) if lows is None else lows.T]
    return _run(_best_scales, rounder, arrays, importance, fits)


def best_lines(
    x: np.ndarray,
    scales: np.ndarray,
    lows: np.ndarray,
    importance: np.ndarray | None = None,
    fits: int = 0,
    highest: float = np.inf,
) -> Rounded:
    """See `search.best_lines`."""
    return _run(_best_lines, LINE, [x, scales, np.broadcast_to(lows, scales.shape)], importance, fits, highest)


def largest(x: np.ndarray) -> np.ndarray:
    """See `search.largest`."""
    return _found(_largest, x)[0]


def ends(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `search.ends`."""
    low, high = _found(_ends, x)
    return low, high


def _found(kernel, x: np.ndarray) -> np.ndarray:
    found, x = np.empty((2, len(x), 1), np.float32), np.ascontiguousarray(x)
    _finding(kernel)(x, x.view(np.int32), found)
    return found


@cache
def _finding(kernel):
    """The kernel `_largest` or `_ends`, compiled or loaded from the disk."""
    blocks = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.int32, 2, "C", readonly=True)
    with _LOCK:
        signature = types.void(*blocks, types.Array(types.float32, 3, "C"))
        return compiled(kernel, signature, parallel=False, nogil=True)


# `_best_lines` is compiled for this rounder but does not call it: the rounding is written out in the kernel.
LINE = Rounder("blocks with a minimum", grid=search.reciprocal, level=search.line_code)


def _run(kernel, rounder: Rounder, arrays: list[np.ndarray], importance, fits: int, *limit: float) -> Rounded:
    """Runs a kernel, and gives the arrays that it has filled."""
    x, each = arrays[0], (len(arrays[0]), 1)
    codes, *parts = np.empty(x.shape, rounder.dtype), *(np.empty(each, t) for t in (np.float32, np.float32, np.intp))
    given = [*arrays, np.empty((0, 0)) if importance is None else importance]
    given = [np.ascontiguousarray(array, np.float32) for array in given]
    outputs = [codes.view(np.uint8), *(part.reshape(-1) for part in parts)]
    _compiled(kernel, rounder, len(limit))(rounder, *given, fits, *limit, *outputs)
    return Rounded(codes, *parts)


# Kernels: line by line what search.py does, for LANES blocks at a time -----------------------------------------------


def _best_scales(rounder, x, trials, lows, costs, fits, codes, scales, zeros, which):
    count, size = x.shape
    tile, rest, weigh = _tile(size), _tile(size), _tile(costs.shape[1])
    best, trial, low, by, zero, unit = _floats(), _floats(), _floats(), _floats(), _floats(), _floats()
    error, least, norm, product, number = _doubles(), _doubles(), _doubles(), _doubles(), _doubles()
    tried = len(trials) + fits if len(trials) > 1 else 0
    for first in range(0, count, LANES):
        here = slice(first, min(first + LANES, count))
        lanes = here.stop - first
        if tried:
            _lay_out(x[here], tile)
            _lay_out(costs[here], weigh)
        least[:], number[:] = np.inf, 0
        best[:lanes], low[:lanes] = trials[0, here], lows[0, here]
        for n in range(tried):
            if n < len(trials):
                trial[:lanes] = trials[n, here]
            else:
                _grids(rounder, best, low, by, zero, unit)
                for i in range(size):
                    for lane in range(LANES):
                        rest[i, lane] = level(rounder, tile[i, lane], by[lane], zero[lane])
                _sum(rest, rest, weigh, norm)
                _sum(rest, tile, weigh, product)
                for lane in range(LANES):
                    trial[lane] = fitted_scale(norm[lane], product[lane], unit[lane])
            _grids(rounder, trial, low, by, zero, unit)
            for i in range(size):
                for lane in range(LANES):
                    rest[i, lane] = tile[i, lane] - level(rounder, tile[i, lane], by[lane], zero[lane]) * unit[lane]
            _sum(rest, rest, weigh, error)
            for lane in range(LANES):
                better = error[lane] < least[lane]
                least[lane] = error[lane] if better else least[lane]
                best[lane] = trial[lane] if better else best[lane]
                number[lane] = n if better else number[lane]
        scales[here], which[here] = best[:lanes], number[:lanes]
        for block in range(first, here.stop):
            factor, point, _ = grid(rounder, scales[block], lows[0, block])
            zeros[block] = point
            for i in range(size):
                codes[block, i] = np.int32(code(rounder, x[block, i], factor, point))


def _best_lines(rounder, x, trials, lows, costs, fits, highest, codes, scales, mins, which):
    count, size = x.shape
    tile, rest, weigh, ones = _tile(size), _tile(size), _tile(costs.shape[1]), _tile(size)
    best, lowest, trial, low, by = _floats(), _floats(), _floats(), _floats(), _floats()
    error, least, total, sum_x, number = _doubles(), _doubles(), _doubles(), _doubles(), _doubles()
    sum_q, sum_qq, sum_qx = _doubles(), _doubles(), _doubles()
    last = len(trials) + fits
    ones[:] = 1
    for first in range(0, count, LANES):
        here = slice(first, min(first + LANES, count))
        lanes = here.stop - first
        _lay_out(x[here], tile)
        _lay_out(costs[here], weigh)
        least[:], number[:] = np.inf, 0
        best[:lanes], lowest[:lanes] = trials[0, here], lows[0, here]
        if fits:
            _sum(ones, ones, weigh, total)
            _sum(ones, tile, weigh, sum_x)
        for n in range(last if last > 1 else 0):
            if n < len(trials):
                trial[:lanes], low[:lanes] = trials[n, here], lows[n, here]
            else:
                trial[:], low[:] = best, lowest
            if n and fits:
                _line_codes(tile, trial, low, by, rest)
                _sum(rest, ones, weigh, sum_q)
                _sum(rest, rest, weigh, sum_qq)
                _sum(rest, tile, weigh, sum_qx)
                for lane in range(LANES):
                    sums = total[lane], sum_x[lane], sum_q[lane], sum_qq[lane], sum_qx[lane]
                    trial[lane], low[lane] = fitted_line(*sums, highest, trial[lane], low[lane])
            _line_codes(tile, trial, low, by, rest)
            for i in range(size):
                for lane in range(LANES):
                    rest[i, lane] = tile[i, lane] - (rest[i, lane] * trial[lane] + low[lane])
            _sum(rest, rest, weigh, error)
            for lane in range(LANES):
                better = error[lane] < least[lane]
                least[lane] = error[lane] if better else least[lane]
                best[lane] = trial[lane] if better else best[lane]
                lowest[lane] = low[lane] if better else lowest[lane]
                number[lane] = n if better else number[lane]
        scales[here], mins[here], which[here] = best[:lanes], lowest[:lanes], number[:lanes]
        for block in range(first, here.stop):
            inverse, bottom = reciprocal(scales[block]), mins[block]
            for i in range(size):
                codes[block, i] = np.int32(line_code(x[block, i], inverse, bottom))


def _largest(x, bits, found):
    """Without their sign, the bits of float32 numbers have the order of the numbers' magnitudes."""
    count, size = bits.shape
    for block in range(count):
        most, first = np.int32(0), np.int32(size)
        for i in range(size):
            most = max(most, np.int32(bits[block, i] & np.int32(0x7FFFFFFF)))
        for i in range(size):  # no branch, because it could not be predicted
            here = bits[block, i] & np.int32(0x7FFFFFFF) == most
            first = min(first, np.int32(i) if here else np.int32(size))
        found[0, block, 0] = x[block, first]


def _ends(x, bits, found):
    """Bits of float32 numbers have the order of the numbers, once those of negative ones are flipped and -0 is 0."""
    count, size = bits.shape
    for block in range(count):
        low = high = _ordered(bits[block, 0])
        for i in range(size):
            number = _ordered(bits[block, i])
            low, high = min(low, number), max(high, number)
        first = last = np.int32(size)
        for i in range(size):
            number = _ordered(bits[block, i])
            first = min(first, np.int32(i) if number == low else np.int32(size))
            last = min(last, np.int32(i) if number == high else np.int32(size))
        found[0, block, 0], found[1, block, 0] = x[block, first], x[block, last]


@register_jitable
def _ordered(word):
    word = np.int32(0) if word == np.int32(-0x80000000) else word
    return np.int32(word ^ (word >> 31 & np.int32(0x7FFFFFFF)))


@register_jitable
def _tile(size):
    return np.zeros((size, LANES), np.float32)


@register_jitable
def _floats():
    return np.zeros(LANES, np.float32)


@register_jitable
def _doubles():
    return np.zeros(LANES, np.float64)


@register_jitable
def _lay_out(x, tile):
    """At most LANES blocks (n, b) as columns of a tile (b, LANES)."""
    for block in range(len(x)):
        for i in range(len(tile)):
            tile[i, block] = x[block, i]


@register_jitable
def _grids(rounder, scale, low, by, zero, unit):
    for lane in range(LANES):
        by[lane], zero[lane], unit[lane] = grid(rounder, scale[lane], low[lane])


@register_jitable
def _line_codes(tile, scale, low, by, codes):
    for lane in range(LANES):
        by[lane] = reciprocal(scale[lane])
    for i in range(len(tile)):
        for lane in range(LANES):
            codes[i, lane] = line_code(tile[i, lane], by[lane], low[lane])


@register_jitable
def _sum(a, b, weigh, total):
    """`search._sum` of each column; `weigh` has no rows where there is no importance."""
    total[:] = 0
    for i in range(len(a)):
        if len(weigh):
            for lane in range(LANES):
                total[lane] += np.float64(weigh[i, lane]) * np.float64(a[i, lane]) * np.float64(b[i, lane])
        else:
            for lane in range(LANES):
                total[lane] += np.float64(a[i, lane]) * np.float64(b[i, lane])


_LOCK = threading.Lock()  # without it, each thread would compile the same kernel


@cache
def _compiled(kernel, rounder: Rounder, limits: int):
    """A kernel compiled for a rounder, loaded from the disk if it was compiled before."""
    matrix = types.Array(types.float32, 2, "C", readonly=True)
    floats, numbers = types.Array(types.float32, 1, "C"), types.Array(types.intp, 1, "C")
    out = types.Array(types.uint8, 2, "C"), floats, floats, numbers
    signature = types.void(_type(rounder), *[matrix] * 4, types.intp, *[types.float64] * limits, *out)
    with _LOCK:
        return compiled(kernel, signature, parallel=False, nogil=True, error_model="numpy")


# The functions that rounders are made of, for numbers -----------------------------------------------------------------


@cache
def _type(rounder: Rounder) -> RounderType:
    return RounderType(rounder)


def grid(rounder, scale, low):
    """`rounder.grid` of numbers."""


def level(rounder, x, by, zero):
    """`rounder.level` of numbers."""


def code(rounder, x, by, zero):
    """The code, as a float32."""


@overload(grid)
def _grid(rounder, scale, low):
    function = numba.njit(rounder.rounder.grid)

    def of_numbers(rounder, scale, low):
        by, zero, unit = function(scale, low)
        return np.float32(by), np.float32(zero), np.float32(unit)

    return of_numbers


@overload(level)
def _level(rounder, x, by, zero):
    form = rounder.rounder
    function = numba.njit(form.level) if form.values is None else _nearest(form.values, worth=True)
    return lambda rounder, x, by, zero: function(x, by, zero)


@overload(code)
def _code(rounder, x, by, zero):
    if rounder.rounder.values is None:
        function = numba.njit(rounder.rounder.level)
        return lambda rounder, x, by, zero: function(x, by, zero) + zero
    function = _nearest(rounder.rounder.values, worth=False)
    return lambda rounder, x, by, zero: function(x, by, zero)


def _nearest(values: np.ndarray, worth: bool) -> Any:
    """A function for the nearest of the values (`worth`) or its code: a comparison with each midpoint, no branch."""
    order = np.argsort(values, kind="stable")
    middles = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    given = values[order] if worth else order.astype(np.float32)

    @numba.njit
    def nearest(x, by, zero):
        relative = search.clip(x * by, -1, 1)
        found = given[0]
        for n in range(15):
            found = given[n + 1] if relative > middles[n] else found
        return found

    return nearest


@overload(search.where)
def _where(condition, yes, no):
    return lambda condition, yes, no: yes if condition else no


@overload(search.clip)
def _clip(x, low, high):
    def clipped(x, low, high):
        x = np.float32(low) if x < np.float32(low) else x
        return np.float32(high) if x > np.float32(high) else x

    return clipped


@overload(search.reciprocal)
def _reciprocal(scales):
    def inverse(scales):
        found = np.float32(1) / scales
        return found if np.isfinite(found) else np.float32(0)

    return inverse


@overload(search.half)
def _half(x):
    """Rounds as float16 does: to 11 bits below 65520, to steps of 2^-24 below 2^-14, as float32 in 1/2 … 1."""

    def rounded(x):
        bits = np.float32(x).view(np.int32)
        near = np.int32((bits + 0xFFF + (bits >> 13 & 1)) & -8192).view(np.float32)
        tiny = (abs(x) + np.float32(0.75)) - np.float32(0.75)
        tiny = -tiny if x < 0 else tiny
        found = tiny if abs(x) < np.float32(2.0**-14) else near
        return found * np.float32(np.inf) if abs(x) >= np.float32(65520) else found

    return rounded


for _word in (search.half_up, search.nonzero, search.line_code, search.fitted_scale, search.fitted_line):
    register_jitable(_word)
