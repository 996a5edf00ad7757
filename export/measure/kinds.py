"""The ways in which a right device may compute, a row each.

    float           as the golden outputs have it
    ends            float inside, each graph's inputs and outputs on their grids: `--quantize_io` around a float graph
    simulation      everything on its grid (`refimpl.grids.simulate`), halves rounded away from zero, as AIMET does
    even            the same with halves rounded to even, as ONNX does
    weights         the weights on their grids and nothing else: not a device; it shows what rounding activations adds

>>> SIMULATION.coded, SIMULATION.unrounded(with_model=True), FLOAT.unrounded(with_model=True)
(True, WEIGHTS, None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """How a device computes.

    `name`: as saved runs spell it; `text`: as sentences call it.
    `rounding`: how the tensors inside of a graph are rounded to their grids; None if they stay floats.
    `coded`: whether the outputs of a graph are on grids, so that an error can be counted in codes.
    """

    name: str
    text: str
    coded: bool
    rounding: Literal["away", "even"] | None = None

    @property
    def on_grids(self) -> bool:
        """Whether the inside of a graph is quantized, which only the model can compute."""
        return self.rounding is not None

    def unrounded(self, with_model: bool) -> Kind | None:
        """The kind that differs from this one only by the rounding of activations; None if there is no such rounding.

        Without the model, only floats can be computed: then all that quantization costs counts as rounding.
        """
        if self.on_grids:
            return WEIGHTS if with_model else FLOAT
        return FLOAT if self.coded else None

    def __repr__(self) -> str:
        return self.name.upper()


FLOAT = Kind("float", "the float oracle", coded=False)
ENDS = Kind("ends", "float between quantized inputs and outputs", coded=True)
SIMULATION = Kind("simulation", "the quantized simulation", coded=True, rounding="away")
EVEN = Kind("even", "the quantized simulation, halves rounded to even", coded=True, rounding="even")
WEIGHTS = Kind("weights", "float with quantized weights", coded=True, rounding="away")

KINDS = {kind.name: kind for kind in (FLOAT, ENDS, SIMULATION, EVEN)}  # what a device may be
