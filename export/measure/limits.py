"""When a tensor fails: when it needs more than a limit allows. A limit is one small class.

InFloats     a row may be off by the tolerance of its tap (golden/tolerance.py)
OnGrids      a row may be off by four times its noise, and half of the rows by 1.5 times
Thresholds   the numbers that somebody gave, such as --min-sqnr 30; where none applies, one of the two above
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol

from export.measure.figures import ROWS, TYPICAL, Comparison
from refimpl.errors import InputError


class Limit(Protocol):
    """The protocol of a limit, by which a tensor is judged."""

    def excess(self, one: Comparison, /) -> float:
        """What a tensor needs, divided by what is allowed: above 1 fails."""


class InFloats:
    """Rounding of floats: the worst row, over its tolerance."""

    def excess(self, one: Comparison) -> float:
        return one.needs.rows


class OnGrids:
    """Rounding to grids: one row in thousands may be off by ROWS yards, the median row by TYPICAL.

    The median catches a zero point that is off by one code: a small error in every row, a large one in none.
    """

    def excess(self, one: Comparison) -> float:
        return max(one.needs.rows / ROWS, one.needs.typical / TYPICAL)


@dataclass(frozen=True)
class Thresholds:
    """Numbers that somebody gave, in place of the limits that follow from rounding.

    `min_sqnr`: dB of device against reference; `max_lsb`: codes that any value may be off by; `max_over`: share of
    values that may be off by more than one code. A tensor to which none of them applies, such as one without codes, is
    judged by the limit that follows from rounding.
    """

    min_sqnr: float | None = None
    max_lsb: float | None = None
    max_over: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and (value >= 0 or name == "min_sqnr")):
                raise InputError(f"{name} is {value:g}, expected a number{'' if name == 'min_sqnr' else ' from 0 on'}")

    def excess(self, one: Comparison) -> float:
        """What a tensor needs, divided by what is allowed: above 1 fails."""
        if one.problem:
            return math.inf
        return max(self._given(one) or [explained_by(one).excess(one)])

    def within(self, one: Comparison) -> bool:
        """Whether a tensor passes."""
        return self.excess(one) <= 1

    def judge(self, one: Comparison) -> bool:
        """Whether a number given here applies to a tensor."""
        return bool(self._given(one))

    def _given(self, one: Comparison) -> list[float]:
        """The excess over each number that applies to the tensor."""
        found = []
        if self.min_sqnr is not None:
            found.append(10 ** ((self.min_sqnr - one.device.sqnr) / 20) if one.device.sqnr > -math.inf else math.inf)
        for limit, value in ((self.max_lsb, one.codes.largest), (self.max_over, one.codes.over)):
            if limit is not None and value is not None:
                found.append(value / limit if limit else math.inf if value else 0.0)
        return found


def explained_by(one: Comparison) -> Limit:
    """The limit that follows from how a device computes."""
    return OnGrids() if one.kind.coded else InFloats()


DERIVED = Thresholds()  # no number given: the limits follow from rounding


@dataclass(frozen=True)
class Terms:
    """The terms on which a device is judged.

    `dtype`: the floats that a device without grids computes in, float32 or float16; None: its outputs show which.
    `thresholds`: numbers in place of the limits that follow from rounding.
    """

    dtype: str | None = None
    thresholds: Thresholds = DERIVED


AS_SHOWN = Terms()  # the device's outputs show its dtype, and rounding has to explain the rest
