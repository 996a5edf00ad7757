"""The range of each tensor on a text, in one pass and bounded memory; and the grids that a recipe makes of it.

Three ways to choose the range of a tensor:

    minmax       all that was seen: nothing is clipped
    percentile   a share of the values at either end is clipped, so that an outlier does not widen every step
    mse          the range whose expected squared error is least: clipping at its ends, step² / 12 inside

The latter two need a histogram. It has at most BINS bins, each 2^k wide. A value beyond them doubles the width, and the
counts of neighbouring bins are added. So no second pass is needed, and every count stays exact.

>>> seen = Seen()
>>> seen.add(np.array([0.5, -0.25, 0.75]))
>>> seen.add(np.array([3.0]))
>>> seen.low, seen.high, seen.count
(-0.25, 3.0, 4)
>>> seen.percentile(75.0)
(0.5, 0.75...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.grids.encodings import MASK, Encodings
from refimpl.grids.recipe import Recipe
from refimpl.names import taps
from refimpl.sweep import Pool, Result, sweep
from refimpl.trace import Tap, silent
from refimpl.windows import WINDOW, cut
from refimpl_kernels.affine import Encoding, from_range

if TYPE_CHECKING:
    from pathlib import Path

    from refimpl.forward import Forward

BINS = 4096
CHUNK = 1 << 20  # values that are counted at a time
METHODS = ("minmax", "percentile", "mse")


@dataclass
class Seen:
    """The values of one tensor so far: `low`, `high`, `count`, and a histogram.

    `counts[i]` values lie in [(first + i) * width, (first + i + 1) * width).
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    width: float = 0.0
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, x: np.ndarray, histogram: bool = True) -> None:
        """Adds the values of an array of any shape. Raises InputError for NaN and infinity."""
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise InputError("the text makes this NaN or infinite, which no range can hold")
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), self.count + x.size
        if histogram:
            self._make_room()
            flat = x.reshape(-1)
            for start in range(0, len(flat), CHUNK):
                at = np.floor(flat[start : start + CHUNK] / self.width).astype(np.int64) - self.first
                self.counts += np.bincount(at, minlength=len(self.counts))

    def merge(self, other: Seen) -> None:
        """Adds what another has seen of the same tensor. Both have a histogram, or neither has."""
        self.low, self.high, self.count = min(self.low, other.low), max(self.high, other.high), self.count + other.count
        if other.width:
            self._make_room(other.width)
            self._add_bins(other)

    def _make_room(self, least: float = 0.0) -> None:
        """Widens the bins to `least`, and until `low` and `high` are within BINS of them."""
        # values may be alike and far from 0; if bins were too narrow there, the bins' numbers would lose digits
        narrowest = max((self.high - self.low) / BINS, max(-self.low, self.high) * 2.0**-40, 1e-30)
        width = max(least, self.width or least or 2.0 ** math.floor(math.log2(narrowest)))
        while math.floor(self.high / width) - math.floor(self.low / width) >= BINS:
            width *= 2
        first, last = math.floor(self.low / width), math.floor(self.high / width)
        before = replace(self)
        self.width, self.first, self.counts = width, first, np.zeros(last - first + 1, np.int64)
        if before.width:
            self._add_bins(before)

    def _add_bins(self, other: Seen) -> None:
        """Adds the counts of another, whose bins are as wide or narrower."""
        bins = np.floor((other.first + np.arange(len(other.counts))) / (self.width / other.width))  # powers of two
        np.add.at(self.counts, bins.astype(np.int64) - self.first, other.counts)

    def to_array(self) -> np.ndarray:
        """All fields as float64 (5 + bins,), in which whole numbers to 2^53 are exact. `from_array` reads it back."""
        return np.array([self.low, self.high, self.count, self.width, self.first, *self.counts], np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Seen:
        low, high, count, width, first = map(float, array[:5])
        return cls(low, high, int(count), width, int(first), array[5:].astype(np.int64))

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin, float64."""
        return (self.first + np.arange(len(self.counts)) + 0.5) * self.width

    def percentile(self, percent: float) -> tuple[float, float]:
        """The range without the (100 - percent) % at each end, to the width of a bin."""
        tail = self.count * (1 - percent / 100)
        below, edges = np.cumsum(self.counts), (self.first + np.arange(len(self.counts) + 1)) * self.width
        start = int(np.searchsorted(below, tail, side="right"))
        stop = int(np.searchsorted(below, self.count - tail, side="left")) + 1
        return max(self.low, float(edges[start])), min(self.high, float(edges[min(stop, len(edges) - 1)]))

    def least_squares(self, bits: int, symmetric: bool) -> tuple[float, float]:
        """The range within [low, high] whose grid of `bits` has the least expected squared error.

        Both ends are tried at every 64th of the way to 0.
        """
        centers, shares = self.centers, self.counts / self.count
        ends = np.arange(1, 65) / 64
        best, least = (self.low, self.high), math.inf
        bottoms, tops = (np.unique(np.append(ends * e, e)) for e in (min(self.low, 0.0), max(self.high, 0.0)))
        # squared distance to either end, for each candidate; the two are independent of each other
        cut_low = [float(shares @ np.minimum(centers - max(b, self.low), 0.0) ** 2) if b else 0.0 for b in bottoms]
        cut_high = [float(shares @ np.maximum(centers - min(t, self.high), 0.0) ** 2) if t else 0.0 for t in tops]
        for bottom, under in zip(bottoms, cut_low, strict=True):
            for top, over in zip(tops, cut_high, strict=True):
                step = max((top - bottom) / (2**bits - 1), top / (2 ** (bits - 1) - 1) if symmetric else 0.0,
                           -bottom / 2 ** (bits - 1) if symmetric else 0.0)  # fmt: skip
                error = under + over + step * step / 12
                if error < least:
                    best, least = (float(bottom), float(top)), error
        return best

    def range(self, method: str, bits: int, symmetric: bool, percent: float) -> tuple[float, float]:
        """The range by one of METHODS."""
        if method == "percentile":
            return self.percentile(percent)
        return self.least_squares(bits, symmetric) if method == "mse" else (self.low, self.high)


def observing(seen: dict[str, Seen], histogram: bool, then: Tap = silent) -> Tap:
    """A tap that adds each tensor's values to what was seen of it, and passes the tensor on."""

    def tap(name, x):
        try:
            seen.setdefault(name, Seen()).add(x, histogram)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        return then(name, x)

    return tap


def observe(
    model: Forward,
    ids,
    window: int = WINDOW,
    dtype: str = "float32",
    histogram: bool = True,
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> dict[str, Seen]:
    """The values of every tap over a text or its ids: name -> Seen, from one pass, window by window.

    The entry `attention_mask` holds how far the largest hidden score lies above the largest visible one of its row.
    Windows do not overlap and are no longer than the context. Memory holds a few tensors of one of them. `executor`,
    `resume`: who computes them, and where finished ones are kept (`refimpl.sweep`).
    Raises InputError for ids outside the vocabulary, and if NaN or infinity is computed.
    """
    pieces = [(model, row, dtype, histogram) for row in cut(model, ids, window)]
    seen: dict[str, Seen] = {}
    for found in sweep(observe_window, pieces, "calibrating", executor, resume):
        for name, array in found.items():
            seen.setdefault(name, Seen()).merge(Seen.from_array(array))
    return {name: seen[name] for name in (*taps(model.config), MASK)}


def observe_window(model: Forward, ids: np.ndarray, dtype: str, histogram: bool) -> Result:
    """The values of every tap in one forward: name -> `Seen.to_array()`."""
    seen: dict[str, Seen] = {}
    model.forward(ids, dtype, None, None, observing(seen, histogram, then=comparing(seen, model.config)))
    return {name: one.to_array() for name, one in seen.items()}


def comparing(seen: dict[str, Seen], config: Config) -> Tap:
    """Records, under `attention_mask`, the difference that a mask has to overcome.

    That is the largest score that a query must not see, minus the largest that it sees. An unused slot of a device's
    cache holds zeros, so it counts as a score of 0. With ALiBi, only the score of the query's own key counts as seen,
    because ALiBi lowers all others.
    """

    def tap(name: str, x: Any) -> Any:
        if name.endswith(".scores"):
            own, hidden = np.arange(x.shape[-2]), np.triu(np.ones(x.shape[-2:], bool), 1)
            shown = x[..., own, own] if config.alibi else np.where(hidden, -np.inf, x).max(-1)  # (1, H, T)
            above = np.where(hidden, x, 0).max(-1) - shown
            seen.setdefault(MASK, Seen()).add(above.max(keepdims=True), histogram=False)
        return x

    return tap


def lowest_mask(above: float, keys: int) -> float:
    """The number to add to hidden scores, so that `keys` of them together get no probability.

    `above`: see `comparing`. Together, they get less than half a step of 16 bits. The mask is no lower than this needs,
    because the sum of scores and mask stands on one grid, whose step grows with the mask. But it is never
    above -50, with which Qualcomm's zoo exports.

    >>> lowest_mask(4.0, 4096), lowest_mask(60.0, 4096)
    (-50.0, -81.0)
    """
    return -max(50.0, float(math.ceil(above + math.log(keys) + 17 * math.log(2))))


def encode(
    model: Forward,
    seen: Mapping[str, Seen],
    recipe: Recipe | None = None,
    method: str = "minmax",
    percent: float = 99.99,
) -> Encodings:
    """The grids that a recipe gives a model for the ranges seen. Weights are not clipped, whatever the method.

    Raises InputError for an unknown method, and where the recipe does not fit the model.
    """
    recipe, config = recipe or Recipe(), model.config
    _expect_method(method, percent)
    if recipe.lowest_mask is None and MASK in seen:
        recipe = replace(recipe, lowest_mask=lowest_mask(seen[MASK].high, config.max_position_embeddings))
    activations: dict[str, Encoding] = recipe.inputs(config)
    for name in taps(config):
        grid = recipe.activation(config, name)
        if grid is not None:
            low, high = grid.fixed or seen[name].range(method, grid.bits, grid.symmetric, percent)
            # float32's digits are enough for a range, and do not depend on the order of the sums before it
            activations[name] = from_range(np.float32(low).item(), np.float32(high).item(), grid.bits, grid.symmetric)
    return Encodings(activations, recipe.parameters(config, model.weights))


def _expect_method(method: str, percent: float) -> None:
    if method not in METHODS:
        raise InputError(f"the method is {method!r}, expected one of {', '.join(METHODS)}")
    if not 50 < percent <= 100:
        raise InputError(f"the percentile is {percent:g}, expected more than 50 and at most 100")


def calibrate(
    model: Forward,
    ids,
    recipe: Recipe | None = None,
    method: str = "minmax",
    percent: float = 99.99,
    window: int = WINDOW,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Encodings:
    """The encodings of a model from a text or its ids: `observe`, then `encode`."""
    _expect_method(method, percent)
    seen = observe(model, ids, window, dtype, method != "minmax", executor, resume)
    return encode(model, seen, recipe, method, percent)
