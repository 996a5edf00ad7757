"""A device on trial: its answers beside each kind of reference, and judged by the one that fits best.

**Born here or inherited.** A graph that was fed with golden inputs (isolated) shows its own error alone. A graph that
was fed with the device's own outputs (chained) may only hand on what it was given. So the reference is computed from
just those inputs, and goes on with the device's tensors in the place of its own. A tensor that agrees with it has
inherited its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

import refimpl
from export.causes.evidence import Cause, Evidence
from export.causes.likely import explained
from export.folder.manifest import read_manifest
from export.folder.verify import run_graphs
from export.graphs.plan import Arrays, GraphSpec, Value, Way, carry
from export.measure.device import Answer, fit_answers
from export.measure.figures import ON_BOTH_SIDES, Birth, Comparison, Spot
from export.measure.kinds import WEIGHTS, Kind
from export.measure.limits import AS_SHOWN, Terms, Thresholds
from export.measure.references import References
from export.measure.standard import Right, Standard, shown_dtype
from export.run.engines import Engine
from export.run.executor import Executor
from export.verdict import english
from export.verdict.judged import HERE, MAPPING
from export.verdict.verdict import Verdict
from refimpl.errors import at_most
from refimpl.grids.encodings import Encodings
from refimpl.model import Model

SUSPECTS = 4  # failing tensors whose causes are looked for


class Given(NamedTuple):
    """The outputs of a device, as `measure.device.read_answers` reads them, with what their names do not say.

    `way`: how the graphs were fed; `graph`: the one that these outputs are of.
    """

    outputs: Any
    way: Way = "isolated"
    graph: str | None = None


def judge(
    folder: str | Path,
    outputs: Any,
    model: Model | None = None,
    encodings: Encodings | None = None,
    engine: str = "auto",
    terms: Terms = AS_SHOWN,
) -> Verdict:
    """The verdict on what a device returned for the export in `folder`.

    - `outputs`: a path or a mapping, see `measure.device.read_answers`; or a `Given`, if no name says how the graphs
      were fed, or which graph it is
    - `model`: what was exported, for the simulation, for probes inside a graph, and for causes that have to be computed
    - `encodings`: the grids of a quantized device, by default those that the export has stored
    - `engine`: what computes the graphs if no model is given; `terms`: those on which the device is judged

    Raises InputError for outputs that do not fit the export, and a model or encodings that are not its own.
    """
    given = outputs if isinstance(outputs, Given) else Given(outputs)
    references = References(Path(folder), model, encodings, engine)
    answers = fit_answers(references.plan, given.outputs, references.grids, given.way, given.graph)
    floats, thresholds = terms.dtype or shown_dtype(references, answers), terms.thresholds
    trial = Trial(Standard(references, floats), answers)
    kind, found = trial.standard.likeliest(trial.compared, thresholds)
    tensors = trial.with_birth(kind, found, thresholds)
    halves = not references.grids and any(not thresholds.within(one) for one in tensors) and terms.dtype is None
    remarks = [f"{answer.spec.name}/{answer.way}: {remark}" for answer in answers for remark in answer.remarks]
    if floats != (terms.dtype or "float32"):
        remarks.append(english.HALVES)
    elif halves and all(map(thresholds.within, Trial(Standard(references, "float16"), answers).compared(kind))):
        remarks.append(english.WITHIN_HALVES)
    absent = [name for name in references.specs if name not in {answer.spec.name for answer in answers}]
    remarks += [english.without_outputs(absent)] if absent else []
    about = {
        "refimpl": refimpl.__version__, "numpy": np.__version__, "export": str(folder), "outputs": _said(given.outputs),
        "model": model.config.family if model else None, "reference": kind.text,
        "encodings": len(encodings) if encodings else None, "dtype": floats,
        "prompt": f"{references.plan.prompt} tokens",
    }  # fmt: skip
    inside = {name: tuple(spec.taps) for name, spec in references.specs.items()}
    verdict = Verdict(tuple(tensors), kind, references.plan.config, {}, tuple(remarks), about, thresholds, inside)
    return replace(verdict, causes=trial.causes(verdict))


def verify_on_grids(
    folder: str | Path,
    engine: str | Executor = "auto",
    model: Model | None = None,
    encodings: Encodings | None = None,
    terms: Terms = AS_SHOWN,
) -> Verdict:
    """The verdict on an engine that runs an export whose graphs round by themselves (qdq with encodings).

    `folder.verify.verify` does the same for graphs in float32. `engine` may be any executor; `model`, `encodings` and
    `terms` are those of `judge`. Raises InputError for a folder that is not a whole export.
    """
    folder = Path(folder)
    plan, _ = read_manifest(folder)
    with TemporaryDirectory() as answers:
        here = engine if isinstance(engine, str) else "auto"
        for spec, way, outputs in run_graphs(folder, plan, Engine(engine) if isinstance(engine, str) else engine):
            (Path(answers) / way).mkdir(exist_ok=True)
            np.savez(Path(answers) / way / f"{spec.name}.npz", **outputs)  # type: ignore[arg-type]
        verdict = judge(folder, answers, model, encodings, here, terms)
        return replace(verdict, about={**verdict.about, "outputs": HERE})


def _said(outputs: Any) -> str:
    return str(outputs) if isinstance(outputs, str | Path) else f"{MAPPING} {at_most(outputs, 3)}"


@dataclass(frozen=True, eq=False)
class Trial:
    """The answers of one device, and the standard that they are held to."""

    standard: Standard
    answers: list[Answer]

    @property
    def references(self) -> References:
        return self.standard.references

    def answer(self, spec: GraphSpec, way: str) -> Answer | None:
        return next((a for a in self.answers if (a.spec.name, a.way) == (spec.name, way)), None)

    def compared(self, kind: Kind) -> Iterator[Comparison]:
        """Every tensor beside one kind of reference, in computing order."""
        for answer, right in self._right(kind):
            yield from self.standard.beside(kind, answer, right)

    def _right(self, kind: Kind) -> Iterator[tuple[Answer, Right]]:
        """Each answer with what it should be, run by run."""
        after_prompt: dict[Kind, Arrays] = {}
        for run in self.references.plan.runs:
            linked = {each: Arrays(arrays) for each, arrays in after_prompt.items()}
            for spec in run:
                if (answer := self.answer(spec, "isolated")) is not None:
                    yield answer, self.standard.alone(kind, answer)
                if any(each.way == "chained" for each in self.answers):
                    answer = self.answer(spec, "chained")
                    right = self._linked(kind, spec, linked, answer.probed if answer else [])
                    if answer is not None:
                        yield answer, right
            after_prompt = after_prompt or linked

    def _linked(self, kind: Kind, spec: GraphSpec, linked: dict[Kind, Arrays], wanted: list[str]) -> Right:
        """The right answer of a graph to those of the graphs before it. `linked` holds these and gets this one."""
        other, made = self.standard.unrounded(kind, "chained"), dict[Kind, Arrays]()
        for each in (kind, other) if other else (kind,):
            before = linked.setdefault(each, Arrays())
            fed = self.references.inputs(spec) | {v.name: carry(spec, v, before) for v in spec.inputs if v.source}
            made[each] = self.standard.right(each, spec, fed, "chained", wanted)
            before |= {value.name: made[each][value.name] for value in spec.outputs}
        return Right(made[kind], made[other] if other else None)

    def with_birth(self, kind: Kind, tensors: list[Comparison], thresholds: Thresholds) -> list[Comparison]:
        """The tensors; those that fail know whether they inherited their error, if that can be known."""
        born: dict[str, Birth] = {}
        for answer in self.answers:
            mine = [t for t in tensors if (t.graph, t.way) == (answer.spec.name, answer.way)]
            bad = [t for t in mine if not thresholds.within(t)]
            if not bad:
                continue
            if kind.on_grids and self.references.model is None:
                born |= self._births_by_others(answer, bad, tensors, thresholds)
            else:
                born |= self._births(kind, answer, bad, thresholds)
        return [replace(t, born=born.get(t.name, Birth.UNKNOWN)) for t in tensors]

    def _births_by_others(
        self, answer: Answer, bad: list[Comparison], tensors: list[Comparison], thresholds: Thresholds
    ) -> dict[str, Birth]:
        """Births by the same graph in isolation, for references that cannot be computed again."""
        isolated = {(t.graph, t.tap): thresholds.within(t) for t in tensors if t.way == "isolated"}
        alone = [isolated.get((t.graph, t.tap)) for t in bad]
        born = {t.name: Birth.INHERITED for t, right in zip(bad, alone, strict=True) if right}
        if answer.way == "isolated" or alone[0] is False:
            born[bad[0].name] = Birth.HERE
        return born

    def _births(self, kind: Kind, answer: Answer, bad: list[Comparison], thresholds: Thresholds) -> dict[str, Birth]:
        """Births by what follows from the device's own inputs, and from its own earlier tensors."""
        again, born = {t.tap: t for t in self._from_own_tensors(kind, answer)}, {}
        for at, tensor in enumerate(bad):
            follows = again[tensor.tap]
            right = thresholds.within(follows) or follows.problem == ON_BOTH_SIDES  # what is made of NaN is NaN
            # without a model, nobody knows what a graph's own earlier error did to its later tensors
            known = right or at == 0 or self.references.model is not None
            born[tensor.name] = (Birth.INHERITED if right else Birth.HERE) if known else Birth.UNKNOWN
        return born

    def _from_own_tensors(self, kind: Kind, answer: Answer) -> Iterator[Comparison]:
        """An answer beside what follows from the device's own inputs, and from its own earlier tensors."""
        spec, feed = answer.spec, {}
        inputs = self._as_fed(answer)
        for name, value in answer.values.items() if self.references.model is not None else ():
            if name in answer.arrays and np.isfinite(answer.arrays[name]).all():
                feed[value.tap or name] = _in_layout(value, answer.arrays[name])
        with np.errstate(over="ignore", invalid="ignore"):  # a device's own tensors may be anything
            right = self.references.run(kind, spec, inputs, feed, answer.probed)
            base = self.references.run(WEIGHTS, spec, inputs, feed, answer.probed) if kind.on_grids else None
        yield from self.standard.beside(kind, answer, Right(right, base))

    def _as_fed(self, answer: Answer) -> Arrays:
        """The inputs that a graph had: golden ones, and in a chain what the device gave before."""
        spec, given = answer.spec, Arrays()
        if answer.way == "isolated":
            return self.references.inputs(spec)
        first, *others = self.references.plan.runs
        for run in (first, *others):
            mine = any(each.name == spec.name for each in run)
            for each in run:
                if each.name == spec.name:
                    linked = {v.name: carry(spec, v, given) for v in spec.inputs if v.source in given}
                    return self.references.inputs(spec) | linked
                before = self.answer(each, "chained")
                if before is not None and (mine or run is first):  # the prompt hands on its cache alone
                    given |= {name: x for name, x in before.arrays.items() if mine or name.startswith("past_")}
        raise ValueError(f"{spec.name} is in no run")

    def causes(self, verdict: Verdict) -> dict[str, Cause]:
        """Why the first failing tensors that did not inherit their error may be wrong.

        Of tensors that share a suspect, only the first is looked into.
        """
        bad = [t for t in verdict.failures if t.born != Birth.INHERITED]
        bad.sort(key=lambda t: t.way != "isolated")
        found: dict[str, Cause] = {}
        doubted: set[str] = set()
        for tensor in bad[:SUSPECTS]:
            if tensor.problem == "missing":
                continue
            suspects = tuple(verdict.suspected(tensor))
            if not doubted.isdisjoint(suspects):
                continue
            doubted.update(suspects)
            cause = explained(self._evidence(verdict, tensor, suspects))
            if cause and not any(cause == other for other in found.values()):
                found[tensor.name] = cause
        return found

    def _evidence(self, verdict: Verdict, tensor: Comparison, suspects: tuple[str, ...]) -> Evidence:
        spec, kind = self.references.specs[tensor.graph], verdict.kind
        answer = self.answer(spec, tensor.way)
        assert answer is not None
        value = next(value for value in answer.values.values() if (value.tap or value.name) == tensor.tap)
        inputs, raw = self._as_fed(answer), answer.arrays[value.name]
        needs = self.standard.needs(kind, Spot(spec, answer.way, tensor.tap), value, inputs)
        handed_on = any(t.born == Birth.INHERITED for t in verdict.following(tensor))
        return Evidence(self.references, kind, spec, value, inputs, suspects, raw, answer.way, needs, handed_on,
                        dtype=self.standard.dtype)  # fmt: skip


def _in_layout(value: Value, array: np.ndarray) -> np.ndarray:
    return array.transpose(value.tap_axes) if value.tap_axes else array
