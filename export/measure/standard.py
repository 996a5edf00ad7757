"""The standard that a device is held to: what is right, how far off it may be, and how it computes.

The verdict on given outputs (`export/verdict/trial.py`) and the search for an operation (`export/search/one_graph.py`)
judge by the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from export.graphs.plan import Arrays, GraphSpec, Value, Way, unpadded
from export.measure.device import Answer
from export.measure.figures import Comparison, Sides, Spot, compared
from export.measure.kinds import ENDS, FLOAT, Kind
from export.measure.limits import DERIVED, Thresholds
from export.measure.references import References
from golden.tolerance import Tolerance, tolerances
from refimpl.errors import InputError
from refimpl.names import taps

# How far a float16 device's outputs may lie beside a float16 number, relative to it. Measured with Qualcomm's emulation
# of its NPU (onnxruntime-qnn 2.7.0): the outputs of float graphs are f * (1 + 8.5e-8) to f * (1 + 1.2e-7), one or two
# units of float32's last place beside a float16 number f; only 4 % of the embedded model's are f itself. Below
# float16's smallest normal number the distance stays as large as there: 4e-7 of the value was seen. Float16 numbers are
# 2^-10 apart, so few float32 numbers are so near to one by chance, and a whole tensor never is.
BESIDE = 2.0**-22


class Right(NamedTuple):
    """The right outputs, and the same without the rounding of activations; None where that rounding adds nothing."""

    outputs: Arrays
    unrounded: Arrays | None


@dataclass(frozen=True, eq=False)
class Standard:
    """The right answers of a device for an export. `dtype`: the floats that the device computes in."""

    references: References
    dtype: str = "float32"

    def right(
        self, kind: Kind, spec: GraphSpec, inputs: Mapping[str, np.ndarray], way: Way, wanted: Collection[str] = ()
    ) -> Arrays:
        """The right outputs, and `wanted` taps: stored ones where the export has them, else computed."""
        if kind == FLOAT and not wanted:  # linking the oracle's graphs changes nothing in their outputs
            return self.references.golden(spec)
        if kind.on_grids and self.references.model is None:
            return self.references.stored(spec, way)
        return self.references.run(kind, spec, inputs, wanted=wanted)

    def alone(self, kind: Kind, answer: Answer) -> Right:
        """The right answer of a graph to golden inputs."""
        spec, other = answer.spec, self.unrounded(kind, "isolated")
        inputs, wanted = self.references.inputs(spec), answer.probed
        base = self.right(other, spec, inputs, "isolated", wanted) if other else None
        return Right(self.right(kind, spec, inputs, "isolated", wanted), base)

    def beside(self, kind: Kind, answer: Answer, right: Right) -> Iterator[Comparison]:
        """The tensors of an answer beside the right ones."""
        spec, golden = answer.spec, self.references.golden(answer.spec)
        if any(name not in golden for name in answer.values):
            golden = golden | self.references.run(FLOAT, spec, self.references.inputs(spec), wanted=answer.probed)
        for tap, value in answer.in_order:
            name = value.name
            spot = Spot(spec, answer.way, tap, name)
            if name not in answer.arrays:
                yield spot.nothing(kind, "missing")
                continue
            if name not in right.outputs:
                raise InputError(f"{tap} of {spec.name} is not an output of the graph; give the model that computes it")
            arrays = [answer.arrays[name], right.outputs[name], golden[name]]
            arrays += [right.unrounded[name]] if right.unrounded else []
            yield self.compared(kind, spot, Sides(*(unpadded(value, x, spec) for x in arrays)))

    def unrounded(self, kind: Kind, way: Way) -> Kind | None:
        """The kind without the rounding of activations, to show what that rounding adds; None if it adds nothing.

        Between quantized ends, a graph computes floats from golden inputs as the golden run does, so nothing is added.
        """
        return None if kind == ENDS and way == "isolated" else kind.unrounded(self.references.model is not None)

    def limit(self, spot: Spot) -> Tolerance:
        """The tolerance of a tensor in floats."""
        spec, tap = spot.spec, spot.tap
        if self.dtype == "float32" and tap in self.references.limits:
            return self.references.limits[tap]
        key = (spec.part.number, spot.way)
        if key not in self._tolerances:
            inside = {f"model.layers.{layer}" for layer in spec.part.layers}
            outside = [name for name in taps(spec.config) if ".".join(name.split(".")[:3]) not in inside]
            fed = outside if spot.way == "isolated" else ()
            scores = self.references.scores
            self._tolerances[key] = tolerances(spec.config, self.dtype, spec.real + spec.past, fed, scores)
        return self._tolerances[key][tap]

    @cached_property
    def _tolerances(self) -> dict[tuple[int, Way], dict[str, Tolerance]]:
        return {}

    def compared(self, kind: Kind, spot: Spot, sides: Sides) -> Comparison:
        """A device's tensor beside the right one."""
        return compared(spot, kind, sides, self.limit(spot), self.references.grids.get(spot.tap))

    def likeliest(
        self, compare: Callable[[Kind], Iterable[Comparison]], thresholds: Thresholds
    ) -> tuple[Kind, list[Comparison]]:
        """The kind that a device is of, and its tensors beside the right ones of that kind.

        It is the first kind that fits, or else the nearest.
        """
        found: dict[Kind, list[Comparison]] = {}
        for kind in tqdm(self.references.kinds, "judging", unit="reference", disable=None, leave=False):
            found[kind] = list(compare(kind))
            if all(map(thresholds.within, found[kind])):
                return kind, found[kind]
        nearest = min(found, key=lambda kind: misfit(found[kind], thresholds))
        return nearest, found[nearest]

    def needs(self, kind: Kind, spot: Spot, value: Value, inputs: Mapping[str, np.ndarray]) -> Callable:
        """A function for `Evidence.needs`: the excess of a device's tensor if another tensor were the right one."""
        spec, other = spot.spec, kind.unrounded(self.references.model is not None)

        @cache
        def added() -> np.ndarray | None:
            """What the rounding of activations adds to the right tensor."""
            if other is None or self.references.model is None:
                return None
            right, base = (self.references.run(k, spec, inputs, wanted=[spot.tap])[value.name] for k in (kind, other))
            return unpadded(value, right, spec).astype(np.float64) - unpadded(value, base, spec)

        def needs(device: np.ndarray, right: np.ndarray, tokens: tuple[slice, ...]) -> float:
            noise = added()
            unrounded = None if noise is None else right - noise[tokens]
            return DERIVED.excess(self.compared(kind, spot, Sides(device, right, right, unrounded)))

        return needs


