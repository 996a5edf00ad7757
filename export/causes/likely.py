"""The cause that explains a wrong tensor best.

A detector looks at a failing tensor and proposes what a device with its fault would have given: `scale` multiplies the
right tensor by a factor, `mask` computes the graph again with another mask. The proposal that comes nearest to the
device's tensor is the likely cause, if it comes much nearer than the right tensor does. So a detector needs no
threshold of its own, and a healthy tensor has no cause, because nothing is nearer to it than the right tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tqdm import tqdm

from export.causes.evidence import Cause, Detector, Evidence, nearness
from export.causes.table import CAUSES

GAIN, ENOUGH, EQUAL = 6.0, 10.0, 3.0  # dB: nearer than the right tensor; near at all; no nearer than another
MOST = 4.0  # times what rounding explains: a cause that leaves more than that explains only a part


def explained(evidence: Evidence) -> Cause | None:
    """Why a tensor may be wrong, by the table of causes or by elimination; None if nothing known explains it."""
    return likeliest(evidence, CAUSES) or by_elimination(evidence)


def likeliest(evidence: Evidence, table: Mapping[str, Detector]) -> Cause | None:
    """The cause in a table that explains a tensor best, or None if none does."""
    healthy = nearness(evidence.device, evidence.expected)
    best, most, needed = None, -math.inf, 0.0
    for name, detector in tqdm(table.items(), "explaining", unit="cause", disable=None, leave=False):
        for guess in detector(evidence):
            if guess.certain:
                return Cause(name, guess.text)
            device = evidence.device if guess.device is None else guess.device
            at = (slice(None),) * evidence.axes.token + (slice(*guess.tokens),)
            near = nearness(device[at], guess.predicted[at])
            if near >= max(healthy + GAIN, ENOUGH) and near > most + (EQUAL if best else 0):
                best, most = Cause(name, guess.text), near
                needed = evidence.needs(device[at], guess.predicted[at], at)
                if needed <= 1:  # nothing is left to explain
                    return best
    return replace(best, partial=needed > MOST) if best else None


def by_elimination(e: Evidence) -> Cause | None:
    """The weights, if the only suspect is one operation with a weight of its own."""
    if len(e.suspects) == 1 and e.references.model is not None and f"{e.tap}.weight" in e.references.model.weights:
        text = (
            f"what goes into {e.tap} is right and what comes out of it is wrong, so the device has other weights than "
            "the model (a stale file?), or computes this one operation wrongly"
        )
        return Cause("weights", text)
    return None
