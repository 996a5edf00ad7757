"""The operation that is wrong, found with the fewest runs of a device whose outputs are known to be wrong.

    print(bisect("parts", Engine("onnxruntime"), model))

A run is a graph with a tap more among its outputs, or cut off at that tap (`measure/places.py`), given the export's
golden inputs, and judged as any device's outputs are (`verdict/trial.py`). Taps are a DAG: what is wrong somewhere is
wrong in all that follows from it, and in nothing else. So what may be at fault are a wrong tensor and those that it
follows from, less those that a right one follows from; and the next to be shown is the one that halves them. The first
run shows the outputs alone, and the last what the guilty tensor follows from: a verdict is not inferred, both sides of
the operation have been seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from tqdm import tqdm

import refimpl
from export.causes.evidence import Evidence
from export.causes.likely import explained
from export.folder.manifest import read_manifest
from export.graphs.plan import Arrays
from export.measure.device import Answer
from export.measure.figures import Figures, Thresholds, measure
from export.measure.kinds import ENDS, FLOAT, KINDS, Kind
from export.measure.places import Dataflow, Known, Place
from export.measure.references import References
from export.phone.source import arrays_digest, digest
from export.run.engines import Engine
from export.run.executor import Executor, ends
from export.run.ledger import Ledger, lock
from export.verdict.trial import HALVES, Trial, misfit, shown_dtype
from export.verdict.verdict import DERIVED
from golden.compare import finite
from refimpl.errors import InputError, at_most
from refimpl.files import sha256
from refimpl.grids.encodings import Encodings, Float16, near
from refimpl.model import Model
from refimpl.names import taps

JOURNAL = "bisect.jsonl"
WORK = ".bisect-"  # how the folders of the graphs that are run begin
KEPT = 64 << 20  # bytes of references that are kept between runs; what is larger is computed again


@dataclass
class Search(Known):
    """What may be at fault, and what to show next. `hidden`: places that the fault is gone with when they are shown."""

    hidden: set[str] = field(default_factory=set)

    def next(self, probes: int = 1, alone: bool = False) -> list[str]:
        """What to show in the next run: with one of them, that which leaves the fewest candidates at the worst.

        With more, each in turn is the one that best splits what those before it leave. When that leaves one, what it
        follows from is shown in the same run, so that both sides of the operation have been seen; `alone` shows
        never more than one. Empty when all is known.
        """
        candidates = self.candidates
        cells, chosen = [candidates], list[str]()
        free = [name for name in self.flow.places if name in candidates - self.seen.keys() - self.hidden]
        clears = {name: replace(self, seen={**self.seen, name: True}).right for name in free}
        while free and len(chosen) < probes and max(map(len, cells)) > 1:
            split = {name: self._split(cells, name, clears[name]) for name in free}
            best = min(free, key=lambda name: sorted(map(len, split[name]), reverse=True))
            chosen.append(best)
            free.remove(best)
            cells = split[best]
        if max(map(len, cells), default=1) == 1:
            known = {*self.seen, *self.hidden, *chosen}
            chosen += [name for name in self.flow.places
                       if name not in known and any(name in self.flow.behind[one] for one in candidates)]  # fmt: skip
        return chosen[:1] if alone else chosen

    def _split(self, cells: Iterable[set[str]], name: str, clears: set[str]) -> list[set[str]]:
        """What each cell leaves if a place is wrong, and if it is right."""
        wrong = self.flow.ancestors[name]
        return [part for cell in cells for part in (cell & wrong, cell - clears) if part]


@dataclass(frozen=True)
class Run:
    """One run: what it `showed` beside the outputs, or `until` where it went; the figures of all that it gave.

    `gone`: the fault was not there any more.
    """

    showed: tuple[str, ...]
    until: bool
    figures: Mapping[str, Figures]
    wrong: tuple[str, ...]
    gone: bool = False

    def __str__(self) -> str:
        what = at_most(self.showed, 4)
        text = f"up to {what}" if self.until and what else f"with {what}" if what else "as it is"
        if self.gone:
            return f"{text}: the outputs are right"
        shown = [name for name in self.wrong if name in self.showed or not self.showed]
        return f"{text}: {'wrong ' + at_most(shown, 4) if shown else 'right'}"


@dataclass(frozen=True)
class Finding:
    """Where a device goes wrong: `guilty` is the first wrong tensor, which follows from `given`.

    `rivals`: what else may be the first, where that could not be seen. `agrees`: nothing is wrong at all.
    `beside`: wrong outputs that do not follow from the guilty one; `spread`: those that do. `pieces`: the values of it
    that are wrong, where it is in pieces. `nodes`: the operations that compute it, or those pieces, from what is given,
    type and name. `taps`: how many there are to search, `bound` the runs that one fault takes at most.
    """

    graph: str
    kind: Kind
    runs: tuple[Run, ...]
    healthy: tuple[str, ...] = ()
    guilty: str | None = None
    tap: str = ""
    meaning: str = ""
    figures: Figures | None = None
    excess: float = 0.0
    given: Mapping[str, Figures] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    nodes: tuple[tuple[str, str], ...] = ()
    hidden: tuple[str, ...] = ()
    cause: str | None = None
    taps: int = 0
    known: bool = False
    remarks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether nothing is wrong."""
        return self.guilty is None

    @property
    def bound(self) -> int:
        return math.ceil(math.log2(max(self.taps, 1))) + 1

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if self.guilty is None:
            return f"agrees: the outputs of {at_most(self.healthy, 4)} are right; nothing to localise"
        if self.rivals:
            return f"differs: between {at_most(self.rivals, 6)} in {self.graph}; nearer it cannot be seen"
        return f"differs: {self.guilty} of {self.graph} is the first that is wrong; {len(self.runs)} runs"

    def __str__(self) -> str:
        if self.guilty is None or self.figures is None:
            return "\n".join([self.summary, *self.remarks])
        lines = [self.summary]
        layer = self.figures.layer
        where = f"layer {layer}, {self.figures.operation}" if layer is not None else self.tap
        lines.append(f"{where}: {self.meaning}" + (f"; as {self.guilty}" if self.guilty != self.tap else ""))
        lines.append("computed by " + at_most([f"{op} {name}" for op, name in self.nodes], 8))
        right = [f"{name} ({one.sqnr:.1f} dB)" for name, one in self.given.items()]
        lines.append(f"from what is right: {at_most(right, 6)}" if right else "from the graph's inputs")
        lines.append(self._extent())
        lines.append(f"Likely cause: {self.cause}." if self.cause else "No known pattern explains it.")
        if self.hidden:
            lines.append(f"The fault is gone when {at_most(self.hidden, 4)} is shown, so it comes of how the compiler "
                         "joins operations there; graphs cut off there (--until) may keep it.")  # fmt: skip
        if self.beside:
            lines.append(f"Wrong as well, and not because of it: {at_most(self.beside, 4)}; so there is another fault.")
        hides = "What follows from it is wrong anyway; others may hide there." if self.spread else (
            "No output that follows from it is wrong.")  # fmt: skip
        lines.append(f"{hides} Mend it, and bisect again.")
        known = "the outputs were known; " if self.known else ""
        lines.append(f"{known}{len(self.runs)} runs, at most {self.bound} for one fault among {self.taps} taps:")
        lines += [f"  {i}. {run}" for i, run in enumerate(self.runs, 1)]
        lines += [f"The outputs of {at_most(self.healthy, 4)} are right."] if self.healthy else []
        lines += self.remarks
        return "\n".join(lines)

    def _extent(self) -> str:
        """How wrong, and where in the tensor."""
        one = self.figures
        assert one is not None
        if one.problem:
            return f"It is wrong: {one.problem}."
        parts = [f"wrong only in {at_most(self.pieces, 6)}"] if self.pieces else []
        for what, numbers in (("token", one.tokens), ("head", one.heads)):
            bad = [i for i, x in enumerate(numbers) if not x <= 1]
            if 0 < len(bad) < len(numbers):
                parts.append(f"{what}{'s' if len(bad) > 1 else ''} {at_most(bad, 6)} of {len(numbers)}")
        place = f", {', '.join(parts)}" if parts else ""
        at = f"{one.value:.5g} at {one.index}, expected {one.reference:.5g}".replace(",)", ")")
        return (f"It has {one.sqnr:.1f} dB to {one.kind.text}, {self.excess:.2g} times what is allowed{place}; "
                f"worst {at}.")  # fmt: skip

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(finite({
            "agrees": bool(self), "summary": self.summary, "graph": self.graph, "reference": self.kind.name,
            "guilty": self.guilty, "tap": self.tap or None, "layer": self.figures and self.figures.layer,
            "pieces": self.pieces, "nodes": [{"op": op, "name": name} for op, name in self.nodes],
            "given": {name: one.to_json() for name, one in self.given.items()},
            "figures": self.figures and self.figures.to_json(), "excess": self.excess, "rivals": self.rivals,
            "beside": self.beside, "spread": self.spread, "hidden": self.hidden, "cause": self.cause,
            "taps": self.taps, "bound": self.bound,
            "runs": [{"showed": run.showed, "until": run.until, "wrong": run.wrong, "gone": run.gone}
                     for run in self.runs],
            "healthy": self.healthy, "remarks": self.remarks,
        }), ensure_ascii=False, allow_nan=False)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judge:
    """What one graph should compute, and how far a run may be from it."""

    references: References
    flow: Dataflow
    dtype: str | None = None  # until a run has shown it

    @property
    def spec(self):
        return self.flow.spec

    @cached_property
    def inputs(self) -> Arrays:
        return self.references.inputs(self.spec)

    @cached_property
    def outputs(self) -> list[Place]:
        return [one for one in self.flow.places.values() if one.is_output]

    @cached_property
    def grids_digest(self) -> str:
        """The sha256 of the encodings that the device is judged by; "" without any."""
        grids, said = self.references.encodings or Encodings({}), Arrays()
        for name in grids:
            grid = grids[name]
            what = f"{name}, {grid.bits} bits"
            said |= {what: np.empty(0)} if isinstance(grid, Float16) else {
                f"steps of {what}": grid.steps, f"offset of {what}": grid.offset}  # fmt: skip
        return arrays_digest([said]) if said else ""

    def expect_goldens(self) -> None:
        """Raises InputError if the graph itself, the reference where there is no model, does not give its goldens."""
        spec, given = self.spec, self.references.run(FLOAT, self.spec, self.inputs)
        trial = Trial(self.references, [Answer(spec, "isolated", given, {value.name: value for value in spec.outputs})])
        wrong: list[str] = []
        for kind in self.references.kinds:
            wrong = [one.tap for one in trial.measured(kind) if not DERIVED.excess(one) <= 1]
            if not wrong:
                return
        raise InputError(f"{spec.name} as it is does not give its own goldens ({at_most(wrong, 4)}), so "
                         "it tells nothing of a device; export again, or give the model with --model")  # fmt: skip

    def shown_dtype(self, given: Arrays) -> str:
        """The floats that the device computes in, by its outputs."""
        values = {value.name: value for value in self.spec.outputs if value.name in given}
        return shown_dtype(
            self.references, [Answer(self.spec, "isolated", {name: given[name] for name in values}, values)]
        )

    def kind(self, given: Arrays, thresholds: Thresholds) -> Kind:
        """What the device computes like, by its outputs."""
        found: dict[Kind, list[Figures]] = {}
        for kind in self.references.kinds:
            found[kind] = list(self.figures(kind, self.outputs, given).values())
            if all(thresholds.excess(one) <= 1 for one in found[kind]):
                return kind
        return min(found, key=lambda kind: misfit(found[kind], thresholds))

    def figures(self, kind: Kind, places: Sequence[Place], given: Mapping[str, np.ndarray]) -> dict[str, Figures]:
        """How far a run's places are from what a kind of device should give."""
        inside = [one for one in places if not one.is_output]
        if kind.on_grids and self.references.model is None and inside:
            raise InputError("what a quantized device computes inside of a graph takes the model; give it with --model")
        found, noise = {}, self.noise(kind)
        for one in places:
            array = one.array(given)
            if array is None:
                found[one.name] = Figures(self.spec.name, "isolated", one.tap, kind, problem="missing")
                continue
            right, oracle = self.right(kind, one, places), self.right(FLOAT, one, places)
            base = self.right(noise, one, places) if noise else None
            found[one.name] = self._measured(kind, one, one.unpadded(array, self.spec), right, oracle, base)
        return found

    def right(self, kind: Kind, one: Place, beside: Sequence[Place]) -> np.ndarray:
        """What a place should be, as its tap, without padding."""
        known = self._known.setdefault(kind, {})
        if one.name not in known:
            everything = list(self.flow.places.values())
            size = sum(4 * math.prod(each.value.shape) for each in everything)
            # a stored simulation has no more than the outputs
            stored = kind.on_grids and self.references.model is None
            wanted = self.outputs if stored else everything if size <= KEPT else [*self.outputs, *beside]
            known.clear()
            known.update(self._computed(kind, wanted, stored))
        return known[one.name]

    def _computed(self, kind: Kind, places: Sequence[Place], stored: bool) -> dict[str, np.ndarray]:
        spec, shown = self.spec, {value.tap: value for value in self.spec.outputs}
        if stored:
            answer = self.references.stored(spec, "isolated")
        else:
            wanted = {one.tap for one in places} - shown.keys()
            answer = self.references.run(kind, spec, self.inputs, wanted=wanted)
        found = {}
        for one in places:
            value = shown.get(one.tap) or one.value
            array = answer[value.name if one.tap in shown else one.tap]
            found[one.name] = Place(one.name, one.tap, (), value, True).unpadded(array, spec)
        return found

    @cached_property
    def _known(self) -> dict[Kind, dict[str, np.ndarray]]:
        return {}

    def wrong_pieces(self, kind: Kind, one: Place, given: Mapping[str, np.ndarray], limits: Thresholds) -> list[str]:
        """The values of a place in pieces that are wrong, if not all are."""
        array = one.array(given)
        if len(one.values) == 1 or array is None:
            return []
        noise = self.noise(kind)
        whole, right = one.unpadded(array, self.spec), self.right(kind, one, [one])
        base = self.right(noise, one, [one]) if noise else right
        if whole.shape != right.shape:
            return []
        count, bad = len(one.values), []
        for name, *pieces in zip(one.values, *(np.array_split(x, count, one.axis) for x in (whole, right, base)),
                                 strict=True):  # fmt: skip
            figures = self._measured(kind, one, pieces[0], pieces[1], pieces[1], pieces[2] if noise else None)
            if not limits.excess(figures) <= 1:
                bad.append(name)
        return bad if len(bad) < count else []

    def noise(self, kind: Kind) -> Kind | None:
        """What tells how much rounding adds; see `export.verdict.trial.Trial`."""
        return Trial(self.references, []).noise(kind) if kind != ENDS else None

    def _measured(
        self, kind: Kind, one: Place, device: np.ndarray, right: np.ndarray, oracle: np.ndarray,
        base: np.ndarray | None,
    ) -> Figures:  # fmt: skip
        about = Figures(self.spec.name, "isolated", one.tap, kind, output=one.name, position=self.spec.past)
        limit = Trial(self.references, [], self.dtype or "float32").limit(one.tap, self.spec, "isolated")
        grid = self.references.grids.get(one.tap)
        return measure(about, device, right, oracle, limit, grid, base, self.spec.config)

    def cause(self, kind: Kind, one: Place, given: Mapping[str, np.ndarray], suspects: tuple[str, ...]) -> str | None:
        """Why a place may be wrong, if a known fault of the suspects explains it."""
        array = one.array(given)
        shown = {value.tap: value for value in self.spec.outputs}
        value = one.value
        if array is None or array.shape != value.shape:
            return None
        if not one.is_output and one.tap in shown:
            value = shown[one.tap]
            array = array.transpose(np.argsort(value.tap_axes)) if value.tap_axes else array
        raw = array.astype(np.float32)
        cause = explained(Evidence(self.references, kind, self.spec, value, self.inputs, suspects, raw))
        return str(cause) if cause else None


