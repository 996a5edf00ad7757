"""What to show in the next run: the place that halves the suspects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from export.measure.flow import Known


@dataclass
class Planner(Known):
    """What may be at fault, and what to show next. `hidden`: places that hide the fault when they are shown."""

    hidden: set[str] = field(default_factory=set)

    def next(self, probes: int = 1, alone: bool = False) -> list[str]:
        """What to show in the next run: the place that leaves the fewest candidates in the worst case.

        With more `probes`, each further place is the one that best splits the candidates that those before it leave.
        When one candidate is left, the places that it follows from are shown in the same run, so that both sides of
        the operation have been seen. `alone`: never more than one place. Empty when all is known.
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
        """The candidates that each cell leaves if a place is wrong, and if it is right."""
        wrong = self.flow.ancestors[name]
        return [part for cell in cells for part in (cell & wrong, cell - clears) if part]