def misfit(found: list[Comparison], thresholds: Thresholds) -> tuple[bool, float]:
    """How badly a run fits a kind of device: whether a tensor fails, then the negative mean of the SQNR in dB.

    A tensor that a fault has changed is far from the references of every kind. All others are near to the right kind's.
    """
    fails = not all(map(thresholds.within, found))
    return fails, -float(np.mean([np.clip(np.nan_to_num(one.device.sqnr), 0, 120) for one in found]))


def shown_dtype(references: References, answers: Iterable[Answer]) -> str:
    """The floats of a device without grids: float16 where most outputs are float16 numbers and their goldens are not.

    Most outputs are enough, because an engine may keep the last operation of a graph in float32. Numbers that also fit
    bfloat16 are not a sign of float16. An NPU may give numbers that lie beside a float16 number: see BESIDE.
    """
    if references.grids:
        return "float32"
    pairs = ((golden, answer.arrays.get(name)) for answer in answers
             for name, golden in references.golden(answer.spec).items())  # fmt: skip
    halves = [_beside(device, np.float16) and not _beside(device, ml_dtypes.bfloat16)
              for golden, device in pairs if device is not None and not _beside(golden, np.float16)]  # fmt: skip
    return "float16" if 2 * sum(halves) > len(halves) else "float32"


def _beside(x: np.ndarray, dtype: Any) -> bool:
    """Whether each number is one of a narrower dtype, or lies within BESIDE of one."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(x - x.astype(dtype).astype(x.dtype))
        size = np.maximum(np.abs(x), float(ml_dtypes.finfo(dtype).smallest_normal))
        return bool(np.all((error <= BESIDE * size) | ~np.isfinite(x)))
