"""A failing tensor and all that can be asked about it; what a detector may answer; how near two tensors are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from export.causes.whatif import WhatIf
from export.graphs.plan import Arrays
from refimpl.names import taps
from refimpl_kernels.affine import Encoding


@dataclass(frozen=True)
class Cause:
    """A likely cause: its `name` in the table, the finding in a sentence, and whether it explains only a part."""

    name: str
    text: str
    partial: bool = False

    def __str__(self) -> str:
        return f"{self.text} (the nearest of the known faults; it explains only a part)" if self.partial else self.text


@dataclass(frozen=True, eq=False)
class Guess:
    """The tensor that a fault would have given: `predicted`, in the tap's layout without padding.

    `device`: the part of the device's output that is compared with it, by default the whole tensor.
    `tokens`: start and stop of the tokens that the guess speaks of.
    `certain`: the fault is seen in the tensor itself, and needs no prediction.
    """

    text: str
    predicted: np.ndarray
    device: np.ndarray | None = None
    tokens: tuple[int | None, int | None] = (None, None)
    certain: bool = False


@dataclass(frozen=True, eq=False)
class Evidence(WhatIf):
    """A failing tensor of a device. Arrays without padding have the layout of the tap.

    `raw`: what the device gave, in the graph's layout, with padding. `way`: how its graph was fed.
    `needs(device, right, tokens)`: the excess of the device's tensor if `right` were the right one; both have these
    tokens. Above 1, rounding does not explain the difference; nan: not known.
    `handed_on`: later tensors inherited the error, so the tensor is wrong inside of its graph, too.
    """

    raw: np.ndarray
    way: str = "isolated"
    needs: Callable[[np.ndarray, np.ndarray, tuple[slice, ...]], float] = lambda device, right, tokens: math.nan
    handed_on: bool = False

    @cached_property
    def device(self) -> np.ndarray:
        """The device's tensor in the tap's layout, float64, without padding."""
        return self.shown(self.raw)

    @cached_property
    def outputs(self) -> Arrays:
        """The right answer to the inputs that the device had: every output in the graph's layout."""
        if self.kind.on_grids and self.references.model is None:
            return self.references.stored(self.spec, self.way)
        return self.run(self.inputs)

    @cached_property
    def expected(self) -> np.ndarray:
        """The right tensor in the tap's layout, float64, without padding."""
        return self.shown(self.outputs[self.value.name])

    @property
    def grid(self) -> Encoding | None:
        """The grid of its codes, if it has one."""
        return self.references.grids.get(self.tap) if self.kind.coded else None

    @cached_property
    def axes(self) -> Axes:
        return Axes(tuple(taps(self.config)[self.tap].shape.split()))


@dataclass(frozen=True)
class Axes:
    """The axes of a tap, by their letters (`refimpl/names.py`)."""

    letters: tuple[str, ...]

    @property
    def token(self) -> int:
        return self.letters.index("T")

    @property
    def head(self) -> int | None:
        return next((i for i, letter in enumerate(self.letters) if letter in "HK"), None)


class Detector(Protocol):
    """A function that proposes how a tensor became wrong: a row of `CAUSES`."""

    def __call__(self, e: Evidence, /) -> Iterator[Guess]: ...


def nearness(a: np.ndarray, b: np.ndarray) -> float:
    """-10 log10 of the mean over rows of |a - b|^2 / |b - mean|^2, in dB: each row counts alike, however large it is.

    `mean` is that of all of b: a shift that a prediction adds must not count as a sign that the prediction is right.
    """
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return -math.inf
    error, size = np.square(a - b).sum(-1), np.square(b - b.mean() if b.size else b).sum(-1)
    size = np.maximum(size, 2.0**-48 * size.max(initial=0.0))
    if not size.any():
        return math.inf if not error.any() else -math.inf
    ratio = float(np.mean(np.minimum(error / size, 1e6)))
    return -10 * math.log10(ratio) if ratio else 400.0
