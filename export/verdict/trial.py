"""A device on trial: its answers measured against each reference that it may have had in mind, and judged by the best.

**Born here or inherited.** A graph that was fed with golden inputs (isolated) shows its own error alone. One that was
fed with the device's own outputs (chained) may only hand on what it was given: then the reference is computed from just
those inputs, and with the device's tensors in the place of its own, and what agrees with that is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

import refimpl
from export.causes.evidence import Cause, Evidence
from export.causes.likely import explained
from export.folder.manifest import read_manifest
from export.folder.verify import run_graphs
from export.graphs.plan import Arrays, GraphSpec, Value, Way, carry, unpadded
from export.measure.device import Answer, fit_answers
from export.measure.figures import Figures, Thresholds, measure
from export.measure.kinds import ENDS, FLOAT, WEIGHTS, Kind
from export.measure.references import References
from export.run.engines import Engine
from export.run.executor import Executor
from export.verdict.verdict import DERIVED, Verdict
from golden.tolerance import Tolerance, tolerances
from refimpl.errors import InputError, at_most
from refimpl.grids.encodings import Encodings
from refimpl.model import Model
from refimpl.names import taps

HALVES = (
    "most outputs of the device are float16 numbers, which the oracle's are not, so it is judged as one that computes "
    "in float16; dtype float32 would not allow that"
)
WITHIN_HALVES = "all of it is within float16's rounding; if that is what the device computes in, give dtype float16"
SUSPECTS = 4  # failing tensors whose causes are looked for


def judge(
    folder: str | Path,
    outputs: Any,
    model: Model | None = None,
    encodings: Encodings | None = None,
    engine: str = "auto",
    way: Way = "isolated",
    graph: str | None = None,
    dtype: str | None = None,
    thresholds: Thresholds = DERIVED,
) -> Verdict:
    """The verdict on what a device returned for the export in `folder`.

    `outputs`, `way`, `graph`: see `measure.device.read_answers`. `model`: what was exported, for the simulation, for
    probes inside a graph, and for causes that have to be computed. `encodings`: the grids of a quantized device.
    `dtype`: the floats of one that is not quantized, float32 or float16, by default what its outputs show.

    Raises InputError for outputs that do not fit the export, and a model or encodings that are not its own.
    """
    references = References(Path(folder), model, encodings, engine)
    grids = references.grids
    answers = fit_answers(references.plan, outputs, grids, way, graph)
    floats = dtype or shown_dtype(references, answers)
    trial = Trial(references, answers, floats)
    kinds = references.kinds
    found: dict[Kind, list[Figures]] = {}
    for kind in tqdm(kinds, "judging", unit="reference", disable=None, leave=False):
        found[kind] = list(trial.measured(kind))
        if not any(thresholds.excess(figures) > 1 for figures in found[kind]):
            break
    kind = min(found, key=lambda kind: misfit(found[kind], thresholds))
    tensors = trial.with_birth(kind, found[kind], thresholds)
    absent = [name for name in references.specs if name not in {answer.spec.name for answer in answers}]
    remarks = [f"{answer.spec.name}/{answer.way}: {remark}" for answer in answers for remark in answer.remarks]
    if floats != (dtype or "float32"):
        remarks.append(HALVES)
    elif not dtype and not references.grids and any(not thresholds.excess(figures) <= 1 for figures in tensors):
        halves = Trial(references, answers, "float16").measured(kind)
        remarks += [WITHIN_HALVES] if all(thresholds.excess(figures) <= 1 for figures in halves) else []
    remarks += [f"not judged, without outputs: {at_most(absent, 6)}"] if absent else []
    about = {
        "refimpl": refimpl.__version__, "numpy": np.__version__, "export": str(folder), "outputs": _said(outputs),
        "model": model.config.family if model else None, "reference": kind.text,
        "encodings": len(encodings) if encodings else None, "dtype": floats,
        "prompt": f"{references.plan.prompt} tokens",
    }  # fmt: skip
    inside = {name: tuple(spec.taps) for name, spec in references.specs.items()}
    verdict = Verdict(tuple(tensors), kind, references.plan.config, {}, tuple(remarks), about, thresholds, inside)
    return replace(verdict, causes=trial.causes(kind, verdict))


def verify_on_grids(folder: str | Path, engine: str | Executor = "auto", dtype: str | None = None) -> Verdict:
    """The verdict on an engine that runs an export whose graphs round by themselves (qdq with encodings).

    What `folder.verify.verify` is for graphs in float32. `engine` may be any executor, and `dtype` its floats, if
    those are no float32. Raises InputError for a folder that is not a whole export.
    """
    folder = Path(folder)
    plan, _ = read_manifest(folder)
    with TemporaryDirectory() as answers:
        here = engine if isinstance(engine, str) else "auto"
        for spec, way, outputs in run_graphs(folder, plan, Engine(engine) if isinstance(engine, str) else engine):
            (Path(answers) / way).mkdir(exist_ok=True)
            np.savez(Path(answers) / way / f"{spec.name}.npz", **outputs)  # type: ignore[arg-type]
        return judge(folder, answers, engine=here, dtype=dtype)


def shown_dtype(references: References, answers: Iterable[Answer]) -> str:
    """The floats of a device without grids: float16 where most outputs are such numbers whose goldens are not.

    Most, and not all: an engine may keep the last operation of a graph in float32. What fits bfloat16 is no float16's.
    """
    if references.grids:
        return "float32"
    pairs = ((golden, answer.arrays.get(name)) for answer in answers
             for name, golden in references.golden(answer.spec).items())  # fmt: skip
    halves = [_fits(device, np.float16) and not _fits(device, ml_dtypes.bfloat16)
              for golden, device in pairs if device is not None and not _fits(golden, np.float16)]  # fmt: skip
    return "float16" if 2 * sum(halves) > len(halves) else "float32"


def _fits(x: np.ndarray, dtype: Any) -> bool:
    """Whether all numbers are of a narrower dtype."""
    with np.errstate(over="ignore"):
        return np.array_equal(x.astype(dtype).astype(x.dtype), x, equal_nan=True)


def _said(outputs: Any) -> str:
    return str(outputs) if isinstance(outputs, str | Path) else f"a mapping of {at_most(outputs, 3)}"


def misfit(found: list[Figures], thresholds: Thresholds) -> tuple[bool, float]:
    """How badly a run fits a reference: whether a tensor fails, then how far it is away, on average in dB.

    What a fault has changed is far from all references alike, and all else is near to the right one.
    """
    fails = any(not thresholds.excess(figures) <= 1 for figures in found)
    return fails, -float(np.mean([np.clip(np.nan_to_num(figures.sqnr), 0, 120) for figures in found]))


@dataclass(frozen=True, eq=False)
class Trial:
    """The answers of one device, and the references that they are held against."""

    references: References
    answers: list[Answer]
    dtype: str = "float32"

    def answer(self, spec: GraphSpec, way: str) -> Answer | None:
        return next((a for a in self.answers if (a.spec.name, a.way) == (spec.name, way)), None)

    def measured(self, kind: Kind) -> Iterator[Figures]:
        """The figures of every tensor against one kind of reference, in computing order."""
        for answer, reference, rounding in self._references(kind):
            yield from self._figures(kind, answer, reference, rounding)

    def _references(self, kind: Kind) -> Iterator[tuple[Answer, Arrays, Arrays | None]]:
        """Each answer with what it should be, and with what that is without the rounding of activations."""
        noise = self.noise(kind)
        after_prompt: dict[Kind, Arrays] = {}
        chained = any(answer.way == "chained" for answer in self.answers)
        for run in self.references.plan.runs:
            flows = {name: Arrays(flow) for name, flow in after_prompt.items()}
            for spec in run:
                inputs = self.references.inputs(spec)
                one, many = (self.answer(spec, way) for way in ("isolated", "chained"))
                if one is not None:
                    wanted = probed(one)
                    reference = self._run(kind, spec, inputs, "isolated", wanted)
                    # float outputs from golden inputs are the golden: without rounding at the ends there is no noise
                    base = self._run(noise, spec, inputs, "isolated", wanted) if noise and kind != ENDS else None
                    yield one, reference, base
                if chained:
                    made: dict[Kind, Arrays] = {}
                    for name in (kind, noise) if noise else (kind,):
                        flow = flows.setdefault(name, Arrays())
                        linked = inputs | {v.name: carry(spec, v, flow) for v in spec.inputs if v.source}
                        made[name] = self._run(name, spec, linked, "chained", probed(many) if many else ())
                        flow |= {value.name: made[name][value.name] for value in spec.outputs}
                    if many is not None:
                        yield many, made[kind], made[noise] if noise else None
            after_prompt = after_prompt or flows

    def noise(self, kind: Kind) -> Kind | None:
        """What is without the rounding of activations, but otherwise as a kind of reference is.

        Without the model nobody knows that of a simulation; then all that quantization costs is taken for noise.
        """
        return kind.noise(self.references.model is not None)

    def _run(self, kind: Kind, spec: GraphSpec, inputs: Mapping[str, np.ndarray], way: str, wanted: Any) -> Arrays:
        """A reference's outputs. The float oracle's are stored, and linking its graphs changes nothing in them."""
        if kind == FLOAT and not wanted:
            return self.references.golden(spec)
        if kind.on_grids and self.references.model is None:
            return self.references.stored(spec, way)
        return self.references.run(kind, spec, inputs, wanted=wanted)

    def _figures(self, kind: Kind, answer: Answer, reference: Arrays, rounding: Arrays | None) -> Iterator[Figures]:
        spec, golden = answer.spec, self.references.golden(answer.spec)
        if any(name not in golden for name in answer.values):
            golden = golden | self.references.run(FLOAT, spec, self.references.inputs(spec), wanted=probed(answer))
        for tap, value in in_order(answer):
            name = value.name
            about = Figures(spec.name, answer.way, tap, kind, output=name, position=spec.past)
            if name not in answer.arrays:
                yield replace(about, problem="missing")
                continue
            if name not in reference:
                raise InputError(f"{tap} of {spec.name} is no output of the graph; give the model that computes it")
            device, right, oracle = (unpadded(value, x[name], spec) for x in (answer.arrays, reference, golden))
            base = unpadded(value, rounding[name], spec) if rounding else None
            limit, grid = self.limit(tap, spec, answer.way), self.references.grids.get(tap)
            yield measure(about, device, right, oracle, limit, grid, base, spec.config)

    def limit(self, tap: str, spec: GraphSpec, way: str) -> Tolerance:
        """The tolerance of a tap in floats."""
        if self.dtype == "float32" and tap in self.references.limits:
            return self.references.limits[tap]
        key = (spec.part.number, way)
        if key not in self._rules:
            known = taps(spec.config)
            inside = {f"model.layers.{layer}" for layer in spec.part.layers}
            outside = [name for name in known if ".".join(name.split(".")[:3]) not in inside]
            fed = outside if way == "isolated" else ()
            scores = self.references.scores
            self._rules[key] = tolerances(spec.config, self.dtype, spec.real + spec.past, fed, scores)
        return self._rules[key][tap]

    @cached_property
    def _rules(self) -> dict[tuple[int, str], dict[str, Tolerance]]:
        return {}

    def with_birth(self, kind: Kind, tensors: list[Figures], thresholds: Thresholds) -> list[Figures]:
        """The tensors, of which those that fail know, if that can be known, whether they inherited their error."""
        born: dict[str, str] = {}
        isolated = {(t.graph, t.tap): thresholds.excess(t) <= 1 for t in tensors if t.way == "isolated"}
        for answer in self.answers:
            mine = [t for t in tensors if (t.graph, t.way) == (answer.spec.name, answer.way)]
            bad = [t for t in mine if not thresholds.excess(t) <= 1]
            if not bad:
                continue
            if kind.on_grids and self.references.model is None:  # it cannot be computed again
                alone = [isolated.get((t.graph, t.tap)) for t in bad]
                born |= {t.name: "inherited" for t, right in zip(bad, alone, strict=True) if right}
                if answer.way == "isolated" or alone[0] is False:
                    born[bad[0].name] = "here"
                continue
            again = {t.tap: t for t in self._from_own_tensors(kind, answer)}
            for at, tensor in enumerate(bad):
                right = thresholds.excess(again[tensor.tap]) <= 1
                # without a model, what a graph's own earlier error did to its later tensors is not known
                known = right or at == 0 or self.references.model is not None
                born[tensor.name] = ("inherited" if right else "here") if known else ""
        return [replace(t, born=born.get(t.name, "")) for t in tensors]

    def _from_own_tensors(self, kind: Kind, answer: Answer) -> Iterator[Figures]:
        """The figures of an answer against what follows from the device's own inputs, and own earlier tensors."""
        spec, feed = answer.spec, {}
        inputs = self._as_fed(answer) if answer.way == "chained" else self.references.inputs(spec)
        for name, value in answer.values.items() if self.references.model is not None else ():
            if name in answer.arrays and np.isfinite(answer.arrays[name]).all():
                feed[value.tap or name] = _in_layout(value, answer.arrays[name])
        right = self.references.run(kind, spec, inputs, feed, probed(answer))
        noise = self.references.run(WEIGHTS, spec, inputs, feed, probed(answer)) if kind.on_grids else None
        yield from self._figures(kind, answer, right, noise)

    def _as_fed(self, answer: Answer) -> Arrays:
        """The inputs that a graph had in the chain: golden ones, and what the device gave before."""
        given, runs = Arrays(), self.references.plan.runs
        for run in runs:
            mine = any(spec.name == answer.spec.name for spec in run)
            for spec in run:
                if spec.name == answer.spec.name:
                    linked = {v.name: carry(spec, v, given) for v in spec.inputs if v.source in given}
                    return self.references.inputs(spec) | linked
                before = self.answer(spec, "chained")
                if before is not None and (mine or run is runs[0]):  # of the prompt the cache alone goes on
                    given |= {name: x for name, x in before.arrays.items() if mine or name.startswith("past_")}
        raise ValueError(f"{answer.spec.name} is in no run")

    def causes(self, kind: Kind, verdict: Verdict) -> dict[str, Cause]:
        """Why the first failing tensors that did not inherit their error may be wrong.

        Those for which the same operations may be at fault are one matter, and the first of them is looked into.
        """
        bad = [t for t in verdict.failures if t.born != "inherited"]
        bad.sort(key=lambda t: t.way != "isolated")
        found: dict[str, Cause] = {}
        doubted: set[str] = set()
        for figures in bad[:SUSPECTS]:
            answer = self.answer(self.references.specs[figures.graph], figures.way)
            assert answer is not None
            if figures.problem == "missing":
                continue
            value = next(value for value in answer.values.values() if (value.tap or value.name) == figures.tap)
            linked = figures.way == "chained"
            inputs = self._as_fed(answer) if linked else self.references.inputs(answer.spec)
            suspects = tuple(verdict.suspected(figures))
            if not doubted.isdisjoint(suspects):
                continue
            doubted.update(suspects)
            needs = self._needs(kind, figures, value, inputs)
            handed_on = any(t.born == "inherited" for t in verdict.following(figures))
            raw = answer.arrays[value.name]
            evidence = Evidence(
                self.references, kind, answer.spec, value, inputs, suspects, raw, answer.way, needs, handed_on
            )
            cause = explained(evidence)
            if cause and not any(cause == other for other in found.values()):
                found[figures.name] = cause
        return found

    def _needs(self, kind: Kind, about: Figures, value: Value, inputs: Mapping[str, np.ndarray]) -> Callable:
        """What a device needs over what is allowed, were what is right another tensor; see `Evidence`."""
        spec, noise = self.references.specs[about.graph], self.noise(kind)
        empty = Figures(about.graph, about.way, about.tap, kind)

        @cache
        def added() -> np.ndarray | None:
            """What the rounding of activations adds to the right tensor."""
            if noise is None or (kind.coded and self.references.model is None):
                return None
            right, base = (self.references.run(k, spec, inputs, wanted=[about.tap])[value.name] for k in (kind, noise))
            return unpadded(value, right, spec).astype(np.float64) - unpadded(value, base, spec)

        def needs(device: np.ndarray, right: np.ndarray, tokens: tuple[slice, ...]) -> float:
            rounding = added()
            base = None if rounding is None else right - rounding[tokens]
            limit, grid = self.limit(about.tap, spec, about.way), self.references.grids.get(about.tap)
            return DERIVED.excess(measure(empty, device, right, right, limit, grid, base))

        return needs


def probed(answer: Answer) -> list[str]:
    """The taps of an answer that are no outputs of the graph."""
    outputs = {value.name for value in answer.spec.outputs}
    return [name for name in answer.values if name not in outputs]


def in_order(answer: Answer) -> list[tuple[str, Value]]:
    """Tap and value of all that an answer should hold, in computing order."""
    shown = {value.tap or name: value for name, value in answer.values.items()}
    return [(tap, shown[tap]) for tap in taps(answer.spec.config) if tap in shown]


def _in_layout(value: Value, array: np.ndarray) -> np.ndarray:
    return array.transpose(value.tap_axes) if value.tap_axes else array
