"""What quantization alone will do to each tensor, before any device has run: the simulator against the float model.

Each tensor gets two figures, SQNR in dB (10 log10 of the tensor's energy over that of its error):

- own: its inputs are the float model's, so the error is what this operation, its weight and its grid add;
- total: in the simulated run, with all that it inherited.

A device that is much worse than `total` on a tensor is wrong there; one that is as bad is only quantized. `what_if`
says what more bits in some places would gain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from golden.cost.quality import Quality, quality
from refimpl.grids.calibrate import CHUNK
from refimpl.grids.encodings import Encodings, grid_of
from refimpl.model import Model
from refimpl.names import taps
from refimpl.sweep import Pool, Result, sweep
from refimpl.trace import Tap, feeding, recording, silent
from refimpl.windows import WINDOW, cut
from refimpl_kernels.affine import Rounding


@dataclass(frozen=True)
class Noise:
    """Of one tensor: the `bits` of the grid that it stands on, None without one; `own` and `total` SQNR in dB."""

    name: str
    bits: int | None
    own: float
    total: float


@dataclass(frozen=True)
class Prediction:
    """The noise of every tensor in computing order, over `tokens` tokens."""

    tensors: tuple[Noise, ...]
    tokens: int

    def table(self, limit: int = 20) -> str:
        """The tensors that add most noise themselves, a line each."""
        worst = sorted(self.tensors, key=lambda noise: noise.own)
        width = max(len(noise.name) for noise in worst[:limit])
        lines = [f"{'tensor':{width}}  bits       own     total"]
        for n in worst[:limit]:
            lines.append(f"{n.name:{width}}  {n.bits or '–':>4}  {n.own:5.1f} dB  {n.total:5.1f} dB")
        rest = len(worst) - limit
        return "\n".join(lines + [f"and {rest} more, all of less noise of their own"] * (rest > 0))

    def __str__(self) -> str:
        last = self.tensors[-1]
        return f"predicted SQNR of {last.name} {last.total:.1f} dB, {self.tokens} tokens\n{self.table()}"

    def to_json(self) -> str:
        """Everything as JSON, in computing order; null for a tensor without error."""
        rows = [asdict(noise) for noise in self.tensors]
        finite = [{k: None if v in (math.inf, -math.inf) else v for k, v in row.items()} for row in rows]
        return json.dumps({"tokens": self.tokens, "tensors": finite}, ensure_ascii=False, allow_nan=False)


def predict(
    model: Model,
    encodings: Encodings,
    ids,
    window: int = WINDOW,
    rounding: Rounding = "away",
    integer: bool = False,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Prediction:
    """The noise that `encodings` put on each tensor of a model, on a text or its ids, window by window.

    Memory holds what one layer shows of one window. `executor`, `resume`: who computes the windows, and where finished
    ones are kept (`refimpl.sweep`). Raises InputError for encodings of another model.
    """
    simulated = model.simulate(encodings, rounding, integer)
    pieces = [(model, simulated, row, dtype) for row in cut(model, ids, window)]
    energy: dict[str, np.ndarray] = {}
    for found in sweep(energies, pieces, "predicting", executor, resume):
        for name, sums in found.items():
            energy[name] = energy.get(name, 0.0) + sums
    noises = []
    for name in taps(model.config):
        signal, own, total = energy[name]
        grid = grid_of(encodings, model.config, name)
        noises.append(Noise(name, grid.bits if grid else None, decibel(signal, own), decibel(signal, total)))
    return Prediction(tuple(noises), sum(len(row) for _, _, row, _ in pieces))


def energies(model: Model, simulated: Model, ids: np.ndarray, dtype: str) -> Result:
    """Of every tensor of one forward: (3,) float64, the sums of squares of it, of its own error, of its total error.

    Three runs go side by side, layer by layer: the float model, the simulator fed by it, and the simulator alone.
    """
    energy: dict[str, np.ndarray] = {}
    right: dict[str, np.ndarray] = {}  # what the float model has shown in this layer
    exact = model.stages(ids, dtype, recording(right))
    own = simulated.stages(ids, dtype, measuring(energy, right, 1, then=feeding(right)))
    total = simulated.stages(ids, dtype, measuring(energy, right, 2))
    for _ in zip(exact, own, total, strict=True):
        right.clear()
    return energy


def measuring(energy: dict[str, np.ndarray], right: Mapping[str, np.ndarray], which: int, then: Tap = silent) -> Tap:
    """Adds each tensor's energy (once) and that of its difference from `right` to `energy`; passes it on."""

    def tap(name, x):
        sums = energy.setdefault(name, np.zeros(3))
        a, b = x.reshape(-1), right[name].reshape(-1)
        for start in range(0, len(a), CHUNK):
            expected = b[start : start + CHUNK].astype(np.float64)
            sums[which] += np.square(a[start : start + CHUNK] - expected).sum()
            if which == 1:
                sums[0] += np.square(expected).sum()
        return then(name, x)

    return tap


def decibel(signal: float, error: float) -> float:
    """10 log10(signal / error)."""
    return math.inf if not error else 10 * math.log10(signal / error) if signal else -math.inf


@dataclass(frozen=True)
class Outcome:
    """What a change of bits gives: `what` was changed, how many encodings that were, and the quality."""

    what: str
    changed: int
    quality: Quality


def what_if(
    model: Model,
    encodings: Encodings,
    ids,
    changes: Sequence[tuple[str, int]],
    window: int = WINDOW,
    rounding: Rounding = "away",
    integer: bool = False,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> list[Outcome]:
    """The quality of a model with these encodings, then with each of the changes alone: (glob, bits).

    `executor`, `resume`: as in `predict`. Raises InputError for a glob that matches nothing.
    """
    variants = [("as encoded", 0, encodings)]
    for pattern, bits in changes:
        changed = encodings.raised(pattern, bits, model.weights)
        count = sum(encodings[name] != changed[name] for name in encodings)
        variants.append((f"{pattern} at {bits} bits", count, changed))
    ids = model.token_ids(ids)[0]
    outcomes = []
    for what, count, variant in tqdm(variants, "comparing", disable=None, leave=False):
        simulated = model.simulate(variant, rounding, integer)
        outcomes.append(Outcome(what, count, quality(simulated, model, ids, window, dtype, executor, resume)))
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """A line for each outcome, with what it gains over the first."""
    first, width = outcomes[0].quality, max(len(o.what) for o in outcomes)
    lines = [f"{'':{width}}  changed  SQNR of logits          KL        perplexity  same top-1"]
    for o in outcomes:
        q, gain = o.quality, f"{o.quality.sqnr - first.sqnr:+5.1f}" if o is not outcomes[0] else ""
        lines.append(f"{o.what:{width}}  {o.changed:7}  {q.sqnr:5.1f} dB {gain:5}  {q.kl_mean:11.5f}  "
                     f"{q.perplexity:16.2f}  {q.same_top:10.1%}")  # fmt: skip
    return "\n".join([*lines, f"{'float model':{width}}  {'':40}  {first.reference_perplexity:12.2f}"])


def outcomes_json(outcomes: Sequence[Outcome]) -> str:
    """The same as JSON; an infinite SQNR is null."""
    rows = [{"what": o.what, "changed": o.changed, **asdict(o.quality)} for o in outcomes]
    return json.dumps([{k: None if v == math.inf else v for k, v in row.items()} for row in rows], allow_nan=False)
