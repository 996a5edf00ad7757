"""What follows from what, and what may be at fault by what has been seen: verdict and bisect reason by it.

Places and what follows from what are a DAG. A place does not always tell about what it follows from: keys are right
although W_pack's rows of the values are wrong, and a norm does not see that all of its input is twice as large. Such a
step is `partial`.
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
    """Places, and what follows from what."""

    @property
    @abstractmethod
    def places(self) -> dict[str, Any]:
        """By name, in computing order."""

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
    """What may be at fault, from what has been seen: place -> whether it is right."""

    flow: Flow
    seen: dict[str, bool] = field(default_factory=dict)

    @property
    def guilty(self) -> str | None:
        """The first place in computing order that is known to be wrong."""
        return next((name for name in self.flow.places if self.seen.get(name) is False), None)

    @property
    def right(self) -> set[str]:
        """What has been seen to be right, and what follows from that: all that goes wholly into something right.

        What goes partially into something right may be wrong in the rest of it; but what it follows from is right.
        """
        after: dict[str, dict[str, bool]] = {name: {} for name in self.flow.places}
        for name, sources in self.flow.behind.items():
            for source, partial in sources.items():
                after[source][name] = partial
        found: set[str] = set()
        tells: set[str] = set()  # that what it follows from is right
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
        """The places of which one is the first to be wrong."""
        return set(self.flow.ancestors[self.guilty]) - self.right if self.guilty else set()


@dataclass(frozen=True, eq=False)
class TapFlow(Flow):
    """What follows from what in the model itself, whatever form its graphs have: of the taps that a graph computes."""

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
                # a packed projection has rows of three, and a norm does not see a factor
                source: name.endswith(NORMS) or source.endswith(".W_pack")
                for source in whole[name]
                if source in self.places
            }
            for name in self.places
        }


@lru_cache(4)
def _of_taps(config: Config) -> dict[str, set[str]]:
    """Tap -> what it follows from: the decoder says so, run on symbols."""
    spec = GraphSpec(config, Part(1, 1, range(config.num_hidden_layers), embeds=True, heads=True), 2, 4, 2, 0)
    inputs = {value.name: value.shape for value in spec.inputs}
    return dependencies(config, inputs, lambda *run: spec.part.outputs(config, *run))
