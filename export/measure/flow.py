"""Which tensors follow from which, and which may be at fault, given what was seen: verdict and bisect reason by it.

Places and the steps between them are a DAG. A right place does not always prove that those before it are right: keys
are right although W_pack's rows of the values are wrong, and a norm does not see that all of its input is twice as
large. Such a step is `partial`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from export.graphs.cut import dependencies
from export.graphs.part import Part
from export.graphs.plan import GraphSpec
from refimpl.config import Config
from refimpl.names import NORMS


class Flow(ABC):
    """Places, and which of them follow from which."""

    @property
    @abstractmethod
    def places(self) -> dict[str, Any]:
        """Name -> place, in computing order."""

    @property
    @abstractmethod
    def behind(self) -> Mapping[str, Mapping[str, bool]]:
        """Place -> the places that it follows from directly -> whether it may be right although they are wrong."""

    @cached_property
    def ancestors(self) -> dict[str, frozenset[str]]:
        """Place -> itself, and all that it follows from."""
        found: dict[str, frozenset[str]] = {}
        for name in self.places:  # in computing order, so those before it are known
            found[name] = frozenset([name]).union(*(found[source] for source in self.behind[name]))
        return found


@dataclass
class Known:
    """What may be at fault, given what was `seen`: place -> whether it is right."""

    flow: Flow
    seen: dict[str, bool] = field(default_factory=dict)

    @property
    def guilty(self) -> str | None:
        """The first place in computing order that is known to be wrong."""
        return next((name for name in self.flow.places if self.seen.get(name) is False), None)

    @property
    def right(self) -> set[str]:
        """The places known to be right: those seen to be, and those that go wholly into a right one, or only into such.

        A place that goes partially into a right one may be wrong in its other part, but all before it is right.
        """
        after: dict[str, dict[str, bool]] = {name: {} for name in self.flow.places}
        for name, sources in self.flow.behind.items():
            for source, partial in sources.items():
                after[source][name] = partial
        found: set[str] = set()
        tells: set[str] = set()  # each proves that all before it is right
        for name in reversed(self.flow.places):
            right = any(one in tells for one, partial in after[name].items() if not partial)
            right |= bool(after[name]) and found.issuperset(after[name])
            if self.seen.get(name, right):
                found.add(name)
            if name in found or any(one in tells for one, partial in after[name].items() if partial):
                tells.add(name)
        return found

    @property
    def candidates(self) -> set[str]:
        """The suspected places; the first wrong one is among them."""
        return set(self.flow.ancestors[self.guilty]) - self.right if self.guilty else set()


@dataclass(frozen=True, eq=False)
class TapFlow(Flow):
    """Which taps follow from which in the model itself, whatever form its graphs have. `inside`: a graph's own taps."""

    config: Config
    inside: tuple[str, ...]

    @cached_property
    def places(self) -> dict[str, None]:
        return dict.fromkeys(self.inside)

    @cached_property
    def behind(self) -> dict[str, dict[str, bool]]:
        whole = _of_taps(self.config)
        return {
            name: {
                # W_pack has the rows of q, k and v, and a norm does not see a factor
                source: name.endswith(NORMS) or source.endswith(".W_pack")
                for source in whole[name]
                if source in self.places
            }
            for name in self.places
        }


@lru_cache(4)
def _of_taps(config: Config) -> dict[str, set[str]]:
    """Tap -> the taps that it follows from, found by running the decoder on symbols."""
    spec = GraphSpec(config, Part(1, 1, range(config.num_hidden_layers), embeds=True, heads=True), 2, 4, 2, 0)
    inputs = {value.name: value.shape for value in spec.inputs}
    return dependencies(config, inputs, lambda *run: spec.part.outputs(config, *run))
