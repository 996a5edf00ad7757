"""A verdict as data, and the conclusions from it: the first wrong tensor, and the suspected operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from export.causes.evidence import Cause
from export.measure.figures import Birth, Comparison
from export.measure.flow import Known, TapFlow
from export.measure.kinds import Kind
from export.measure.limits import DERIVED, Thresholds
from refimpl.config import Config
from refimpl.names import taps

HEADS = ("self_attn.query", "self_attn.key", "self_attn.value")
HERE, MAPPING = "computed here", "a mapping of"  # how `about` calls outputs that are not a file or folder
MUCH = 8  # without the model, a tensor clears others only if it needs this many times less than the guilty one


@dataclass(frozen=True)
class Judged:
    """Every tensor in computing order, graph by graph, beside what it should be.

    `kind`: how the device turned out to compute. `causes`: name of a failing tensor -> why it may be wrong.
    `remarks`: how the outputs had to be changed to be read, and which graphs have none. `about`: where it comes from.
    `inside`: the taps that each graph computes, by default those of the whole model.
    """

    tensors: tuple[Comparison, ...]
    kind: Kind
    config: Config
    causes: Mapping[str, Cause] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Thresholds = DERIVED
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the device agrees."""
        return bool(self.tensors) and not self.failures

    def excess(self, tensor: Comparison) -> float:
        """What the tensor needs, divided by what is allowed: above 1 fails."""
        return self.thresholds.excess(tensor)

    @cached_property
    def failures(self) -> list[Comparison]:
        return [tensor for tensor in self.tensors if not self.excess(tensor) <= 1]

    @cached_property
    def worst(self) -> list[Comparison]:
        """Largest excess first, then in computing order."""
        return sorted(self.tensors, key=lambda tensor: -self.excess(tensor))

    @property
    def guilty(self) -> Comparison | None:
        """The first failing tensor that came back and did not inherit its error; of an isolated graph, if one fails."""
        born = [tensor for tensor in self.failures if tensor.born != Birth.INHERITED] or self.failures
        return min(born, key=lambda tensor: (tensor.problem == "missing", tensor.way != "isolated"), default=None)

    @property
    def absent(self) -> list[Comparison]:
        """The tensors that did not come back."""
        return [tensor for tensor in self.tensors if tensor.problem == "missing"]

    @property
    def unjudged(self) -> list[str]:
        """The graphs of the export from which nothing came back."""
        judged = {tensor.graph for tensor in self.tensors}
        return [graph for graph in self.inside if graph not in judged]

    @property
    def inherited(self) -> list[Comparison]:
        """The failing tensors that only hand on an error."""
        return [tensor for tensor in self.failures if tensor.born == Birth.INHERITED]

    @property
    def suspects(self) -> list[str]:
        """The suspected operations: from the last tensor known to be right before the guilty one, to it."""
        return self.suspected(self.guilty) if self.guilty else []

    @property
    def before(self) -> str:
        """The last tensor before the suspects."""
        order = list(taps(self.config))
        at = order.index(self.suspects[0])
        return order[at - 1] if at else ""

    def suspected(self, guilty: Comparison) -> list[str]:
        """The suspects for any tensor that did not inherit its error."""
        if self.output_alone(guilty):
            return [guilty.tap]
        flow, beside = self._flow(guilty), self._beside(guilty)
        known = Known(flow, {t.tap: self._proven(t, guilty) for t in beside})
        candidates = set(flow.ancestors[guilty.tap]) - known.right | {guilty.tap}
        return [tap for tap in flow.places if tap in candidates]

    def output_alone(self, guilty: Comparison) -> bool:
        """Whether a head's tensor was right inside of the graph, because a right tensor is made of it."""
        return guilty.operation in HEADS and any(self._proven(t, guilty) for t in self.following(guilty))

    def following(self, tensor: Comparison) -> list[Comparison]:
        """The tensors that are made of this one, in the same run of the same graph."""
        made = self._flow(tensor).ancestors
        return [t for t in self._beside(tensor) if tensor.tap in made[t.tap]]

    def _beside(self, tensor: Comparison) -> list[Comparison]:
        """The tensors that came back from the same run of the same graph."""
        return [t for t in self.tensors if (t.graph, t.way) == (tensor.graph, tensor.way) and t.problem != "missing"]

    def _flow(self, tensor: Comparison) -> TapFlow:
        """Which taps follow from which in its graph. The graph's inputs are right, or the error would be inherited."""
        return TapFlow(self.config, self.inside.get(tensor.graph) or tuple(taps(self.config)))

    def _proven(self, tensor: Comparison, guilty: Comparison) -> bool:
        """Whether a tensor is right enough to prove that the tensors it is made of are right, too.

        Without the model, the whole cost of quantization is allowed, so a tensor must need much less to prove anything.
        """
        blind = self.kind.coded and not self.about.get("model")
        return self.excess(tensor) <= (min(1.0, self.excess(guilty) / MUCH) if blind else 1.0)
