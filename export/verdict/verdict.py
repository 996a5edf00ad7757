"""The verdict on a device: every tensor beside what it should be, the first guilty one, and why it may be wrong.

    print(judge("parts", "outputs.h5", model))                  # `export/verdict/trial.py`

Each tensor is held against two references (`measure/references.py`): the float oracle, and what quantization makes of
it. The difference between these two is the price of quantization. The rest is what the compiler or the device did:
rounding has to explain it (`measure/figures.py`), or the tensor fails.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from export.measure.flat import to_flat
from export.measure.limits import Thresholds
from export.verdict import story
from export.verdict.judged import Judged
from golden.compare import Difference, Report

FORMAT = "refimpl verdict 1"


@dataclass(frozen=True)
class Verdict(Judged):
    """A judgement in words, as a report and as JSON. True if the device agrees."""

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        return story.summary(self)

    @property
    def story(self) -> str:
        """What is wrong, where it begins, and why, in a few sentences; "" if nothing is wrong."""
        return story.story(self)

    @property
    def next_step(self) -> str:
        """What to do next, and the command for it, in a sentence."""
        return story.next_step(self)

    def table(self, limit: int = 20) -> str:
        """The worst tensors, a line each."""
        return story.table(self, limit)

    def __str__(self) -> str:
        lines = [self.summary, self.story, *story.logits(self), *self.remarks, self.table(), self.next_step]
        return "\n".join(filter(None, lines))

    @property
    def report(self) -> Report:
        """The verdict as a report of `golden.compare`."""
        return Report(tuple(
            Difference(t.name, 1.0, t.needs.reason, t.problem, t.shape, self.excess(t), t.device.max_abs,
                       sqnr=t.device.sqnr, cosine=t.device.cosine, index=t.device.index, value=t.device.value,
                       reference=t.device.reference)
            for t in self.tensors
        ), remark=self.story.replace("\n", " "))  # fmt: skip

    def to_json(self) -> str:
        """Everything, as a saved run has it: `saved.py` reads it."""
        guilty = self.guilty
        return json.dumps({
            "format": FORMAT, "agrees": bool(self), "summary": self.summary, "kind": self.kind.name,
            "guilty": guilty.name if guilty else None, "suspects": self.suspects,
            "causes": {name: asdict(cause) for name, cause in self.causes.items()}, "remarks": self.remarks,
            "about": self.about, "inside": self.inside, "thresholds": asdict(self.thresholds),
            "config": asdict(self.config), "failures": [t.name for t in self.failures],
            "tensors": [to_flat(t) for t in self.tensors],
        }, ensure_ascii=False, allow_nan=False)  # fmt: skip

    def judged(self, thresholds: Thresholds) -> Verdict:
        """The same run by other thresholds. Causes stay those that were found when the arrays were there."""
        return replace(self, thresholds=thresholds)