@dataclass(eq=False)
class Bisection:
    """One graph on its way: runs it, keeps what was seen, and stops when the operation is known."""

    judge: Judge
    executor: Executor
    thresholds: Thresholds
    probes: int = 1
    until: bool = False
    label: str | None = None
    ledger: Ledger | None = None
    runs: list[Run] = field(default_factory=list)
    given: dict[str, Arrays] = field(default_factory=dict)  # place that is wrong -> the run that showed it
    _kind: Kind = FLOAT  # what the device computes like, by the first run

    @property
    def flow(self) -> Dataflow:
        return self.judge.flow

    def wrong(self, figures: Mapping[str, Figures]) -> tuple[str, ...]:
        return tuple(name for name in self.flow.places if name in figures
                     and not self.thresholds.excess(figures[name]) <= 1)  # fmt: skip

    def first(self, outputs: Arrays | None = None) -> Run:
        """The graph as it is; or what is known of its outputs."""
        return self._run((), outputs)

    def localise(self, first: Run) -> Finding:
        """The first wrong tensor, and what it follows from."""
        search = Search(self.flow, {name: name not in first.wrong for name in first.figures})
        seen, gone = dict(first.figures), []
        alone = False
        with tqdm(desc="bisecting", unit="run", disable=None, leave=False) as progress:
            while chosen := search.next(self.probes, alone):
                run = self._run(tuple(chosen))
                progress.update()
                if not self.until and not set(run.wrong) & set(first.wrong):
                    self.runs.append(replace(run, gone=True))
                    if len(chosen) == 1:
                        search.hidden.update(chosen)
                        gone += chosen
                    alone = True  # one of them may be seen, where all together may not
                    continue
                self.runs.append(run)
                shown = {name: run.figures[name] for name in chosen}
                seen |= shown
                search.seen |= {name: name not in run.wrong for name in shown}
        return self._finding(search, seen, gone, first)

    def _finding(self, search: Search, seen: Mapping[str, Figures], gone: Sequence[str], first: Run) -> Finding:
        guilty, kind = search.guilty, self._kind
        assert guilty is not None
        one = self.flow.places[guilty]
        given = self._given(guilty)
        pieces = self.judge.wrong_pieces(kind, one, given, self.thresholds) if given else []
        candidates = search.candidates
        rivals = [name for name in self.flow.places if name in candidates]
        suspects = tuple(dict.fromkeys([*(self.flow.places[name].tap for name in rivals), one.tap]))
        follows = {name for name in self.flow.places if guilty in self.flow.ancestors[name]}
        return Finding(
            self.judge.spec.name, kind, tuple(self.runs), guilty=guilty, tap=one.tap,
            meaning=taps(self.judge.spec.config)[one.tap].meaning, figures=seen[guilty],
            excess=self.thresholds.excess(seen[guilty]),
            given={name: seen[name] for name in self.flow.behind[guilty] if name in seen},
            rivals=tuple(rivals) if len(rivals) > 1 else (),
            beside=tuple(name for name in first.wrong if name not in follows),
            spread=tuple(name for name in first.wrong if name in follows and self.flow.places[name].tap != one.tap),
            pieces=tuple(pieces),
            nodes=tuple((node.op_type, node.name) for node in self.flow.computing(guilty, pieces)),
            hidden=tuple(dict.fromkeys(gone)), cause=self.judge.cause(kind, one, given, suspects) if given else None,
            taps=len({each.tap for each in self.flow.places.values()}),
            known=not self.runs or self.runs[0] is not first,
        )  # fmt: skip

    def _given(self, name: str) -> Arrays:
        """The run that showed a place; again, if it was another session's."""
        if name not in self.given:
            showed = next((run.showed for run in self.runs if name in run.figures), ())
            with self._graph(showed) as graph:
                self.given[name] = self._execute(graph)
        return self.given[name]

    def _run(self, showed: tuple[str, ...], outputs: Arrays | None = None) -> Run:
        until = self.until and bool(showed)
        with self._graph(showed) as graph:
            key = self._key(graph) if self.ledger and outputs is None else ""
            if self.ledger and (kept := self.ledger.get(key)):
                sound = kept.get("reference") in KINDS and kept.get("dtype") in ("float32", "float16")
                if not sound or not isinstance(kept.get("figures"), dict):
                    raise InputError(f"{self.ledger.path} is damaged; move it away and begin anew")
                if not showed:
                    self._kind, self.judge = KINDS[kept["reference"]], replace(self.judge, dtype=kept["dtype"])
                figures = {name: Figures.from_json(one) for name, one in kept["figures"].items()}
                return Run(showed, until, figures, self.wrong(figures))
            given = self._execute(graph) if outputs is None else outputs
        if not showed:
            self.judge = replace(self.judge, dtype=self.judge.dtype or self.judge.shown_dtype(given))
            self._kind = self.judge.kind(given, self.thresholds)
        places = [self.flow.places[name] for name in showed]
        places += [] if until else [one for one in self.judge.outputs if one not in places]
        figures = self.judge.figures(self._kind, places, given)
        wrong = self.wrong(figures)
        self.given |= {name: given for name in wrong if name not in self.given}
        if self.ledger and key:
            content = {name: one.to_json() for name, one in figures.items()}
            self.ledger.write(key, kind="run", label=self.label, graph=graph.name, showed=list(showed), until=until,
                              reference=self._kind.name, dtype=self.judge.dtype, figures=content)  # fmt: skip
        return Run(showed, until, figures, wrong)

    def _graph(self, showed: tuple[str, ...]) -> AbstractContextManager[Path]:
        return _Written(self.flow, showed, self.until) if showed else nullcontext(self.flow.folder)

    def _execute(self, graph: Path) -> Arrays:
        inputs, outputs = ends(graph)
        (given,) = self.executor.run(graph, [{name: self.judge.inputs[name] for name in inputs}])
        for name, shape in outputs.items():
            if name in given and given[name].shape != shape:
                raise InputError(f"{name} of {graph.name} came as {given[name].shape}, the graph says {shape}")
        return {name: np.asarray(given[name], np.float32) for name in outputs if name in given}

    def _key(self, graph: Path) -> str:
        """What makes a run the same: the graph's bytes, its inputs, who ran it, and what judged it."""
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(graph.glob("model.*"))
                 if path.name != "model.data"}  # fmt: skip
        references = self.judge.references
        judged = [references.model is not None, self.judge.grids_digest, self.judge.dtype]
        fed = arrays_digest([self.judge.inputs])
        return digest([self.label, graph.name, files, self._weights, fed, judged, refimpl.__version__])

    @cached_property
    def _weights(self) -> str:
        """The sha256 of the graph's weights, which are the same in all runs."""
        path = self.flow.folder / "model.data"
        try:
            return sha256(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; export again") from None


class _Written:
    """A graph's folder that is there as long as it is needed; it is locked, or it would be taken for a killed one's."""

    def __init__(self, flow: Dataflow, showed: Sequence[str], until: bool):
        self.flow, self.showed, self.until = flow, showed, until

    def __enter__(self) -> Path:
        try:
            self.folder = Path(mkdtemp(prefix=WORK, dir=self.flow.folder.parent))
            self.lock = open(self.folder / "lock", "ab")
            lock(self.lock)
            return self.flow.save(self.folder, self.showed, self.until)
        except OSError as error:
            raise InputError(f"cannot write in {self.flow.folder.parent}: {error.strerror}; make room there") from None

    def __exit__(self, *_: object) -> None:
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes the graphs that a killed search has left."""
    for left in folder.glob(f"{WORK}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        try:
            with open(left / "lock", "ab") as file:
                lock(file)
        except OSError:  # it is in use, or not ours to remove
            continue
        shutil.rmtree(left, ignore_errors=True)


def bisect(
    folder: str | Path,
    executor: Executor | None = None,
    model: Model | None = None,
    graph: str | None = None,
    outputs: Any = None,
    until: bool = False,
    probes: int = 1,
    dtype: str | None = None,
    thresholds: Thresholds = DERIVED,
    label: str | None = None,
    encodings: Encodings | None = None,
) -> Finding:
    """The first wrong tensor that `executor` computes for the export in `folder`, and the operation that gives it.

    - `executor`: what runs graphs, by default an engine on this machine
    - `model`: what was exported, whose float64 is the reference, or, for a device on grids, the simulation; without it,
      the graph in ONNX's own evaluator is, if it has the bytes that were exported and gives its goldens
    - `graph`: only this one; by default all are run, and the first with wrong outputs is searched
    - `outputs`: what the device gave already, see `export.measure.device.read_device`; then the first run is saved
    - `until`: graphs are cut off at what they show, for devices that compile a graph otherwise when it shows more
    - `probes`: how many taps a run may show, not counting what the last run shows of the other side
    - `dtype`, `thresholds`: as in `export.verdict.trial.judge`
    - `label`: who the executor is; then what a run showed is kept in `bisect.jsonl` beside the export, and a search
      that was interrupted goes on
    - `encodings`: the grids of a quantized device, by default those that the export has stored

    Raises InputError for a folder that is no export of the model, what the executor cannot run, and no such graph;
    without a model also for graphs that are not as they were exported, or do not give their goldens.
    """
    if type(probes) is not int or probes < 1:
        raise InputError(f"probes is {probes!r:.40}, expected how many taps a run may show, 1 or more")
    folder = Path(folder)
    references = References(folder, model, encodings, engine="reference" if model is None else "auto")
    specs = references.specs
    if graph is not None and graph not in specs:
        raise InputError(f"there is no graph {graph!a:.99} in {folder}{near(graph, set(specs))}")
    if model is None:
        read_manifest(folder)  # for its sha256 of each file
    executor = executor or Engine()
    _sweep(folder)
    known = _known(references, outputs, graph)
    healthy: list[str] = []
    kind, remarks = FLOAT, tuple[str, ...]()
    with Ledger(folder, JOURNAL) if label is not None else nullcontext() as ledger:
        for name, spec in specs.items():
            if (graph is not None and name != graph) or (known and name not in known):
                continue
            judge = Judge(references, Dataflow(folder / name, spec), dtype)
            if model is None:
                judge.expect_goldens()
            one = Bisection(judge, executor, thresholds, probes, until, label, ledger)
            first = one.first(known.get(name))
            kind = one._kind
            remarks = (HALVES,) if one.judge.dtype != (dtype or "float32") else remarks
            if not first.wrong:
                healthy.append(name)
                continue
            one.runs += [] if name in known else [first]
            return replace(one.localise(first), healthy=tuple(healthy), remarks=remarks)
    return Finding("", kind, (), tuple(healthy), remarks=remarks)


def _known(references: References, outputs: Any, graph: str | None) -> dict[str, Arrays]:
    """Graph -> the outputs that a device gave for it."""
    if outputs is None:
        return {}
    from export.measure.device import fit_answers

    answers = fit_answers(references.plan, outputs, references.grids, "isolated", graph)
    found = {answer.spec.name: dict(answer.arrays) for answer in answers if answer.way == "isolated"}
    if not found:
        raise InputError("the outputs are of graphs in a chain, and only those of golden inputs tell where it begins")
    return found
