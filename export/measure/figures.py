"""How far one of a device's tensors is from what it should be, in figures that can be kept and judged again.

A tensor is judged row by row of its last axis, each by what rounding may do to that row:

- in floats: the largest error of the row over `golden.tolerance` of the row's largest value;
- on grids: two right devices round in different places, so their rows differ by some noise,

      yard = sqrt(noise^2 + step^2 / 12 + (tolerance * row's largest)^2)

  where noise is the RMS of what rounding the activations adds to this row, and step^2 / 12 the variance of one more
  rounding. An error whose RMS is the yard is expected; a device that rounds everything independently has sqrt(2) yards.

`limits.py` says how much of that is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import numpy as np

from export.graphs.plan import GraphSpec, Way
from export.measure.kinds import Kind
from golden.compare import Difference, compare
from golden.cost.quality import log_softmax
from golden.tolerance import Tolerance
from refimpl.names import Row, taps
from refimpl_kernels.affine import Encoding

ROWS, TYPICAL = 4.0, 1.5  # how many yards one row in thousands, and the median row, may be off
BINS = 16  # of the histogram: a row's error is 2^-8 to 2^7 of what is allowed, and the ends hold what is beyond

ON_BOTH_SIDES = "NaN or infinity on both sides"  # a problem: a device that answers NaN is never right


class Birth(str, Enum):
    """Whether a wrong tensor became wrong in its own operation, or was computed rightly from wrong inputs."""

    HERE = "here"
    INHERITED = "inherited"
    UNKNOWN = ""


@dataclass(frozen=True)
class Figures:
    """One array against another: SQNR in dB, cosine, the largest error and where it is; also by token and by head."""

    sqnr: float = math.inf
    cosine: float = math.nan
    max_abs: float = math.nan
    index: tuple[int, ...] = ()
    value: float = math.nan
    reference: float = math.nan
    token_sqnr: tuple[float, ...] = ()
    head_sqnr: tuple[float, ...] = ()
    token_cosine: tuple[float, ...] = ()
    head_cosine: tuple[float, ...] = ()


@dataclass(frozen=True)
class Needs:
    """The errors of a tensor that rounding would have to explain.

    - `rows`: the error of the worst row, over the tolerance in floats, in yards on grids; `typical`: of the median row
    - `tokens`, `heads`: the worst row of each, over what is allowed: above 1 is wrong
    - `histogram`: how many rows need each share of what is allowed, in BINS bins; `reason`: what is allowed, in words
    """

    rows: float = math.inf
    typical: float = math.inf
    tokens: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Codes:
    """The grid of a tensor, `bits` and `step`, and how far the device's codes are off.

    `largest`: codes that the worst value is off by; `over`: the share of values off by more than one. None where the
    device computes in floats. `tokens`, `heads`: the largest in each.
    """

    bits: int | None = None
    step: float | None = None
    largest: float | None = None
    over: float | None = None
    tokens: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Logits:
    """KL(oracle || device) in nats, the mean over tokens and for each; how often both find the same token likeliest.

    `cost_kl`, `cost_top1`: the same for the reference: what quantization alone costs.
    """

    kl: float
    top1: float
    cost_kl: float
    cost_top1: float
    tokens: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One tensor of a device, compared with what it should be.

    - `graph`, `way`, `tap`: which one; `output`: its name in the graph; `position` of its first token
    - `kind`: how its reference computes; `problem`: why it cannot be compared, or ""
    - `device`: device against reference; `cost`: reference against the float oracle, the cost of quantization;
      `total`: device against the oracle. The last two have SQNR and cosine only.
    """

    graph: str
    way: Way
    tap: str
    kind: Kind
    problem: str = ""
    output: str = ""
    shape: tuple[int, ...] = ()
    position: int = 0
    needs: Needs = Needs()
    device: Figures = Figures()
    cost: Figures = Figures(cosine=1.0)
    total: Figures = Figures()
    codes: Codes = field(default=Codes())
    logits: Logits | None = None
    born: Birth = Birth.UNKNOWN

    @property
    def name(self) -> str:
        return f"{self.graph}/{self.way}/{self.tap}"

    @property
    def layer(self) -> int | None:
        """The number of its layer, or None outside of all."""
        pieces = self.tap.split(".")
        return int(pieces[2]) if self.tap.startswith("model.layers.") else None

    @property
    def operation(self) -> str:
        """Its name without the layer: a column of the heat map."""
        return ".".join(self.tap.split(".")[3:]) or "layer output" if self.layer is not None else self.tap


