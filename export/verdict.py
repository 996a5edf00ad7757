"""The verdict on a device: every tensor against what it should be, the first guilty one, and why it may be wrong.

    print(judge("parts", "outputs.h5", model, encodings))

Each tensor is held against two references (`export/references.py`): the float oracle, and what quantization makes of
it. The part of the difference that the second explains is the price of quantization; the rest is what the compiler or
the device did, and has to be explained by rounding (`export/figures.py`), or the tensor fails.

**Born here or inherited.** A graph that was fed with golden inputs (isolated) shows its own error alone. One that was
fed with the device's own outputs (chained) may only hand on what it was given: then the reference is computed from just
those inputs, and with the device's tensors in the place of its own, and what agrees with that is inherited.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refimpl
from export.causes import CAUSES, Cause, Evidence, likely_causes
from export.device import Answer, Way, fit_answers
from export.emit import Arrays
from export.figures import Figures, Thresholds, measure
from export.parts import GraphSpec, Value, boundary, carry
from export.references import TEXTS, Kind, References
from export.verify import unpadded
from golden.compare import Difference, Report
from golden.tolerance import Tolerance, tolerances
from refimpl.config import Config
from refimpl.encodings import Encodings
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl.model import Model
from refimpl.names import taps

FORMAT = "refimpl verdict 1"
DERIVED = Thresholds()  # no number given: the rules of `export/figures.py`
SIMULATED = ("simulation", "even")
SUSPECTS = 4  # failing tensors whose causes are looked for
LARGEST_RUN = 256 << 20  # bytes of a saved run that is read


@dataclass(frozen=True)
class Verdict:
    """Every tensor's figures in computing order, graph by graph, and what follows from them.

    `kind`: what the device turned out to compute like. `causes`: name of a failing tensor -> why it may be wrong.
    `remarks`: what had to be done to read the outputs, and which graphs have none. `about`: where all of it is from.
    `inside`: what a graph computes that is cut out of the model.
    """

    tensors: tuple[Figures, ...]
    kind: str
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
        """The first failing tensor that did not inherit its error: in isolated graphs, if there are any."""
        born = [tensor for tensor in self.failures if tensor.born != "inherited"]
        return next(iter(sorted(born, key=lambda tensor: tensor.way != "isolated")), next(iter(self.failures), None))

    @property
    def suspects(self) -> list[str]:
        """The operations of which one is wrong: from the last tensor known to be right before the guilty one, to it."""
        guilty = self.guilty
        if guilty is None:
            return []
        beside = [t for t in self.tensors if (t.graph, t.way) == (guilty.graph, guilty.way)]
        right = {t.tap for t in beside if self.excess(t) <= 1}
        order = list(taps(self.config))
        stop = order.index(guilty.tap)
        # what a graph is given is right, or the guilty tensor would have inherited; right keys and values are made of
        # the stream before their layer, which then is right, too
        layers = [t.layer for t in beside if t.layer is not None]
        streams = [boundary(min(layers))] if layers else []
        streams += [boundary(t.layer) for t in beside if t.tap in right and t.layer is not None and t is not guilty]
        streams += [tap for tap in right if tap == "model.norm" or tap.count(".") == 2]
        start = max((order.index(tap) for tap in streams if tap in order[:stop]), default=-1)
        between = [tap for tap in order[start + 1 : stop] if tap not in right]
        if guilty.operation in ("self_attn.key", "self_attn.value"):
            made_of = ("input_layernorm", "W_pack", f"{guilty.operation[10]}_proj")
            between = [tap for tap in between if tap.endswith(made_of)]
        mine = self.inside.get(guilty.graph, between)
        return [*(tap for tap in between if tap in mine), guilty.tap]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if not self.tensors:
            return "differs: nothing was compared"
        like = f"the device computes like {TEXTS[self.kind]}"
        first = self.worst[0]
        by = f"worst {first.name}, {first.problem or f'{self.excess(first):.2g} of what is allowed'}"
        if self:
            rule = "what rounding explains" if self.thresholds == DERIVED else "the given limits"
            return f"agrees: {len(self.tensors)} tensors within {rule}; {like}; {by}"
        guilty = self.guilty
        assert guilty is not None
        said = guilty.problem or f"{self.excess(guilty):.2g} times what is allowed"
        return f"differs: {len(self.failures)} of {len(self.tensors)} tensors; the first is {guilty.name}, {said}"

    @property
    def story(self) -> str:
        """What is wrong, where it begins, and why, in a few sentences; "" if nothing is."""
        guilty = self.guilty
        if guilty is None:
            return ""
        where = f"layer {guilty.layer}, {guilty.operation}" if guilty.layer is not None else guilty.operation
        lines = [f"It begins in {guilty.graph}, {where}" + (f": {guilty.problem}." if guilty.problem else ".")]
        lines += [self._extent(guilty)] if not guilty.problem else []
        if len(self.suspects) > 1:
            until = f"All is right up to {self.before}, so it" if self.before else "It"
            lines.append(f"{until} is one of {at_most(self.suspects, 14)}.")
        cause = self.causes.get(guilty.name)
        lines.append(f"Likely cause: {cause}." if cause else "No known pattern explains it.")
        others = [name for name in self.causes if name != guilty.name]
        lines += [f"Also {name}: {self.causes[name]}." for name in others]
        inherited = sum(tensor.born == "inherited" for tensor in self.failures)
        if inherited:
            lines.append(f"{inherited} other failing tensors only hand on what they were given.")
        return "\n".join(lines)

    @property
    def before(self) -> str:
        """The last tensor before the suspects."""
        order = list(taps(self.config))
        at = order.index(self.suspects[0])
        return order[at - 1] if at else ""

    def _extent(self, guilty: Figures) -> str:
        """Which tokens and heads are off, and by how much."""
        parts = []
        for what, numbers in (("token", guilty.tokens), ("head", guilty.heads)):
            bad = [i for i, x in enumerate(numbers) if not x <= 1]
            if 0 < len(bad) < len(numbers):
                parts.append(f"{what}{'s' if len(bad) > 1 else ''} {at_most(bad, 8)} of {len(numbers)}")
            elif bad and len(numbers) > 1:
                parts.append(f"all {len(numbers)} {what}s")
        lsb = (
            f", up to {guilty.lsb_max:.0f} codes off, {guilty.lsb_over:.0%} by more than one" if guilty.lsb_max else ""
        )
        cost = f"; quantization alone costs {guilty.cost_sqnr:.1f} dB" if guilty.kind not in ("float",) else ""
        place = ", ".join(parts) or "a little everywhere"
        return f"Wrong in {place}: {guilty.sqnr:.1f} dB to {TEXTS[self.kind]}{lsb}{cost}."

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
        return "\n".join(filter(None, [self.summary, self.story, *last, *self.remarks, self.table()]))

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
            "format": FORMAT, "agrees": bool(self), "summary": self.summary, "kind": self.kind,
            "guilty": guilty.name if guilty else None, "suspects": self.suspects,
            "causes": {name: asdict(cause) for name, cause in self.causes.items()}, "remarks": self.remarks,
            "about": self.about, "inside": self.inside, "thresholds": asdict(self.thresholds),
            "config": asdict(self.config), "failures": [t.name for t in self.failures],
            "tensors": [t.to_json() for t in self.tensors],
        }, ensure_ascii=False, allow_nan=False)  # fmt: skip

    def judged(self, thresholds: Thresholds) -> Verdict:
        """The same run by other thresholds. Causes stay those that were found when the arrays were there."""
        return replace(self, thresholds=thresholds)


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
        causes = {name: Cause(**{key: str(value) for key, value in cause.items()})
                  for name, cause in stored["causes"].items()}  # fmt: skip
        if stored["kind"] not in TEXTS or any(t.tap not in known for t in tensors):
            raise ValueError("it is of another model than it says")
        remarks = tuple(str(remark) for remark in stored["remarks"])
        limits = Thresholds(**{k: None if v is None else float(v) for k, v in stored["thresholds"].items()})
        inside = {str(graph): tuple(tap for tap in inner if tap in known) for graph, inner in stored["inside"].items()}
        return Verdict(tensors, stored["kind"], config, causes, remarks, dict(stored["about"]), limits, inside)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}; run verify again") from None


def save_run(verdict: Verdict, path: str | Path) -> None:
    """Writes a run, whole or not at all."""
    write_whole(path, verdict.to_json())


def write_whole(path: str | Path, text: str) -> None:
    """Writes a file, whole or not at all. Raises InputError where that cannot be done."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None


