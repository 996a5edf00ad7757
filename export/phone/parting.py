"""Where two answers part, and whether that is a near tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 3.0  # of 1000 differences of noise, 997 are smaller


@dataclass(frozen=True)
class Parting:
    """Where two answers part: the index, the two tokens, and by how much the reference prefers its own.

    `noise`: the root mean square error of a logit of the other. A choice between two logits whose gap is no more than
    `NEAR` times the noise of their difference is a near tie: either may win.
    """

    index: int
    reference: int
    other: int
    gap: float
    noise: float

    @property
    def near_tie(self) -> bool:
        return self.gap <= NEAR * np.sqrt(2) * self.noise

    def __str__(self) -> str:
        what = "a near tie" if self.near_tie else "no near tie"
        return (
            f"parts at token {self.index}: {self.reference} there, {self.other} here; {what}, the logits are "
            f"{self.gap:.3g} apart where noise is {self.noise:.3g}"
        )


def parting(
    reference: Sequence[int], logits: Sequence[np.ndarray], other: Sequence[int], noise: Sequence[float]
) -> Parting | None:
    """Where `other` leaves `reference`, whose logits are given; None if one is the beginning of the other.

    `noise`: the root mean square by which a logit of `other` may be off, token by token.
    """
    for index, (a, b) in enumerate(zip(reference, other, strict=False)):
        if a != b:
            gap = float(logits[index][a] - logits[index][b])
            return Parting(index, int(a), int(b), gap, float(noise[index]))
    return None
