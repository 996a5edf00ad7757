"""The verdict on a device: every tensor against what it should be, the first guilty one, and why it may be wrong.

    print(judge("parts", "outputs.h5", model))                  # `export/verdict/trial.py`

Each tensor is held against two references (`measure/references.py`): the float oracle, and what quantization makes of
it. The part of the difference that the second explains is the price of quantization; the rest is what the compiler or
the device did, and has to be explained by rounding (`export/measure/figures.py`), or the tensor fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from export.causes.evidence import Cause
from export.measure.figures import Figures, Thresholds
from export.measure.kinds import KINDS, Kind
from export.measure.places import Known, TapFlow
from golden.compare import Difference, Report
from refimpl.config import Config
from refimpl.errors import InputError, at_most, one_line
from refimpl.files import read_json, write_whole
from refimpl.names import taps

FORMAT = "refimpl verdict 1"
HEADS = ("self_attn.query", "self_attn.key", "self_attn.value")
MUCH = 8
LISTED = 10  # suspects that a sentence names
DERIVED = Thresholds()  # no number given: the rules of `export/measure/figures.py`
LARGEST_RUN = 256 << 20  # bytes of a saved run that is read


@dataclass(frozen=True)
class Verdict:
    """Every tensor's figures in computing order, graph by graph, and what follows from them.

    `kind`: what the device turned out to compute like. `causes`: name of a failing tensor -> why it may be wrong.
    `remarks`: what had to be done to read the outputs, and which graphs have none. `about`: where all of it is from.
    `inside`: the taps that each graph computes, of the whole model by default.
    """

    tensors: tuple[Figures, ...]
    kind: Kind
    config: Config
    causes: Mapping[str, Cause] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Thresholds = DERIVED
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors) and not self.failures

    def excess(self, tensor: Figures) -> float:
        """What the tensor needs over what is allowed: above 1 fails."""
        return self.thresholds.excess(tensor)

    @cached_property
    def failures(self) -> list[Figures]:
        return [tensor for tensor in self.tensors if not self.excess(tensor) <= 1]

    @cached_property
    def worst(self) -> list[Figures]:
        """Largest excess first, then in computing order."""
        return sorted(self.tensors, key=lambda tensor: -self.excess(tensor))

    @property
    def guilty(self) -> Figures | None:
        """The first failing tensor that is there and did not inherit its error: in isolated graphs, if there are."""
        born = [tensor for tensor in self.failures if tensor.born != "inherited"] or self.failures
        return min(born, key=lambda tensor: (tensor.problem == "missing", tensor.way != "isolated"), default=None)

    @property
    def suspects(self) -> list[str]:
        """The operations of which one is wrong: from the last tensor known to be right before the guilty one, to it."""
        return self.suspected(self.guilty) if self.guilty else []

    def suspected(self, guilty: Figures) -> list[str]:
        """The same for any tensor that did not inherit its error."""
        if guilty.operation in HEADS and self._follows(guilty):
            return [guilty.tap]
        flow, beside = self._flow(guilty), self._beside(guilty)
        known = Known(flow, {t.tap: self._proven(t, guilty) for t in beside})
        candidates = set(flow.ancestors[guilty.tap]) - known.right | {guilty.tap}
        return [tap for tap in flow.places if tap in candidates]

    def _beside(self, tensor: Figures) -> list[Figures]:
        """Those that there are of the same run of the same graph."""
        return [t for t in self.tensors if (t.graph, t.way) == (tensor.graph, tensor.way) and t.problem != "missing"]

    def _flow(self, tensor: Figures) -> TapFlow:
        """What follows from what in its graph. What that is given is right, or the tensor would have inherited."""
        return TapFlow(self.config, self.inside.get(tensor.graph) or tuple(taps(self.config)))

    def _proven(self, tensor: Figures, guilty: Figures) -> bool:
        """Whether a tensor is right, and tells that what it is made of is.

        On grids without the model all that quantization costs is allowed; what is to tell anything needs much less.
        """
        blind = self.kind.coded and not self.about.get("model")
        return self.excess(tensor) <= (min(1.0, self.excess(guilty) / MUCH) if blind else 1.0)

    def _follows(self, guilty: Figures) -> bool:
        """Whether a right tensor is made of the guilty one, so that inside of its graph that one was right."""
        return any(self._proven(t, guilty) for t in self.following(guilty))

    def following(self, tensor: Figures) -> list[Figures]:
        """Those of the same run of the same graph that are made of a tensor."""
        made = self._flow(tensor).ancestors
        return [t for t in self._beside(tensor) if tensor.tap in made[t.tap]]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if not self.tensors:
            return "differs: nothing was compared"
        like = f"the device computes like {self.kind.text}"
        first = self.worst[0]
        by = f"worst {first.name}, {first.problem or f'{self.excess(first):.2g} of what is allowed'}"
        if self:
            return f"agrees: {len(self.tensors)} tensors within {self._rule}; {like}; {by}"
        guilty = self.guilty
        assert guilty is not None
        said = guilty.problem or f"{self.excess(guilty):.2g} times what is allowed"
        return f"differs: {len(self.failures)} of {len(self.tensors)} tensors; the first is {guilty.name}, {said}"

    @property
    def _rule(self) -> str:
        """What the tensors were judged by."""
        given = sum(map(self.thresholds.judge, self.tensors))
        others = len(self.tensors) - given
        if not given:
            return "what rounding explains" + ("" if self.thresholds == DERIVED else ", for none has codes to count")
        return "the given limits" + (f", {others} without codes within what rounding explains" if others else "")

    @property
    def story(self) -> str:
        """What is wrong, where it begins, and why, in a few sentences; "" if nothing is."""
        guilty = self.guilty
        if guilty is None:
            return ""
        if guilty.problem == "missing":
            return f"{guilty.name} is not among the outputs; nothing can be said of it."
        where = f"layer {guilty.layer}, {guilty.operation}" if guilty.layer is not None else guilty.operation
        lines = [f"It begins in {guilty.graph}, {where}" + (f": {guilty.problem}." if guilty.problem else ".")]
        lines += [self._extent(guilty)] if not guilty.problem else filter(None, [_first_place(guilty)])
        if len(self.suspects) > 1:
            until = f"All is right up to {self.before}, so it" if self.before else "It"
            count = len(self.suspects)
            among = ", ".join(self.suspects) if count <= LISTED else (
                f"the {count} operations from {self.suspects[0]} to {self.suspects[-1]}")  # fmt: skip
            lines.append(f"{until} is one of {among}.")
        elif guilty.operation in HEADS and self._follows(guilty):
            # what all keys have in common, or keys and queries, is nothing to a softmax of their products
            unseen = "" if guilty.operation == HEADS[2] else "; or attention does not see the error"
            lines.append("What follows from it is right, so its output alone is wrong: its layout, name, scale or copy"
                         f"{unseen}.")  # fmt: skip
        cause = self.causes.get(guilty.name)
        likely = "Likely cause" if cause and not cause.partial else "Perhaps"
        lines.append(f"{likely}: {cause}." if cause else "No known pattern explains it.")
        others = [name for name in self.causes if name != guilty.name]
        lines += [f"Also {name}: {self.causes[name]}." for name in others]
        inherited = sum(tensor.born == "inherited" for tensor in self.failures)
        if inherited:
            lines.append(f"Of the others that fail, {inherited} only hand on what they were given.")
        return "\n".join(lines)

    @property
    def before(self) -> str:
        """The last tensor before the suspects."""
        order = list(taps(self.config))
        at = order.index(self.suspects[0])
        return order[at - 1] if at else ""

    def _extent(self, guilty: Figures) -> str:
        """Which tokens and heads are off, and by how much."""
        parts = _wrong_in(guilty)
        most = guilty.lsb_max or 0
        over = f", {guilty.lsb_over:.0%} by more than one" if most > 1 else ""
        lsb = f", up to {most:.0f} code{'s' * (most > 1)} off{over}" if most else ""
        cost = f"; quantization alone costs {guilty.cost_sqnr:.1f} dB" if guilty.kind.coded else ""
        if parts:
            place = f"Wrong in {', '.join(parts)}"
        elif len(guilty.tokens) == 1:
            place = "Wrong in its one token"
        else:
            place = "Beyond the given limits" if self.thresholds.judge(guilty) else "Wrong by a little everywhere"
        return f"{place}: {guilty.sqnr:.1f} dB to {self.kind.text}{lsb}{cost}."

    def table(self, limit: int = 20) -> str:
        """The worst tensors, a line each."""
        shown = self.worst[:limit]
        width = max([len(tensor.name) for tensor in shown] + [6])
        lines = [f"      {'tensor':{width}}   excess    device      cost   LSB max  over 1  born"]
        for t in shown:
            mark = "ok  " if self.excess(t) <= 1 else "FAIL"
            if t.problem:
                lines.append(f"{mark}  {t.name:{width}}        –  {t.problem}")
                continue
            figures = f"{self.excess(t):7.2g}  {t.sqnr:5.1f} dB  {t.cost_sqnr:5.1f} dB"
            lsb = f"{t.lsb_max:8.0f}  {t.lsb_over:6.1%}" if t.lsb_max is not None else f"{'–':>8}  {'–':>6}"
            lines.append(f"{mark}  {t.name:{width}}  {figures}  {lsb}  {t.born}".rstrip())
        rest = len(self.worst) - limit
        if rest > 0:
            failing = len(self.failures) - sum(not self.excess(t) <= 1 for t in shown)
            lines.append(f"      and {rest} more, {failing or 'none'} of them beyond what is allowed")
        return "\n".join(lines)

    def __str__(self) -> str:
        logits = [t for t in self.tensors if t.kl is not None]
        last = [f"logits of {t.graph}, {t.way}: KL {t.kl:.2g} nats, same top-1 {t.top1:.1%} (quantization alone: "
                f"{t.cost_kl:.2g}, {t.cost_top1:.1%})" for t in logits]  # fmt: skip
        return "\n".join(filter(None, [self.summary, self.story, *last, *self.unmeasured, *self.remarks, self.table()]))

    @property
    def unmeasured(self) -> list[str]:
        """A line for logits of which there is neither KL nor top-1."""
        return [f"logits of {t.graph}, {t.way}: no KL and no top-1, for they are not to be compared: {t.problem}"
                for t in self.tensors if t.tap == "lm_head" and t.kl is None]  # fmt: skip

    @property
    def report(self) -> Report:
        """The verdict as `golden.compare` has it."""
        return Report(tuple(
            Difference(t.name, 1.0, t.reason, t.problem, t.shape, self.excess(t), t.max_abs, sqnr=t.sqnr,
                       cosine=t.cosine, index=t.index, value=t.value, reference=t.reference)
            for t in self.tensors
        ), remark=self.story.replace("\n", " "))  # fmt: skip

    def to_json(self) -> str:
        """Everything, as it is saved: what `read_run` reads."""
        guilty = self.guilty
        return json.dumps({
            "format": FORMAT, "agrees": bool(self), "summary": self.summary, "kind": self.kind.name,
            "guilty": guilty.name if guilty else None, "suspects": self.suspects,
            "causes": {name: asdict(cause) for name, cause in self.causes.items()}, "remarks": self.remarks,
            "about": self.about, "inside": self.inside, "thresholds": asdict(self.thresholds),
            "config": asdict(self.config), "failures": [t.name for t in self.failures],
            "tensors": [t.to_json() for t in self.tensors],
        }, ensure_ascii=False, allow_nan=False)  # fmt: skip

    def judged(self, thresholds: Thresholds) -> Verdict:
        """The same run by other thresholds. Causes stay those that were found when the arrays were there."""
        return replace(self, thresholds=thresholds)


def _wrong_in(tensor: Figures) -> list[str]:
    """Which tokens, and which heads, are beyond what is allowed."""
    parts = []
    for what, numbers in (("token", tensor.tokens), ("head", tensor.heads)):
        bad = [i for i, x in enumerate(numbers) if not x <= 1]
        if 0 < len(bad) < len(numbers):
            parts.append(f"{what}{'s' if len(bad) > 1 else ''} {at_most(bad, 8)} of {len(numbers)}")
        elif bad and len(numbers) > 1:
            parts.append(f"all {len(numbers)} {what}s")
    return parts


def _first_place(tensor: Figures) -> str:
    """Where a tensor is not finite, and its first such value."""
    if not tensor.tokens:
        return ""
    place = ", ".join(_wrong_in(tensor)) or "its one token"
    return f"Not finite in {place}; the first is at {tensor.index}, expected {tensor.reference:.5g}."


def read_run(path: str | Path) -> Verdict:
    """A run that was saved. Raises InputError for anything else."""
    path = Path(path)
    stored = read_json(path, LARGEST_RUN)
    if stored.get("format") != FORMAT:
        raise InputError(f"{path} has the format {stored.get('format')!a:.40}, expected {FORMAT!r}; run verify again")
    try:
        config = Config(**stored["config"])
        tensors = tuple(Figures.from_json(tensor) for tensor in stored["tensors"])
        known = taps(config)
        causes = {name: Cause(one_line(str(cause["name"])), one_line(str(cause["text"])), cause.get("partial") is True)
                  for name, cause in stored["causes"].items()}  # fmt: skip
        remarks = tuple(one_line(str(remark)) for remark in stored["remarks"])
        limits = Thresholds(**{k: None if v is None else float(v) for k, v in stored["thresholds"].items()})
        inside = {graph: tuple(tap for tap in known if tap in set(inner)) for graph, inner in stored["inside"].items()}
        if stored["kind"] not in KINDS or any(t.tap not in inside.get(t.graph, known) for t in tensors):
            raise ValueError("it is of another model than it says")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("it has a tensor twice")
        return Verdict(tensors, KINDS[stored["kind"]], config, causes, remarks, dict(stored["about"]), limits, inside)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; run verify again") from None


def save_run(verdict: Verdict, path: str | Path) -> None:
    """Writes a run, whole or not at all."""
    write_whole(path, verdict.to_json())