def judge(
    folder: str | Path,
    outputs: Any,
    model: Model | None = None,
    encodings: Encodings | None = None,
    engine: str = "auto",
    way: Way = "isolated",
    graph: str | None = None,
    dtype: str = "float32",
    thresholds: Thresholds = DERIVED,
) -> Verdict:
    """The verdict on what a device returned for the export in `folder`.

    `outputs`, `way`, `graph`: see `export.device.read_answers`. `model`: what was exported, for the simulation, for
    probes inside a graph, and for causes that have to be computed. `encodings`: the grids of a quantized device.
    `dtype`: the floats of one that is not quantized, float32 or float16.

    Raises InputError for outputs that do not fit the export, and a model or encodings that are not its own.
    """
    references = References(Path(folder), model, encodings, engine)
    grids = references.grids
    answers = fit_answers(references.plan, outputs, grids, way, graph)
    trial = Trial(references, answers, dtype)
    kinds = references.kinds
    found: dict[Kind, list[Figures]] = {}
    for kind in tqdm(kinds, "judging", unit="reference", disable=None, leave=False):
        found[kind] = list(trial.measured(kind))
        if not any(thresholds.excess(figures) > 1 for figures in found[kind]):
            break
    kind = min(found, key=lambda kind: _misfit(found[kind], thresholds))
    tensors = trial.with_birth(kind, found[kind], thresholds)
    causes = trial.causes(kind, tensors, thresholds)
    absent = [name for name in references.specs if name not in {answer.spec.name for answer in answers}]
    remarks = [f"{answer.spec.name}/{answer.way}: {remark}" for answer in answers for remark in answer.remarks]
    remarks += [f"not judged, without outputs: {at_most(absent, 6)}"] if absent else []
    about = {
        "refimpl": refimpl.__version__, "numpy": np.__version__, "export": str(folder), "outputs": _said(outputs),
        "model": model.config.family if model else None, "reference": TEXTS[kind],
        "encodings": len(encodings) if encodings else None, "dtype": dtype,
        "prompt": f"{references.plan.prompt} tokens",
    }  # fmt: skip
    inside = {name: tuple(spec.taps) for name, spec in references.specs.items() if spec.cut}
    return Verdict(tuple(tensors), kind, references.plan.config, causes, tuple(remarks), about, thresholds, inside)