class Spot(NamedTuple):
    """Which tensor: a tap of a graph that was fed in one way, and `output`, its name among the graph's outputs."""

    spec: GraphSpec
    way: Way
    tap: str
    output: str = ""

    def nothing(self, kind: Kind, problem: str = "") -> Comparison:
        """A comparison without figures."""
        return Comparison(self.spec.name, self.way, self.tap, kind, problem, self.output, position=self.spec.past)


class Sides(NamedTuple):
    """The arrays of one tensor, in the layout of the tap, without padding.

    `device`: what came back; `reference`: what is right for this kind of device; `oracle`: what is right in float64;
    `unrounded`: the reference without the rounding of activations, or None where that adds nothing.
    """

    device: np.ndarray
    reference: np.ndarray
    oracle: np.ndarray
    unrounded: np.ndarray | None = None


def compared(spot: Spot, kind: Kind, sides: Sides, limit: Tolerance, grid: Encoding | None) -> Comparison:
    """The comparison of one tensor. `limit`: what rounding of floats may do; `grid`: of the tensor, if it has one."""
    nothing, row = spot.nothing(kind), taps(spot.spec.config).get(spot.tap)
    found = _difference(sides.device, sides.reference, limit)
    if not found.problem and not np.isfinite(sides.device).all():
        at = tuple(np.argwhere(~np.isfinite(sides.device))[0].tolist())
        found = replace(found, problem=ON_BOTH_SIDES, index=at, value=math.nan, reference=math.nan)
    if found.problem:
        return _incomparable(nothing, found, sides, row)
    if kind.coded and grid is not None and (lost := unused_bits(sides.device, sides.reference, grid)):
        return replace(nothing, problem=lost, shape=sides.device.shape)
    wide = Sides(*(None if x is None else x.astype(np.float64) for x in sides))  # type: ignore[arg-type]
    cost, total = (_difference(x, sides.oracle, limit) for x in (sides.reference, sides.device))
    return replace(
        nothing,
        shape=sides.device.shape,
        needs=_on_grids(wide, limit, grid, row) if kind.coded else _in_floats(wide, limit, found.excess, row),
        device=_figures(found, wide, row),
        cost=Figures(cost.sqnr, cost.cosine),
        total=Figures(total.sqnr, total.cosine),
        codes=_codes(wide, grid, kind, row),
        logits=_logits(wide) if spot.tap == "lm_head" else None,
    )


def _incomparable(nothing: Comparison, found: Difference, sides: Sides, row: Row | None) -> Comparison:
    """A comparison without distances: it tells where numbers are not finite, or that the shape is another."""
    needs = nothing.needs
    if sides.device.shape == sides.reference.shape:
        odd = np.where(np.isfinite(sides.device) & np.isfinite(sides.reference), 0.0, np.inf)
        needs = replace(needs, tokens=_along(odd, row, "T", np.max), heads=_along(odd, row, "HK", np.max))
    device = Figures(index=found.index, value=found.value, reference=found.reference)
    return replace(nothing, problem=found.problem, shape=sides.device.shape, needs=needs, device=device)


def _in_floats(sides: Sides, limit: Tolerance, worst: float, row: Row | None) -> Needs:
    error = np.abs(sides.device - sides.reference).max(-1)
    return _needs(_over(error, limit.relative * _scale(sides.reference)), worst, 0.0, limit.reason, row)


def _on_grids(sides: Sides, limit: Tolerance, grid: Encoding | None, row: Row | None) -> Needs:
    scale = _scale(sides.reference)
    noise = np.zeros_like(scale) if sides.unrounded is None else _rms(sides.reference - sides.unrounded)
    step = float(grid.scale) if grid is not None else 0.0
    yards = _over(
        _rms(sides.device - sides.reference), np.sqrt(noise**2 + step**2 / 12 + (limit.relative * scale) ** 2)
    )
    reason = f"{ROWS:g} times the noise that rounding adds to a row, {TYPICAL:g} times in half of the rows"
    return _needs(yards / ROWS, float(yards.max()), float(np.median(yards)), reason, row)


