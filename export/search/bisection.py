"""The operation that is wrong, found with the fewest runs of a device whose outputs are known to be wrong.

    print(bisect("parts", Engine("onnxruntime"), model))

A run computes a graph with one more tap among its outputs, or cut off at that tap (`measure/places.py`). It gets the
export's golden inputs, and is judged by the same standard as any device's outputs (`measure/standard.py`). A fault
makes everything wrong that follows from it, and nothing else. So the suspects are a wrong tensor and its ancestors,
less the ancestors of right tensors. The next run shows the suspect that halves them (`planner.py`).

The first run shows the outputs alone, and the last run shows the tensors that the guilty one follows from. So no
verdict is inferred: both sides of the operation have been seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refimpl
from export.folder.manifest import read_manifest
from export.graphs.plan import Arrays
from export.measure.device import fit_answers
from export.measure.figures import Comparison
from export.measure.flat import from_flat, to_flat
from export.measure.kinds import FLOAT, KINDS, Kind
from export.measure.limits import AS_SHOWN, Terms, Thresholds
from export.measure.places import Dataflow
from export.measure.references import References
from export.run.engines import Engine
from export.run.executor import Executor, ends
from export.run.ledger import Ledger, arrays_digest, digest
from export.search.finding import Finding, Guilty, SearchRun
from export.search.one_graph import OneGraph
from export.search.planner import Planner
from export.search.written import Written, sweep
from export.verdict import english
from refimpl.errors import InputError
from refimpl.files import sha256
from refimpl.grids.encodings import Encodings, near
from refimpl.model import Model
from refimpl.names import taps

JOURNAL = "bisect.jsonl"


@dataclass(frozen=True)
class Probing:
    """The options of a search in a graph.

    - `graph`: only this one; by default all are run, and the first with wrong outputs is searched
    - `until`: graphs end at the taps that they show, for devices that compile a graph differently with more outputs
    - `probes`: how many taps a run may show; the last run also shows the other side of the operation
    - `label`: the executor's name; with it, each run is kept in `bisect.jsonl` beside the export, and an interrupted
      search goes on
    """

    graph: str | None = None
    until: bool = False
    probes: int = 1
    label: str | None = None

    def __post_init__(self) -> None:
        if type(self.probes) is not int or self.probes < 1:
            raise InputError(f"probes is {self.probes!r:.40}, expected a number of taps for each run, 1 or more")


ONE_BY_ONE = Probing()


@dataclass(eq=False)
class Bisection:
    """The search in one graph: runs it, keeps what was seen, and stops when the operation is known."""

    judge: OneGraph
    executor: Executor
    thresholds: Thresholds
    how: Probing = ONE_BY_ONE
    ledger: Ledger | None = None
    runs: list[SearchRun] = field(default_factory=list)
    given: dict[str, Arrays] = field(default_factory=dict)  # place that is wrong -> the run that showed it
    kind: Kind = FLOAT  # how the device computes, by the first run

    @property
    def flow(self) -> Dataflow:
        return self.judge.flow

    def wrong(self, figures: Mapping[str, Comparison]) -> tuple[str, ...]:
        return tuple(name for name in self.flow.places if name in figures
                     and not self.thresholds.within(figures[name]))  # fmt: skip

    def first(self, outputs: Arrays | None = None) -> SearchRun:
        """The run of the unchanged graph, or its known outputs in place of that run."""
        return self._run((), outputs)

    def localise(self, first: SearchRun) -> Finding:
        """The first wrong tensor, and the places that it follows from."""
        search = Planner(self.flow, {name: name not in first.wrong for name in first.figures})
        seen, gone = dict(first.figures), []
        alone = False
        with tqdm(desc="bisecting", unit="run", disable=None, leave=False) as progress:
            while chosen := search.next(self.how.probes, alone):
                run = self._run(tuple(chosen))
                progress.update()
                if not self.how.until and not set(run.wrong) & set(first.wrong):
                    self.runs.append(replace(run, gone=True))
                    if len(chosen) == 1:
                        search.hidden.update(chosen)
                        gone += chosen
                    alone = True  # one tap may leave the fault in place, where several do not
                    continue
                self.runs.append(run)
                shown = {name: run.figures[name] for name in chosen}
                seen |= shown
                search.seen |= {name: name not in run.wrong for name in shown}
        return self._finding(search, seen, gone, first)

    def _finding(
        self, search: Planner, seen: Mapping[str, Comparison], gone: Sequence[str], first: SearchRun
    ) -> Finding:
        guilty, kind = search.guilty, self.kind
        assert guilty is not None
        one = self.flow.places[guilty]
        given = self._given(guilty)
        pieces = self.judge.wrong_pieces(kind, one, given, self.thresholds) if given else []
        candidates = search.candidates
        rivals = [name for name in self.flow.places if name in candidates]
        suspects = tuple(dict.fromkeys([*(self.flow.places[name].tap for name in rivals), one.tap]))
        follows = {name for name in self.flow.places if guilty in self.flow.ancestors[name]}
        found = Guilty(
            guilty, one.tap, taps(self.judge.spec.config)[one.tap].meaning, seen[guilty],
            self.thresholds.excess(seen[guilty]),
            given={name: seen[name] for name in self.flow.behind[guilty] if name in seen}, pieces=tuple(pieces),
            nodes=tuple((node.op_type, node.name) for node in self.flow.computing(guilty, pieces)),
            cause=self.judge.cause(kind, one, given, suspects) if given else None,
        )  # fmt: skip
        return Finding(
            self.judge.spec.name, kind, tuple(self.runs), first=found,
            rivals=tuple(rivals) if len(rivals) > 1 else (),
            beside=tuple(name for name in first.wrong if name not in follows),
            spread=tuple(name for name in first.wrong if name in follows and self.flow.places[name].tap != one.tap),
            hidden=tuple(dict.fromkeys(gone)), taps=len({each.tap for each in self.flow.places.values()}),
            known=not self.runs or self.runs[0] is not first,
        )  # fmt: skip

    def _given(self, name: str) -> Arrays:
        """The arrays of the run that showed a place; computed again if that run was an earlier session's."""
        if name not in self.given:
            showed = next((run.showed for run in self.runs if name in run.figures), ())
            with self._graph(showed) as graph:
                self.given[name] = self._execute(graph)
        return self.given[name]

    def _run(self, showed: tuple[str, ...], outputs: Arrays | None = None) -> SearchRun:
        until = self.how.until and bool(showed)
        with self._graph(showed) as graph:
            key = self._key(graph) if self.ledger and outputs is None else ""
            if self.ledger and (kept := self.ledger.get(key)):
                sound = kept.get("reference") in KINDS and kept.get("dtype") in ("float32", "float16")
                if not sound or not isinstance(kept.get("figures"), dict):
                    raise InputError(f"{self.ledger.path} is damaged; move it away and begin anew")
                if not showed:
                    self.kind, self.judge = KINDS[kept["reference"]], replace(self.judge, dtype=kept["dtype"])
                figures = {name: from_flat(one) for name, one in kept["figures"].items()}
                return SearchRun(showed, until, figures, self.wrong(figures))
            given = self._execute(graph) if outputs is None else outputs
        if not showed:
            self.judge = replace(self.judge, dtype=self.judge.dtype or self.judge.shown_dtype(given))
            self.kind = self.judge.kind(given, self.thresholds)
        places = [self.flow.places[name] for name in showed]
        places += [] if until else [one for one in self.judge.outputs if one not in places]
        figures = self.judge.compared(self.kind, places, given)
        wrong = self.wrong(figures)
        self.given |= {name: given for name in wrong if name not in self.given}
        if self.ledger and key:
            content = {name: to_flat(one) for name, one in figures.items()}
            self.ledger.write(key, kind="run", label=self.how.label, graph=graph.name, showed=list(showed), until=until,
                              reference=self.kind.name, dtype=self.judge.dtype, figures=content)  # fmt: skip
        return SearchRun(showed, until, figures, wrong)

    def _graph(self, showed: tuple[str, ...]) -> AbstractContextManager[Path]:
        return Written(self.flow, showed, self.how.until) if showed else nullcontext(self.flow.folder)

    def _execute(self, graph: Path) -> Arrays:
        inputs, outputs = ends(graph)
        (given,) = self.executor.run(graph, [{name: self.judge.inputs[name] for name in inputs}])
        for name, shape in outputs.items():
            if name in given and given[name].shape != shape:
                raise InputError(f"{name} of {graph.name} came as {given[name].shape}, the graph says {shape}")
        return {name: np.asarray(given[name], np.float32) for name in outputs if name in given}

    def _key(self, graph: Path) -> str:
        """The key of equal runs: the graph's bytes, its inputs, who ran it, and what judged it."""
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(graph.glob("model.*"))
                 if path.name != "model.data"}  # fmt: skip
        references = self.judge.references
        judged = [references.model is not None, self.judge.grids_digest, self.judge.dtype]
        fed = arrays_digest([self.judge.inputs])
        return digest([self.how.label, graph.name, files, self._weights, fed, judged, refimpl.__version__])

    @cached_property
    def _weights(self) -> str:
        """The sha256 of the graph's weights, which are the same in all runs."""
        path = self.flow.folder / "model.data"
        try:
            return sha256(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; export again") from None


def bisect(
    folder: str | Path,
    executor: Executor | None = None,
    model: Model | None = None,
    encodings: Encodings | None = None,
    outputs: Any = None,
    how: Probing = ONE_BY_ONE,
    terms: Terms = AS_SHOWN,
) -> Finding:
    """The first wrong tensor that `executor` computes for the export in `folder`, and the operation that gives it.

    - `executor`: what runs graphs, by default an engine on this machine
    - `model`: what was exported; its float64 is the reference, or its simulation for a device on grids. Without it, the
      reference is the graph in ONNX's own evaluator, if it has the bytes that were exported and gives its goldens
    - `encodings`: the grids of a quantized device, by default those that the export has stored
    - `outputs`: what the device gave already, see `export.measure.device.read_device`; they spare the first run
    - `how`: which graph is searched, and how; `terms`: those on which the device is judged

    Raises InputError for a folder that is not an export of the model, a graph that the executor cannot run, and an
    unknown graph; without a model also for graphs that were changed since the export, or do not give their goldens.
    """
    folder = Path(folder)
    references = References(folder, model, encodings, engine="reference" if model is None else "auto")
    if how.graph is not None and how.graph not in references.specs:
        raise InputError(f"there is no graph {how.graph!a:.99} in {folder}{near(how.graph, set(references.specs))}")
    if model is None:
        read_manifest(folder)  # it checks the sha256 of each file
    sweep(folder)
    known = _known(references, outputs, how.graph)
    asked = [name for name in references.specs if how.graph in (None, name) and (not known or name in known)]
    healthy: list[str] = []
    kind, remarks = FLOAT, tuple[str, ...]()
    with Ledger(folder, JOURNAL) if how.label is not None else nullcontext() as ledger:
        for name in asked:
            judge = OneGraph(references, Dataflow(folder / name, references.specs[name]), terms.dtype)
            if model is None:
                judge.expect_goldens()
            one = Bisection(judge, executor or Engine(), terms.thresholds, how, ledger)
            first = one.first(known.get(name))
            kind = one.kind
            remarks = (english.HALVES,) if one.judge.dtype != (terms.dtype or "float32") else remarks
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
    answers = fit_answers(references.plan, outputs, references.grids, "isolated", graph)
    found = {answer.spec.name: dict(answer.arrays) for answer in answers if answer.way == "isolated"}
    if not found:
        raise InputError("the outputs are of graphs in a chain, and only those of golden inputs tell where it begins")
    return found
