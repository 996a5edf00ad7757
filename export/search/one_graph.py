"""One graph: what each of its places should be, and how far a run's places are from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from export.causes.evidence import Evidence
from export.causes.likely import explained
from export.graphs.plan import Arrays, GraphSpec
from export.measure.device import Answer
from export.measure.figures import Comparison, Sides, Spot
from export.measure.kinds import FLOAT, Kind
from export.measure.limits import DERIVED, Thresholds
from export.measure.places import Dataflow, Place
from export.measure.references import References
from export.measure.standard import Standard, shown_dtype
from export.run.ledger import arrays_digest
from refimpl.errors import InputError, at_most
from refimpl.grids.encodings import Encodings, Float16

KEPT = 64 << 20  # bytes of references that are kept between runs; what is larger is computed again


@dataclass(frozen=True, eq=False)
class OneGraph:
    """The right tensors of one graph. `dtype`: the floats of the device; None until a run has shown it."""

    references: References
    flow: Dataflow
    dtype: str | None = None

    @property
    def spec(self) -> GraphSpec:
        return self.flow.spec

    @cached_property
    def standard(self) -> Standard:
        return Standard(self.references, self.dtype or "float32")

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
        """Raises InputError if the graph, which is the reference where there is no model, does not give its goldens."""
        answer = self._answer(self.references.run(FLOAT, self.spec, self.inputs))
        standard, wrong = Standard(self.references), list[str]()
        for kind in self.references.kinds:
            found = standard.beside(kind, answer, standard.alone(kind, answer))
            wrong = [one.tap for one in found if not DERIVED.within(one)]
            if not wrong:
                return
        raise InputError(f"{self.spec.name}, unchanged, does not give its own goldens ({at_most(wrong, 4)}), so "
                         "it tells nothing of a device; export again, or give the model with --model")  # fmt: skip

    def shown_dtype(self, given: Arrays) -> str:
        """The floats that the device computes in, by its outputs."""
        return shown_dtype(self.references, [self._answer(given)])

    def _answer(self, given: Arrays) -> Answer:
        values = {value.name: value for value in self.spec.outputs if value.name in given}
        return Answer(self.spec, "isolated", {name: given[name] for name in values}, values)

    def kind(self, given: Arrays, thresholds: Thresholds) -> Kind:
        """How the device computes, by its outputs."""
        kind, _ = self.standard.likeliest(lambda one: self.compared(one, self.outputs, given).values(), thresholds)
        return kind

    def compared(self, kind: Kind, places: Sequence[Place], given: Mapping[str, np.ndarray]) -> dict[str, Comparison]:
        """A run's places beside the right ones of a kind of device."""
        inside = [one for one in places if not one.is_output]
        if self._stored(kind) and inside:
            raise InputError("what a quantized device computes inside of a graph takes the model; give it with --model")
        found = {}
        for one in places:
            array = one.array(given)
            if array is None:
                found[one.name] = self._spot(one)._replace(output="").nothing(kind, "missing")
            else:
                sides = self._sides(kind, one, one.unpadded(array, self.spec), places)
                found[one.name] = self.standard.compared(kind, self._spot(one), sides)
        return found

    def _spot(self, one: Place) -> Spot:
        return Spot(self.spec, "isolated", one.tap, one.name)

    def _sides(self, kind: Kind, one: Place, device: np.ndarray, beside: Sequence[Place]) -> Sides:
        other = self.standard.unrounded(kind, "isolated")
        right, oracle = self.right(kind, one, beside), self.right(FLOAT, one, beside)
        return Sides(device, right, oracle, self.right(other, one, beside) if other else None)

    def right(self, kind: Kind, one: Place, beside: Sequence[Place]) -> np.ndarray:
        """The right value of a place, as its tap, without padding. `beside`: the places that the same run shows."""
        known = self._known.setdefault(kind, {})
        if one.name not in known:
            everything = list(self.flow.places.values())
            size = sum(4 * math.prod(each.value.shape) for each in everything)
            wanted = self.outputs if self._stored(kind) else everything if size <= KEPT else [*self.outputs, *beside]
            known.clear()
            known.update(self._computed(kind, wanted))
        return known[one.name]

    def _stored(self, kind: Kind) -> bool:
        """Whether all that is known of a kind is the outputs that the export has stored."""
        return self.references.model is None and (kind.on_grids or self.references.rounding)

    def _computed(self, kind: Kind, places: Sequence[Place]) -> dict[str, np.ndarray]:
        spec, shown = self.spec, {value.tap: value for value in self.spec.outputs}
        if self._stored(kind) and kind.on_grids:
            answer = self.references.stored(spec, "isolated")
        elif self._stored(kind) and kind == FLOAT:
            answer = self.references.golden(spec)
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
        """The wrong values of a place in pieces; empty if all of them are wrong."""
        array, count = one.array(given), len(one.values)
        if count == 1 or array is None:
            return []
        whole = self._sides(kind, one, one.unpadded(array, self.spec), [one])
        if whole.device.shape != whole.reference.shape:
            return []
        cut = [[None] * count if x is None else np.array_split(x, count, one.axis) for x in whole]
        bad = []
        for name, device, right, _, unrounded in zip(one.values, *cut, strict=True):
            found = self.standard.compared(kind, self._spot(one), Sides(device, right, right, unrounded))
            bad += [] if limits.within(found) else [name]
        return bad if len(bad) < count else []

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
        floats = self.dtype or "float32"
        cause = explained(Evidence(self.references, kind, self.spec, value, self.inputs, suspects, raw, dtype=floats))
        return str(cause) if cause else None
