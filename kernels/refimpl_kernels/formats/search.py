"""Better than rounding to nearest: a search for each block's scale with which the codes come closest to the weights.

The scale that just reaches the largest weight of a block wastes codes on it. `best_scales` tries others,

    scale * f,  f in `search` even steps from 0.55 to 1.15,     then twice the least-squares scale of the best codes,
    and keeps for each block the scale with the least    Σ_j importance_j * (w_j - w'_j)²

So no block gets worse than rounding to nearest. Of equals, the first is kept. `best_lines` does the same for formats
whose blocks also have a minimum.

`importance` says how much an error in each input column costs. It is the mean of x² over calibration activations: then
Σ_j importance_j * e_j² is the expected squared error that the block alone adds to an output of the layer, if columns
are uncorrelated. GPTQ uses the whole matrix whose diagonal this is; llama.cpp's imatrix has the same statistic, and
AWQ's column scaling looks for it.

**The order of every sum**: float32 numbers become float64 and are multiplied from the left to the right, importance
first. The products of a block are added one after the other, from its first weight to its last. Everything else is done
to each number alone. So `fast/search.py`, which computes many blocks at a time, gives the same bytes, as does any
machine.

How a format rounds a number is a `Rounder`. Its functions are written once: NumPy applies them to arrays, and Numba
compiles them for numbers. They are made of float32 arithmetic, NumPy's `rint`, `trunc`, `floor`, `minimum` and
`maximum`, and of `where`, `clip`, `half`, `half_up` and `reciprocal` below.

**Source**: the objective: Lin 2023, "AWQ", equation 4; llama.cpp's ggml-quants.c: make_qx_quants searches like this.

>>> importance_of(np.array([[1.0, 2.0], [1.0, -4.0]], np.float32))
array([ 1., 10.], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FITS = 2  # least-squares fits that follow the trials
LINE_FACTORS = (0.7, 1.1)  # the least and the largest multiple of a line's span that is tried


@dataclass(frozen=True, eq=False)
class Rounder:
    """How a format rounds a weight x of a block, given a scale; each function is elementwise, in float32.

    `grid(scale, low)`: three numbers of the block: `by`, which multiplies or divides x; the zero point; the scale as
    the format stores it. `low`: the lowest weight, which a block with a zero point has to reach.
    `level(x, by, zero)`: the code minus the zero point; the weight becomes level * scale. `dtype`: the codes' dtype.
    `values`, `code`: for a format with a table. A level is one of the 16 `values`; `code(x, by, zero)` is its index.
    """

    name: str
    grid: Callable[..., Any]
    level: Callable[..., Any]
    dtype: str = "uint8"
    values: np.ndarray | None = None
    code: Callable[..., Any] | None = None

    def codes(self, x: np.ndarray, by: Any, zero: Any) -> np.ndarray:
        """The codes of blocks."""
        found = self.code(x, by, zero) if self.code else self.level(x, by, zero) + zero
        return np.ascontiguousarray(found.astype(self.dtype))


class Rounded(NamedTuple):
    """What a search found for blocks (n, b).

    `codes` (n, b), the others (n, 1). `lows`: the zero point as a float32, or the minimum of the line. `which`: the
    number of the best trial; the fits at the end count on after the trials.
    """

    codes: np.ndarray
    scales: np.ndarray
    lows: np.ndarray
    which: np.ndarray


def trials(first: np.ndarray, search: int, least: float = 0.55, most: float = 1.15) -> np.ndarray:
    """(1 + search, n): the scales (n, 1) of blocks, then these scales times each of `search` factors."""
    factors = np.linspace(least, most, search).astype(np.float32)
    return np.concatenate([first.reshape(1, -1), factors[:, None] * first.reshape(1, -1)])


def best_scales(
    x: np.ndarray,
    scales: np.ndarray,
    rounder: Rounder,
    importance: np.ndarray | None = None,
    lows: np.ndarray | None = None,
    fits: int = FITS,
) -> Rounded:
    """Blocks (n, b) rounded with the best of the `scales` (k, n) and of `fits` least-squares scales that follow them.

    A single scale starts no search: blocks are rounded to nearest with it. `lows` (n, 1): the weights that zero points
    have to reach.
    """
    best = scales[0][:, None].copy()
    which = np.zeros(best.shape, np.intp)
    low: Any = np.float32(0) if lows is None else lows
    if len(scales) > 1:
        x, importance = _columns(x), None if importance is None else _columns(importance)
        least = np.full(best.shape, np.inf)
        for number in range(len(scales) + fits):
            if number < len(scales):
                trial = scales[number][:, None]
            else:
                by, zero, unit = rounder.grid(best, low)
                level = rounder.level(x, by, zero)
                trial = fitted_scale(_sum(level, level, importance), _sum(level, x, importance), unit)
            by, zero, unit = rounder.grid(trial, low)
            error = x - rounder.level(x, by, zero) * unit
            _keep(_sum(error, error, importance), least, (best, trial), (which, number))
    by, zero, _ = rounder.grid(best, low)
    return Rounded(rounder.codes(x, by, zero), best, np.broadcast_to(zero, best.shape), which)


def best_lines(
    x: np.ndarray,
    scales: np.ndarray,
    lows: np.ndarray,
    importance: np.ndarray | None = None,
    fits: int = 0,
    highest: float = np.inf,
) -> Rounded:
    """Blocks (n, b) on the best of the lines w ≈ scale * code + low, codes 0 … 15.

    The lines have `scales` (k, n) and `lows` (k or 1, n). If `fits` is not 0, each line but the first is replaced by
    the least-squares line of its codes, whose low is at most `highest`. Afterwards the best line so far is fitted
    again, `fits` times.
    """
    lows = np.broadcast_to(lows, scales.shape)
    best, low = (part[0][:, None].copy() for part in (scales, lows))
    which, least = np.zeros(best.shape, np.intp), np.full(best.shape, np.inf)
    x, importance = _columns(x), None if importance is None else _columns(importance)
    ones = np.ones_like(x)
    total, sum_x = (_sum(ones, other, importance) for other in (ones, x))
    for number in range(len(scales) + fits if len(scales) + fits > 1 else 0):
        scale, bottom = (best, low) if number >= len(scales) else (scales[number][:, None], lows[number][:, None])
        if number and fits:
            q = line_code(x, reciprocal(scale), bottom)
            sum_q, sum_qq, sum_qx = (_sum(q, other, importance) for other in (ones, q, x))
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a block may have no such line
                scale, bottom = fitted_line(total, sum_x, sum_q, sum_qq, sum_qx, highest, scale, bottom)
        error = x - (line_code(x, reciprocal(scale), bottom) * scale + bottom)
        _keep(_sum(error, error, importance), least, (best, scale), (low, bottom), (which, number))
    codes = line_code(x, reciprocal(best), low)
    return Rounded(np.ascontiguousarray(codes.astype(np.uint8)), best, low, which)


def line_code(x: Any, by: Any, low: Any) -> Any:
    """The number 0 … 15 on a line from `low` in steps of 1 / `by` that is nearest to x."""
    return clip(np.rint((x - low) * by), 0, 15)


def fitted_scale(norm: Any, product: Any, scale: Any) -> Any:
    """The least-squares scale, from Σ level² (`norm`) and Σ level * x (`product`); `scale` if all levels are 0."""
    return np.float32(where(norm > 0, product / where(norm > 0, norm, 1.0), scale))


def fitted_line(
    total: Any, sum_x: Any, sum_q: Any, sum_qq: Any, sum_qx: Any, highest: Any, scale: Any, low: Any
) -> tuple[Any, Any]:
    """The least-squares line through points (q, x), from weighted sums; the given scale and low if there is none."""
    slope = (total * sum_qx - sum_q * sum_x) / (total * sum_qq - sum_q * sum_q)
    bottom = (sum_x - slope * sum_q) / total
    held = bottom > highest
    slope = where(held, (sum_qx - highest * sum_q) / sum_qq, slope)
    bottom = where(held, highest, bottom)
    usable = np.isfinite(slope) & np.isfinite(bottom) & (slope > 0)
    return np.float32(where(usable, slope, scale)), np.float32(where(usable, bottom, low))


def _keep(error: np.ndarray, least: np.ndarray, *pairs: tuple[np.ndarray, Any]) -> None:
    """Where an error is the least so far, it and the second of each pair replace what was kept."""
    better = error < least
    for kept, new in ((least, error), *pairs):
        np.copyto(kept, new, where=better)


def _sum(a: np.ndarray, b: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Σ importance * a * b of each block: (n, 1) in float64, in the order stated at the top of this file."""
    products = a.astype(np.float64)
    if importance is not None:
        products *= importance
    products *= b
    if len(products) == 1:  # numbers that are neighbours in memory NumPy would add in another order
        return np.add.accumulate(products, axis=1)[:, -1:]
    return np.add.reduce(_columns(products), axis=1, keepdims=True)


