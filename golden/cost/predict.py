"""What quantization alone will do to each tensor, before any device runs: the simulator against the float model.

Each tensor gets two SQNRs in dB, 10 log10 of the tensor's energy over the energy of its error:

- own: the inputs are the float model's, so the error is what this operation, its weight and its grid add
- total: the error in the simulated run, which includes everything that the tensor inherits

A device that is much worse than `total` on a tensor is wrong there; a device that is as bad is only quantized.
`what_if` shows what more bits for some tensors would gain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from golden.cost.quality import Quality, quality
from golden.cost.reading import AS_USUAL, Reading
from refimpl.grids.calibrate import CHUNK
from refimpl.grids.encodings import Encodings, grid_of
from refimpl.model import Model
from refimpl.names import taps
from refimpl.sweep import Result
from refimpl.trace import Tap, feeding, recording, silent
from refimpl.windows import WINDOW, cut
from refimpl_kernels.affine import Rounding


@dataclass(frozen=True)
class Noise:
    """One tensor: the `bits` of its grid, or None if it has no grid; its `own` and its `total` SQNR in dB."""

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
        """A line for each of the tensors that add most noise of their own."""
        worst = sorted(self.tensors, key=lambda noise: noise.own)
        width = max(len(noise.name) for noise in worst[:limit])
        lines = [f"{'tensor':{width}}  bits       own     total"]
        for n in worst[:limit]:
            lines.append(f"{n.name:{width}}  {n.bits or '–':>4}  {n.own:5.1f} dB  {n.total:5.1f} dB")
        rest = len(worst) - limit
        return "\n".join(lines + [f"and {rest} more that add less noise of their own"] * (rest > 0))

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
    reading: Reading = AS_USUAL,
    rounding: Rounding = "away",
    integer: bool = False,
) -> Prediction:
    """The noise that `encodings` add to each tensor of a model, on a text or its ids.

    `rounding`, `integer`: see `Model.simulate`. Memory holds the tensors of one layer and one window. Raises
    InputError for encodings of another model.
    """
    simulated = model.simulate(encodings, rounding, integer)
    pieces = [(model, simulated, row, reading.dtype) for row in cut(model, ids, reading.window_or(WINDOW))]
    energy: dict[str, np.ndarray] = {}
    for found in reading.each(energies, pieces, "predicting"):
        for name, sums in found.items():
            energy[name] = energy.get(name, 0.0) + sums
    noises = []
    for name in taps(model.config):
        signal, own, total = energy[name]
        grid = grid_of(encodings, model.config, name)
        noises.append(Noise(name, grid.bits if grid else None, decibel(signal, own), decibel(signal, total)))
    return Prediction(tuple(noises), sum(len(row) for _, _, row, _ in pieces))


def energies(model: Model, simulated: Model, ids: np.ndarray, dtype: str) -> Result:
    """tensor -> (3,) float64: its sum of squares, and those of its own and of its total error, in one forward.

    Three runs go side by side, layer by layer: the float model, the simulator fed by it, and the simulator alone.
    """
    energy: dict[str, np.ndarray] = {}
    right: dict[str, np.ndarray] = {}  # the float model's tensors of this layer
    exact = model.stages(ids, dtype, recording(right))
    own = simulated.stages(ids, dtype, measuring(energy, right, 1, then=feeding(right)))
    total = simulated.stages(ids, dtype, measuring(energy, right, 2))
    for _ in zip(exact, own, total, strict=True):
        right.clear()
    return energy


def measuring(energy: dict[str, np.ndarray], right: Mapping[str, np.ndarray], which: int, then: Tap = silent) -> Tap:
    """A tap that adds the energy of each tensor's difference from `right` to `energy[name][which]`.

    Where `which` is 1, it adds the energy of the tensor itself to place 0, too.
    """

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
    """10 log10(signal / error): infinite without an error."""
    return math.inf if not error else 10 * math.log10(signal / error) if signal else -math.inf


@dataclass(frozen=True)
class Outcome:
    """What a change of bits gives: `what` was changed, in how many encodings, and the quality after it."""

    what: str
    changed: int
    quality: Quality


def what_if(
    model: Model,
    encodings: Encodings,
    ids,
    changes: Sequence[tuple[str, int]],
    reading: Reading = AS_USUAL,
    rounding: Rounding = "away",
    integer: bool = False,
) -> list[Outcome]:
    """The quality of a model with these encodings, and with each change alone: a glob and the bits of what matches.

    Raises InputError for a glob that matches nothing.
    """
    reading = replace(reading, window=reading.window_or(WINDOW))
    variants = [("as encoded", 0, encodings)]
    for pattern, bits in changes:
        changed = encodings.raised(pattern, bits, model.weights)
        count = sum(encodings[name] != changed[name] for name in encodings)
        variants.append((f"{pattern} at {bits} bits", count, changed))
    ids = model.token_ids(ids)[0]
    outcomes = []
    for what, count, variant in tqdm(variants, "comparing", disable=None, leave=False):
        simulated = model.simulate(variant, rounding, integer)
        outcomes.append(Outcome(what, count, quality(simulated, model, ids, reading)))
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """A line for each outcome, with its gain over the first one."""
    first, width = outcomes[0].quality, max(len(o.what) for o in outcomes)
    lines = [f"{'':{width}}  changed  SQNR of logits          KL        perplexity  same top-1"]
    for o in outcomes:
        q, gain = o.quality, f"{o.quality.sqnr - first.sqnr:+5.1f}" if o is not outcomes[0] else ""
        lines.append(f"{o.what:{width}}  {o.changed:7}  {q.sqnr:5.1f} dB {gain:5}  {q.kl_mean:11.5f}  "
                     f"{q.perplexity:16.2f}  {q.same_top:10.1%}")  # fmt: skip
    return "\n".join([*lines, f"{'float model':{width}}  {'':40}  {first.reference_perplexity:12.2f}"])


def outcomes_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as JSON; an infinite SQNR is null."""
    rows = [{"what": o.what, "changed": o.changed, **asdict(o.quality)} for o in outcomes]
    return json.dumps([{k: None if v == math.inf else v for k, v in row.items()} for row in rows], allow_nan=False)
