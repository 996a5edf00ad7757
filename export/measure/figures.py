"""How far one of a device's tensors is from what it should be, in figures that can be kept and judged again.

**What is allowed** follows from how the device computes (`export/measure/references.py`), row by row of the last axis:

- in floats, from how floats round: the largest error of a row over `golden.tolerance` of its largest value;
- on grids, from how much rounding adds. Two right devices round in different places, so their rows differ by some
  noise: yard = sqrt(noise^2 + step^2 / 12 + (tolerance * row's largest)^2), where noise is the RMS of what rounding the
  activations adds to this very row, and step^2 / 12 the variance of a rounding. An error of the same RMS as the yard
  is no surprise; a device that rounds everything independently of the simulation has sqrt(2) of it.

`rows` is the largest error of a row in that measure, `typical` the median of all rows. One row in thousands may have
four times its yard (ROWS), but not half of them more than 1.5 times (TYPICAL): a zero point that is off by one code is
a small error in each row, and no large one in any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import numpy as np

from export.graphs.plan import Way
from export.measure.kinds import KINDS, Kind
from golden.compare import Difference, compare, finite
from golden.cost.quality import log_softmax
from golden.tolerance import Tolerance
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.names import Tap, taps
from refimpl_kernels.affine import Encoding

SIZES = {"rows", "typical", "tokens", "heads", "max_abs", "token_lsb", "head_lsb", "lsb_max", "lsb_over"}  # 0 and above
TOGETHER = (("lsb_max", "lsb_over"), ("kl", "top1", "cost_kl", "cost_top1"))  # figures that come with each other
ROWS, TYPICAL = 4.0, 1.5
LOWEST_SQNR = -1e3  # what stands for minus infinity in a file
BINS = 16  # of the histogram: a row's error is 2^-8 to 2^7 of what is allowed, and the ends hold what is beyond


@dataclass(frozen=True)
class Thresholds:
    """When a tensor fails. Without any number here: when it is beyond what rounding explains (see above).

    `min_sqnr`: dB of device against reference; `max_lsb`: codes that any value may be off by; `max_over`: share of
    values that may be off by more than one code. What is given takes the place of the rule; a tensor of which none of
    it says anything, such as one without a grid, which has no codes, is judged by the rule.
    """

    min_sqnr: float | None = None
    max_lsb: float | None = None
    max_over: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and (value >= 0 or name == "min_sqnr")):
                raise InputError(f"{name} is {value:g}, expected a number{'' if name == 'min_sqnr' else ' from 0 on'}")

    def excess(self, figures: Figures) -> float:
        """What a tensor needs over what is allowed: above 1 fails."""
        if figures.problem:
            return math.inf
        if found := self._given(figures):
            return max(found)
        return figures.rows if not figures.kind.coded else max(figures.rows / ROWS, figures.typical / TYPICAL)

    def judge(self, figures: Figures) -> bool:
        """Whether any number here says something of a tensor, rather than the rule."""
        return bool(self._given(figures))

    def _given(self, figures: Figures) -> list[float]:
        """The excess over each number that says something of the tensor."""
        found = []
        if self.min_sqnr is not None:
            found.append(10 ** ((self.min_sqnr - figures.sqnr) / 20) if figures.sqnr > -math.inf else math.inf)
        for limit, value in ((self.max_lsb, figures.lsb_max), (self.max_over, figures.lsb_over)):
            if limit is not None and value is not None:
                found.append(value / limit if limit else math.inf if value else 0.0)
        return found


@dataclass(frozen=True)
class Figures:
    """One tensor of a device: `graph`, `way` (isolated or chained) and `tap`; `kind` of its reference;
    `output`: its name in the graph.

    - `rows`, `typical`: see above; `tokens`, `heads`: the largest of `rows` in each token and head, over what is
      allowed; `histogram` of all rows, BINS bins; `positions`: that of the first token in the sequence
    - `sqnr` (dB), `cosine`, `max_abs`: device against reference; `index`, `value`, `reference`: where it is worst
    - `cost_sqnr`, `cost_cosine`: reference against the float oracle, what quantization costs;
      `total_sqnr`, `total_cosine`: device against the oracle
    - `token_sqnr`, `head_sqnr`, `token_cosine`, `head_cosine`, `token_lsb`, `head_lsb` (the largest): device against
      reference; `token_kl`: of logits, device against oracle
    - `bits` and `step` of the grid, `lsb_max`: the largest distance in codes, `lsb_over`: the share of values more
      than one code off; None without a grid
    - `kl`, `top1`: of logits, device against oracle, mean over tokens in nats and share; `cost_kl`, `cost_top1`:
      reference against oracle
    - `born`: "here", "inherited" or "", which is not known
    """

    graph: str
    way: str
    tap: str
    kind: Kind
    problem: str = ""
    output: str = ""
    shape: tuple[int, ...] = ()
    rows: float = math.inf
    typical: float = math.inf
    reason: str = ""
    tokens: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    position: int = 0
    histogram: tuple[int, ...] = ()
    sqnr: float = math.inf
    cosine: float = math.nan
    max_abs: float = math.nan
    index: tuple[int, ...] = ()
    value: float = math.nan
    reference: float = math.nan
    cost_sqnr: float = math.inf
    cost_cosine: float = 1.0
    total_sqnr: float = math.inf
    total_cosine: float = math.nan
    token_sqnr: tuple[float, ...] = ()
    head_sqnr: tuple[float, ...] = ()
    token_cosine: tuple[float, ...] = ()
    head_cosine: tuple[float, ...] = ()
    token_lsb: tuple[float, ...] = ()
    head_lsb: tuple[float, ...] = ()
    token_kl: tuple[float, ...] = ()
    bits: int | None = None
    step: float | None = None
    lsb_max: float | None = None
    lsb_over: float | None = None
    kl: float | None = None
    top1: float | None = None
    cost_kl: float | None = None
    cost_top1: float | None = None
    born: str = ""

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
        """Its name less the layer: a row of the heat map."""
        return ".".join(self.tap.split(".")[3:]) or "layer output" if self.layer is not None else self.tap

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, without what is not there or is infinite, and short."""
        facts = {key: LOWEST_SQNR if value == -math.inf else value for key, value in asdict(self).items()}
        facts["kind"] = self.kind.name
        stated = {key: value for key, value in finite(facts).items() if value not in (None, [], "")}
        return {key: [_short(x) for x in v] if isinstance(v, list) else _short(v) for key, v in stated.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Figures:
        """What `to_json` gave. Raises InputError for anything else."""
        known = {field.name: field for field in fields(cls)}
        if (
            not isinstance(stored, dict)
            or set(stored) - set(known)
            or not {"graph", "way", "tap", "kind"} <= set(stored)
        ):
            raise InputError("a tensor of the run has other keys than expected")
        values: dict[str, Any] = {}
        for key, value in stored.items():
            kind, many = str(known[key].type).replace("Kind", "str"), isinstance(value, list)
            numbers = [math.inf if many and x is None and "float" in kind else x for x in (value if many else [value])]
            allowed = {
                "way": get_args(Way), "kind": KINDS, "born": ("", "here", "inherited")
            }.get(key, numbers)  # fmt: skip
            sound = all(_is(x, kind) and x in allowed and not (key in SIZES and x < 0) for x in numbers)
            if many != kind.startswith("tuple") or not sound:
                raise InputError(f"{key} of a tensor of the run is {_start(value)}, which is not what it should be")
            values[key] = tuple(numbers) if many else value
        for keys in TOGETHER:
            if len({key in values for key in keys}) > 1:
                raise InputError(f"a tensor of the run has some of {', '.join(keys)}, expected all or none")
        if len(values.get("histogram", ())) not in (0, BINS):
            raise InputError(f"the histogram of a tensor has {len(values['histogram'])} numbers, expected {BINS}")
        return cls(**values | {"kind": KINDS[values["kind"]]})


def _is(x: Any, kind: str) -> bool:
    """Whether a stored number or text is of a field's type; whole numbers fit 64 bits, so that floats hold them.

    A text has nothing in it that a terminal would obey.
    """
    if kind == "str":
        return isinstance(x, str) and x.isprintable()
    if type(x) is int:
        return abs(x) < 2**63 and (x >= 0 or "int" not in kind)
    return type(x) is float and "int" not in kind


def _start(value: Any) -> str:
    """The first of it, without writing all of it out."""
    return f"a {type(value).__name__}" if isinstance(value, int | list | dict) else f"{value!a:.40}"


def _short(x: Any) -> Any:
    return float(f"{x:.5g}") if isinstance(x, float) else x


def measure(
    figures: Figures, device: np.ndarray, reference: np.ndarray, oracle: np.ndarray, limit: Tolerance,
    grid: Encoding | None = None, rounding: np.ndarray | None = None, config: Config | None = None,
) -> Figures:  # fmt: skip
    """`figures`, of which graph, way, tap, kind and position are known, filled in.

    All arrays have the layout of the tap, without padding. `rounding`: the tensor without the rounding of activations,
    of which its difference to `reference` is the noise; None for a float run.
    """
    own = _difference(device, reference, limit)
    if own.problem:
        tokens: tuple[float, ...] = ()
        heads: tuple[float, ...] = ()
        if device.shape == reference.shape:  # where it is not finite
            odd, tap = (
                np.where(np.isfinite(device) == np.isfinite(reference), 0.0, np.inf),
                _row_of(figures.tap, config),
            )
            tokens, heads = _along(odd, tap, "T", np.max), _along(odd, tap, "HK", np.max)
        return replace(figures, problem=own.problem, shape=device.shape, index=own.index, value=own.value,
                       reference=own.reference, tokens=tokens, heads=heads)  # fmt: skip
    if figures.kind.coded and grid is not None and (lost := unused_bits(device, reference, grid)):
        return replace(figures, problem=lost, shape=device.shape)
    a, b, c = (x.astype(np.float64) for x in (device, reference, oracle))
    cost, total = _difference(reference, oracle, limit), _difference(device, oracle, limit)
    step = float(grid.scale) if grid is not None else None
    error, largest = np.abs(a - b), np.abs(b).max(-1)
    scale = np.where(largest > 2.0**-24 * largest.max(), largest, largest.max())
    if not figures.kind.coded:
        ratio, typical = _over(error.max(-1), limit.relative * scale), 0.0
        worst, excess = own.excess, ratio
        reason = limit.reason
    else:
        noise = np.zeros_like(scale) if rounding is None else _rms(b - rounding)
        yard = np.sqrt(noise**2 + (step or 0.0) ** 2 / 12 + (limit.relative * scale) ** 2)
        ratio = _over(_rms(a - b), yard)
        typical, worst, excess = float(np.median(ratio)), float(ratio.max()), ratio / ROWS
        reason = f"{ROWS:g} times the noise of rounding in a row, {TYPICAL:g} times in half of them"
    tap = _row_of(figures.tap, config)
    over = np.full(BINS, 0)
    bins = np.clip(
        np.floor(np.log2(np.maximum(np.nan_to_num(excess, nan=0.0), 1e-30))) + BINS // 2, 0, BINS - 1
    ).astype(int)
    np.add.at(over, bins.reshape(-1), 1)
    lsb = np.rint(error / step) if step and figures.kind.coded else None
    return replace(
        figures, shape=device.shape, rows=worst, typical=typical, reason=reason,
        tokens=_along(excess[..., None], tap, "T", np.max), heads=_along(excess[..., None], tap, "HK", np.max),
        histogram=tuple(over.tolist()), sqnr=own.sqnr, cosine=own.cosine, max_abs=own.max_abs, index=own.index,
        value=own.value, reference=own.reference, cost_sqnr=cost.sqnr, cost_cosine=cost.cosine,
        total_sqnr=total.sqnr, total_cosine=total.cosine,
        token_sqnr=_sqnrs(b, a - b, tap, "T"), head_sqnr=_sqnrs(b, a - b, tap, "HK"),
        token_cosine=_cosines(a, b, tap, "T"), head_cosine=_cosines(a, b, tap, "HK"),
        token_lsb=_along(lsb, tap, "T", np.max) if lsb is not None else (),
        head_lsb=_along(lsb, tap, "HK", np.max) if lsb is not None else (),
        bits=grid.bits if grid is not None else None, step=step,
        lsb_max=float(lsb.max()) if lsb is not None else None,
        lsb_over=float((lsb > 1).mean()) if lsb is not None else None,
        **(_of_logits(a, b, c) if figures.tap == "lm_head" else {}),
    )  # fmt: skip


def unused_bits(device: np.ndarray, reference: np.ndarray, grid: Encoding) -> str:
    """That the device's codes are those of 8 bits, where they are; the noise of rounding may be larger than that."""
    if grid.bits <= 8 or grid.scale.ndim:
        return ""
    fine = 2 ** (grid.bits - 8)
    a, b = (len(np.unique((np.rint(x / float(grid.scale)) - float(grid.offset)) % fine)) for x in (device, reference))
    return f"only 8 of the {grid.bits} bits of its codes are used" if a == 1 and b > 8 else ""


def _difference(a: np.ndarray, b: np.ndarray, limit: Tolerance) -> Difference:
    return compare({"x": a}, {"x": b}, limit).tensors[0]


def _row_of(name: str, config: Config | None) -> Tap | None:
    return taps(config).get(name) if config else None


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis=-1))


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, where 0 / 0 is 0."""
    return np.divide(a, b, out=np.where(a > 0, np.inf, 0.0), where=b > 0)


def _along(x: np.ndarray, tap: Tap | None, letters: str, function: Any) -> tuple[float, ...]:
    """A number for each token or head: `function` over all other axes. Heads may lie side by side in the last axis."""
    axes = tap.shape.split() if tap else []
    at = next((i for i, axis in enumerate(axes) if axis in letters), None)
    if at is None or (letters != "T" and x.ndim != len(axes)):
        return ()
    return tuple(np.atleast_1d(function(np.moveaxis(x, at, 0).reshape(x.shape[at], -1), axis=1)).tolist())


def _sqnrs(signal: np.ndarray, error: np.ndarray, tap: Tap | None, letters: str) -> tuple[float, ...]:
    powers = (_along(np.square(x), tap, letters, np.sum) for x in (signal, error))
    return tuple(10 * math.log10(s / e) if s and e else math.inf if s or not e else -math.inf
                 for s, e in zip(*powers, strict=True))  # fmt: skip


def _cosines(a: np.ndarray, b: np.ndarray, tap: Tap | None, letters: str) -> tuple[float, ...]:
    sums = (_along(x, tap, letters, np.sum) for x in (a * b, np.square(a), np.square(b)))
    return tuple(
        ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else math.inf for ab, aa, bb in zip(*sums, strict=True)
    )


def _of_logits(device: np.ndarray, reference: np.ndarray, oracle: np.ndarray) -> dict[str, Any]:
    """KL(oracle || other) in nats, the mean over tokens, and how often both find the same token likeliest."""
    found: dict[str, Any] = {}
    for name, other in (("", device), ("cost_", reference)):
        logp, logq = log_softmax(oracle), log_softmax(other)
        divergence = (np.exp(logp) * (logp - logq)).sum(-1)
        found[f"{name}kl"] = float(divergence.mean())
        if not name:
            found["token_kl"] = tuple(divergence.reshape(-1).tolist())
        found[f"{name}top1"] = float((oracle.argmax(-1) == other.argmax(-1)).mean())
    return found