def _columns(x: np.ndarray) -> np.ndarray:
    """Blocks (n, b) laid out column by column, so that NumPy adds columns from the first to the last."""
    return np.asfortranarray(x)


def importance_of(activations: np.ndarray) -> np.ndarray:
    """What an error in each input column costs: the mean square of calibration activations (…, I) -> (I,) float32."""
    flat = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    return np.mean(flat * flat, axis=0).astype(np.float32)


def largest(x: np.ndarray) -> np.ndarray:
    """The weight of the largest magnitude of each block (n, b), with its sign: (n, 1). Of equals it is the first."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)


def ends(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest weight of each block (n, b): (n, 1) each. Of equals, as 0 and -0, it is the first."""
    low, high = (np.take_along_axis(x, found[:, None], -1) for found in (x.argmin(-1), x.argmax(-1)))
    return low, high


# The functions that rounders are made of, for arrays; fast/search.py has them for numbers. ----------------------------


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`."""
    return np.where(condition, yes, no)


def clip(x: Any, low: float, high: float) -> Any:
    """x, but not below or above the ends."""
    return np.clip(x, np.float32(low), np.float32(high))


def half(x: Any) -> Any:
    """x rounded to float16, as float32."""
    return x.astype(np.float16).astype(np.float32)


def half_up(x: Any) -> Any:
    """x rounded to the nearest of 0 … 15, halves upwards. (`floor(x + 0.5)` would turn 0.49999997 into 1.)"""
    x = clip(x, -1, 16)
    whole = np.floor(x)
    return clip(whole + np.floor(np.float32(2) * (x - whole)), 0, 15)


def reciprocal(scales: Any) -> Any:
    """1 / scale, and 0 for a scale of 0 or one so small that its reciprocal is infinite: such a block is all zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def nonzero(scales: Any) -> Any:
    """The scale, with 1 in place of 0, so that it can divide."""
    return where(scales != 0, scales, np.float32(1))