def _needs(excess: np.ndarray, worst: float, typical: float, reason: str, row: Row | None) -> Needs:
    """`excess`: the error of each row over what is allowed."""
    power = np.floor(np.log2(np.maximum(np.nan_to_num(excess, nan=0.0), 1e-30))).astype(int)
    histogram = np.bincount(np.clip(power + BINS // 2, 0, BINS - 1).reshape(-1), minlength=BINS)
    tokens, heads = (_along(excess[..., None], row, letters, np.max) for letters in ("T", "HK"))
    return Needs(worst, typical, tokens, heads, tuple(histogram.tolist()), reason)


def _figures(found: Difference, sides: Sides, row: Row | None) -> Figures:
    a, b = sides.device, sides.reference
    return Figures(
        sqnr=found.sqnr, cosine=found.cosine, max_abs=found.max_abs,
        index=found.index, value=found.value, reference=found.reference,
        token_sqnr=_sqnrs(b, a - b, row, "T"), head_sqnr=_sqnrs(b, a - b, row, "HK"),
        token_cosine=_cosines(a, b, row, "T"), head_cosine=_cosines(a, b, row, "HK"),
    )  # fmt: skip


def _codes(sides: Sides, grid: Encoding | None, kind: Kind, row: Row | None) -> Codes:
    if grid is None:
        return Codes()
    step = float(grid.scale)
    if not kind.coded or not step:
        return Codes(grid.bits, step)
    off = np.rint(np.abs(sides.device - sides.reference) / step)
    tokens, heads = (_along(off, row, letters, np.max) for letters in ("T", "HK"))
    return Codes(grid.bits, step, float(off.max()), float((off > 1).mean()), tokens, heads)


def _logits(sides: Sides) -> Logits:
    right, best = log_softmax(sides.oracle), sides.oracle.argmax(-1)
    device, reference = (
        (np.exp(right) * (right - log_softmax(x))).sum(-1) for x in (sides.device, sides.reference)
    )  # KL, token by token
    top1, cost_top1 = (float((best == x.argmax(-1)).mean()) for x in (sides.device, sides.reference))
    return Logits(float(device.mean()), top1, float(reference.mean()), cost_top1, tuple(device.reshape(-1).tolist()))


def unused_bits(device: np.ndarray, reference: np.ndarray, grid: Encoding) -> str:
    """Says that the device uses only 8 of the bits of its codes, or "". The noise of rounding may hide that error."""
    if grid.bits <= 8 or grid.scale.ndim:
        return ""
    fine = 2 ** (grid.bits - 8)
    a, b = (len(np.unique((np.rint(x / float(grid.scale)) - float(grid.offset)) % fine)) for x in (device, reference))
    return f"only 8 of the {grid.bits} bits of its codes are used" if a == 1 and b > 8 else ""


def _difference(a: np.ndarray, b: np.ndarray, limit: Tolerance) -> Difference:
    return compare({"x": a}, {"x": b}, limit).tensors[0]


def _scale(x: np.ndarray) -> np.ndarray:
    """The largest value of each row, or of all rows where a row is nearly zero."""
    largest = np.abs(x).max(-1)
    return np.where(largest > 2.0**-24 * largest.max(), largest, largest.max())


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis=-1))


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, where 0 / 0 is 0."""
    return np.divide(a, b, out=np.where(a > 0, np.inf, 0.0), where=b > 0)


def _along(x: np.ndarray, row: Row | None, letters: str, function: Callable) -> tuple[float, ...]:
    """A number for each token or head: `function` over all other axes. Heads may lie side by side in the last axis."""
    axes = row.shape.split() if row else []
    at = next((i for i, axis in enumerate(axes) if axis in letters), None)
    if at is None or (letters != "T" and x.ndim != len(axes)):
        return ()
    return tuple(np.atleast_1d(function(np.moveaxis(x, at, 0).reshape(x.shape[at], -1), axis=1)).tolist())


def _sqnrs(signal: np.ndarray, error: np.ndarray, row: Row | None, letters: str) -> tuple[float, ...]:
    powers = (_along(np.square(x), row, letters, np.sum) for x in (signal, error))
    return tuple(10 * math.log10(s / e) if s and e else math.inf if s or not e else -math.inf
                 for s, e in zip(*powers, strict=True))  # fmt: skip


def _cosines(a: np.ndarray, b: np.ndarray, row: Row | None, letters: str) -> tuple[float, ...]:
    sums = (_along(x, row, letters, np.sum) for x in (a * b, np.square(a), np.square(b)))
    return tuple(
        ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else math.inf for ab, aa, bb in zip(*sums, strict=True)
    )