def _said(outputs: Any) -> str:
    return str(outputs) if isinstance(outputs, str | Path) else f"a mapping of {at_most(outputs, 3)}"


def _misfit(found: list[Figures], thresholds: Thresholds) -> tuple[bool, float]:
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
        after_prompt: dict[str, Arrays] = {}
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
                    base = self._run(noise, spec, inputs, "isolated", wanted) if noise and kind != "ends" else None
                    yield one, reference, base
                if chained:
                    made: dict[str, Arrays] = {}
                    for name in (kind, noise) if noise else (kind,):
                        flow = flows.setdefault(name, Arrays())
                        linked = inputs | {v.name: carry(spec, v, flow) for v in spec.inputs if v.source}
                        made[name] = self._run(name, spec, linked, "chained", probed(many) if many else ())
                        flow |= {value.name: made[name][value.name] for value in spec.outputs}
                    if many is not None:
                        yield many, made[kind], made.get(str(noise))
            after_prompt = after_prompt or flows

    def noise(self, kind: Kind) -> Kind | None:
        """What is without the rounding of activations, but otherwise as a kind of reference is.

        Without the model nobody knows that of a simulation; then all that quantization costs is taken for noise.
        """
        if kind in SIMULATED:
            return "weights" if self.references.model is not None else "float"
        return "float" if kind == "ends" else None

    def _run(self, kind: Kind, spec: GraphSpec, inputs: Mapping[str, np.ndarray], way: str, wanted: Any) -> Arrays:
        """A reference's outputs. The float oracle's are stored, and linking its graphs changes nothing in them."""
        if kind == "float" and not wanted:
            return self.references.golden(spec)
        if kind == "simulation" and self.references.model is None:
            return self.references.stored(spec, way)
        return self.references.run(kind, spec, inputs, wanted=wanted)

    def _figures(self, kind: Kind, answer: Answer, reference: Arrays, rounding: Arrays | None) -> Iterator[Figures]:
        spec, golden = answer.spec, self.references.golden(answer.spec)
        if any(name not in golden for name in answer.values):
            golden = golden | self.references.run("float", spec, self.references.inputs(spec), wanted=probed(answer))
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
            limit, grid = self._limit(tap, spec, answer.way), self.references.grids.get(tap)
            yield measure(about, device, right, oracle, limit, grid, base, spec.config)

    def _limit(self, tap: str, spec: GraphSpec, way: str) -> Tolerance:
        if self.dtype == "float32" and tap in self.references.limits:
            return self.references.limits[tap]
        key = (spec.part.number, way)
        if key not in self._rules:
            known = taps(spec.config)
            inside = {f"model.layers.{layer}" for layer in spec.part.layers}
            outside = [name for name in known if ".".join(name.split(".")[:3]) not in inside]
            fed = outside if way == "isolated" else ()
            self._rules[key] = tolerances(spec.config, self.dtype, spec.real + spec.past, fed)
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
            if kind == "simulation" and self.references.model is None:  # it cannot be computed again
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
        noise = self.references.run("weights", spec, inputs, feed, probed(answer)) if kind in SIMULATED else None
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

    def causes(self, kind: Kind, tensors: list[Figures], thresholds: Thresholds) -> dict[str, Cause]:
        """Why the first failing tensors that did not inherit their error may be wrong."""
        bad = [t for t in tensors if not thresholds.excess(t) <= 1 and t.born != "inherited"]
        bad.sort(key=lambda t: t.way != "isolated")
        found: dict[str, Cause] = {}
        for figures in bad[:SUSPECTS]:
            answer = self.answer(self.references.specs[figures.graph], figures.way)
            assert answer is not None
            if figures.problem == "missing":
                continue
            value = next(value for value in answer.values.values() if (value.tap or value.name) == figures.tap)
            linked = figures.way == "chained"
            inputs = self._as_fed(answer) if linked else self.references.inputs(answer.spec)
            evidence = Evidence(self.references, kind, answer, value, inputs)
            cause = likely_causes(evidence, CAUSES)
            if cause and not any(cause == other for other in found.values()):
                found[figures.name] = cause
        return found


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
