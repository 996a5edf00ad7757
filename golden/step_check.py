"""The verdict on a training step: the first wrong tensor, whether its error was born there or inherited, and why.

**Born or inherited.** Each wrong gradient is computed again from the judged run's own gradients of the tensors after
it. If the two agree, the gradient has inherited its error; if they differ, the error was born there.

**Why.** The step is taken again with each of `MISTAKES` in it. A mistake is named if the whole judged step then agrees,
within the golden's tolerances. If no mistake does that, the one that leaves the fewest wrong tensors is named, provided
that these are fewer than half.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golden.check import MODEL
from golden.compare import Report, finite
from golden.gradients import compare_gradients
from golden.step import StepGolden, Way, read_step, take
from golden.tolerance import Tolerance
from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.trace import Trace

MISTAKES: dict[str, tuple[str, Way]] = {
    "missing-mean": ("the loss is summed over the labels and not divided by their number (1/N)", Way(divide=False)),
    "mask-leaks": ("labels of -100 count in the loss", Way(mask=False)),
    "summed": ("gradients of accumulated batches are summed, not averaged", Way(average=False)),
    "clipped-each": ("each batch is clipped before the mean, not the mean of all", Way(clip="each")),
    "not-clipped": ("gradients are not clipped", Way(clip="never")),
    "no-z-loss": ("the z-loss is left out", Way(z_loss=False)),
    "norm-head-constant": ("NormHead's row lengths are taken as constants", Way(row_lengths=False)),
    "decayed-norms": ("weight decay holds for norms and biases, too", Way(decay_norms=True)),
    "beta2": ("AdamW's beta2 is PyTorch's usual 0.999", Way(beta2=0.999)),
    "beta2-0.95": ("AdamW's beta2 is 0.95, as in many pretrainings", Way(beta2=0.95)),
}


@dataclass(frozen=True)
class StepReport:
    """A verdict on a step: the `report` of a comparison, and where it differs, what is known of the errors.

    `born`: the tensors whose error was born there. `causes`: keys of MISTAKES. `absent`: how many of the golden's
    tensors the judged side does not have; the verdict does not depend on them.
    """

    report: Report
    born: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    absent: int = 0
    searched: bool = True  # whether causes were looked for

    def __bool__(self) -> bool:
        return bool(self.report)

    @property
    def first(self) -> str:
        """The first wrong tensor on the way back, or ""."""
        return self.report.failures[0].name if self.report.failures else ""

    def __str__(self) -> str:
        absent = f"; {self.absent} of the golden's tensors are not there" if self.absent else ""
        if self or not self.report.failures:
            return f"{self.report.summary}{absent}"
        kind = self.first.rpartition("/")[0].rpartition("/")[2]
        birth = "born there" if self.first in self.born else "inherited"
        birth = {"gradient": f" ({birth})", "forward": ", before the way back has begun"}.get(kind, "")
        lines = [f"differs: {len(self.report.failures)} of {len(self.report.tensors)} tensors; the first wrong one on "
                 f"the way back is {self.first}{birth}{absent}"]  # fmt: skip
        if self.born:
            lines.append(f"wrong by themselves: {', '.join(self.born[:6])}" + (" …" if len(self.born) > 6 else ""))
        lines += [f"cause: {MISTAKES[name][0]} [{name}]" for name in self.causes]
        if not self.causes and self.searched:
            lines.append("cause: no known mistake gives these numbers")
        return "\n".join([*lines, self.report.table(8)])

    def to_json(self) -> str:
        """All of it as JSON."""
        content = {"agrees": bool(self), "first": self.first, "born": self.born, "causes": self.causes}
        return json.dumps(finite({**content, "report": json.loads(self.report.to_json())}), ensure_ascii=False)


def check_step(model: Forward, golden: str | Path | StepGolden, dtype: str | None = None) -> StepReport:
    """Takes the golden's step with this package, and judges it. Raises InputError for another model's golden."""
    truth = golden if isinstance(golden, StepGolden) else read_step(golden)
    for name in MODEL:
        has, expected = getattr(model.config, name), getattr(truth.config, name)
        if has != expected:
            raise InputError(f"this model's {name} is {has}, that of {truth.folder} is {expected}; is it another?")
    dtype = dtype or truth.dtypes[0]
    if dtype not in truth.dtypes:
        raise InputError(f"{truth.folder} has no step in {dtype}, it has {', '.join(truth.dtypes)}")
    reference = truth.trace(dtype)
    ours = take(model, truth.batches, truth.setting, dtype, steps=2 if dtype == "float64" else 1)
    return judge(ours, truth, dtype, model, own_feed=reference)


def judge(
    trace: Mapping[str, Any], truth: StepGolden, dtype: str, model: Forward, own_feed: Mapping[str, Any] | None = None
) -> StepReport:
    """Judges somebody's step by the golden. `model` takes the step again: fed with its gradients, and with mistakes.

    `own_feed`: the golden's tensors, if the judged run is this package's own. The run is fed with their gradients, and
    no cause is looked for, because a fault of this package cannot judge itself.
    """
    reference = truth.trace(dtype)
    allowed = {name: Tolerance(**stored) for name, stored in reference.meta["tolerance"].items()}
    there = [name for name in reference if name in trace]
    report = compare_gradients(trace, _only(reference, there), allowed)
    absent = len(reference) - len(there)
    if report or not there:
        return StepReport(report, absent=absent)
    wrong = [tensor.name for tensor in report.failures]
    steps = 2 if dtype == "float64" else 1
    expected = take(model, truth.batches, truth.setting, dtype, steps=1, feed=own_feed or trace)
    of_taps = [name for name in wrong if "/gradient/" in name and name in expected and name.count("/") == 3]
    one, other = (expected, reference) if own_feed else (trace, expected)
    fed = compare_gradients(_only(one, of_taps), _only(other, of_taps), allowed)
    born = tuple(tensor.name for tensor in fed.failures)
    causes = () if own_feed else _causes(trace, truth, dtype, model, allowed, steps, len(wrong))
    return StepReport(report, born, causes, absent, searched=not own_feed)


def _causes(
    trace: Mapping[str, Any], truth: StepGolden, dtype: str, model: Forward, allowed: Mapping[str, Tolerance],
    steps: int, wrong: int,
) -> tuple[str, ...]:  # fmt: skip
    left = {}
    for name, (_, way) in MISTAKES.items():
        mistaken = take(model, truth.batches, truth.setting, dtype, way, steps)
        mistaken = _only(mistaken, [key for key in truth.trace(dtype) if key in mistaken and key in trace])
        left[name] = len(compare_gradients(trace, mistaken, allowed).failures)
    if exact := [name for name, count in left.items() if not count]:
        return tuple(exact)
    best = min(left, key=lambda name: left[name])
    return (best,) if left[best] < wrong // 2 else ()


def _only(side: Mapping[str, Any], names: list[str]) -> Trace:
    return Trace({name: np.asarray(side[name]) for name in names if name in side})
