"""The result of a search: where a device goes wrong, and the runs that showed it. The verdict's sentences tell it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from export.measure.figures import Comparison
from export.measure.flat import to_flat
from export.measure.kinds import Kind
from export.verdict import english
from golden.compare import finite


@dataclass(frozen=True)
class SearchRun:
    """One run: the places that it `showed` beside the outputs, and the `figures` of all that it gave.

    `until`: the graph was cut off at these places. `wrong`: the places that are wrong; `gone`: the fault had vanished.
    """

    showed: tuple[str, ...]
    until: bool
    figures: Mapping[str, Comparison]
    wrong: tuple[str, ...]
    gone: bool = False

    def told(self, say: Any = english) -> str:
        """The run in a line."""
        shown = [name for name in self.wrong if name in self.showed or not self.showed]
        return say.run(self.showed, self.until, shown, self.gone)

    def __str__(self) -> str:
        return self.told()


@dataclass(frozen=True)
class Guilty:
    """The first wrong tensor.

    - `place`: its name in the graph; `tap`: what it is, `meaning` in words; `figures`: how wrong, `excess` above 1
    - `given`: the places that it follows from, all of them right
    - `pieces`: its wrong values, where it is in pieces
    - `nodes`: the operations that compute it, or those pieces, from the given places: type and name
    - `cause`: why it may be wrong
    """

    place: str
    tap: str
    meaning: str
    figures: Comparison
    excess: float
    given: Mapping[str, Comparison]
    pieces: tuple[str, ...] = ()
    nodes: tuple[tuple[str, str], ...] = ()
    cause: str | None = None


@dataclass(frozen=True)
class Finding:
    """Where a device goes wrong. True if nothing is wrong.

    - `rivals`: the places that no run could tell apart; the first wrong one is among them
    - `beside`: wrong outputs that do not follow from the guilty tensor; `spread`: wrong outputs that do
    - `hidden`: places that hide the fault when they are shown; `healthy`: graphs whose outputs are right
    - `taps`: how many there are to search; `bound`: the most runs that one fault takes; `known`: outputs were given
    """

    graph: str
    kind: Kind
    runs: tuple[SearchRun, ...]
    healthy: tuple[str, ...] = ()
    first: Guilty | None = None
    rivals: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    taps: int = 0
    known: bool = False
    remarks: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return self.first is None

    @property
    def guilty(self) -> str | None:
        """The place of the first wrong tensor."""
        return self.first.place if self.first else None

    @property
    def bound(self) -> int:
        return math.ceil(math.log2(max(self.taps, 1))) + 1

    @property
    def summary(self) -> str:
        """The finding in one line."""
        return summary(self)

    def __str__(self) -> str:
        return story(self)

    def to_json(self) -> str:
        """Everything as JSON."""
        first = self.first
        return json.dumps(finite({
            "agrees": bool(self), "summary": self.summary, "graph": self.graph, "reference": self.kind.name,
            "guilty": self.guilty, "tap": first and first.tap, "layer": first and first.figures.layer,
            "pieces": first.pieces if first else (),
            "nodes": [{"op": op, "name": name} for op, name in (first.nodes if first else ())],
            "given": {name: to_flat(one) for name, one in (first.given.items() if first else ())},
            "figures": first and to_flat(first.figures), "excess": first.excess if first else 0.0,
            "rivals": self.rivals, "beside": self.beside, "spread": self.spread, "hidden": self.hidden,
            "cause": first and first.cause, "taps": self.taps, "bound": self.bound,
            "runs": [{"showed": run.showed, "until": run.until, "wrong": run.wrong, "gone": run.gone}
                     for run in self.runs],
            "healthy": self.healthy, "remarks": self.remarks,
        }), ensure_ascii=False, allow_nan=False)  # fmt: skip


def summary(of: Finding, say: Any = english) -> str:
    """The finding in one line."""
    if of.first is None:
        return say.nothing_wrong(of.healthy)
    if of.rivals:
        return say.between(of.rivals, of.graph)
    return say.found(of.first.place, of.graph, len(of.runs))


def story(of: Finding, say: Any = english) -> str:
    """All that is told of a finding, a sentence a line."""
    first = of.first
    if first is None:
        return "\n".join([summary(of, say), *of.remarks])
    lines = [
        summary(of, say),
        say.meaning(first.figures, first.meaning, first.place),
        say.computed_by(first.nodes),
        say.given(first.given),
        say.how_wrong(first.figures, first.excess, first.pieces),
        say.likely(first.cause or "", False),
    ]
    lines += [say.hidden(of.hidden)] if of.hidden else []
    lines += [say.beside(of.beside)] if of.beside else []
    lines += [say.afterwards(bool(of.spread)), say.cost(len(of.runs), of.bound, of.taps, of.known)]
    lines += [f"  {number}. {run.told(say)}" for number, run in enumerate(of.runs, 1)]
    lines += [say.healthy(of.healthy)] if of.healthy else []
    return "\n".join([*lines, *of.remarks])
