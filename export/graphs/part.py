"""A part: a stretch of the decoder, computed on whatever kind of tensor it is given.

Symbols make the graph, NumPy arrays its golden, and arrays on grids what a quantized device answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.graphs.cut import belongs, stage
from export.graphs.naming import boundary, hub_boundary
from refimpl import names
from refimpl.config import Config
from refimpl.decoder import Decoder
from refimpl.errors import InputError
from refimpl.trace import Tap, silent


@dataclass(frozen=True)
class StaticCache:
    """A cache of fixed size that the host keeps: the past comes in, new keys and values go out."""

    inputs: Mapping[str, Any]
    outputs: dict[str, Any]
    ops: Any

    def __call__(self, layer: int, key, value):
        """Takes new keys and values (1, K, S, D); returns all that attention may see, (1, K, context, D) each."""
        key, value = key.transpose(1, 0, 3, 2), value.transpose(1, 0, 2, 3)  # (K, 1, D, S), (K, 1, S, D)
        self.outputs[f"past_key_{layer}_out"], self.outputs[f"past_value_{layer}_out"] = key, value
        key = self.ops.concat((self.inputs[f"past_key_{layer}_in"], key), 3)  # (K, 1, D, context)
        value = self.ops.concat((self.inputs[f"past_value_{layer}_in"], value), 2)  # (K, 1, context, D)
        return key.transpose(1, 0, 3, 2), value.transpose(1, 0, 2, 3)  # (1, K, context, D) each


@dataclass(frozen=True)
class Part:
    """A stretch of the decoder, `number` of `total`: an embedding or not, some layers, a head or not."""

    number: int
    total: int
    layers: range
    embeds: bool
    heads: bool
    hub_names: bool = False

    @property
    def reads(self) -> str:
        """The name of the first input."""
        return "input_ids" if self.embeds else self._hidden(self.layers.start)

    @property
    def gives(self) -> str:
        """The name of the first output."""
        return "logits" if self.heads else self._hidden(self.layers.stop)

    def _hidden(self, layer: int) -> str:
        return hub_boundary(layer) if self.hub_names else boundary(layer)

    def outputs(self, config: Config, weights: Mapping, ops: Any, inputs: Mapping, tap: Tap = silent) -> dict[str, Any]:
        """The outputs of the part for `inputs`, by ONNX name, in the order of the graph."""
        new: dict[str, Any] = {}
        decoder = Decoder(config, weights, ops, tap, StaticCache(inputs, new, ops))
        x = decoder.embed(inputs["input_ids"]) if self.embeds else inputs[self.reads]
        x = ops.upcast(x) if isinstance(x, np.ndarray) else x  # the host gives float32, whatever we compute in
        cos, sin = inputs.get("position_ids_cos"), inputs.get("position_ids_sin")
        for layer in self.layers:
            x = decoder.layer(layer, x, cos, sin, inputs["attention_mask"])
        return {self.gives: decoder.head(x) if self.heads else x, **new}


def parts_of(layers: int, parts: int, hub_names: bool = False) -> list[Part]:
    """The embedding alone, then the layers in parts of nearly equal size, the last with the head; or all in one part.

    Raises InputError if there are fewer layers than parts to hold them.

    >>> [(part.embeds, list(part.layers), part.heads) for part in parts_of(layers=5, parts=3)]
    [(True, [], False), (False, [0, 1, 2], False), (False, [3, 4], True)]
    """
    if not 1 <= parts <= layers + 1:
        raise InputError(
            f"parts is {parts}, expected 1 to {layers + 1}: the embedding, and a layer or more in each other"
        )
    if parts == 1:
        return [Part(1, 1, range(layers), embeds=True, heads=True, hub_names=hub_names)]
    sizes = [len(group) for group in np.array_split(range(layers), parts - 1)]
    stops = [0, *np.cumsum(sizes).tolist()]
    starts = [0, 0, *stops[1:-1]]
    return [Part(i + 1, parts, range(starts[i], stops[i]), i == 0, i == parts - 1, hub_names) for i in range(parts)]


def around(config: Config, module: str, number: int = 1, total: int = 1) -> Part:
    """The shortest stretch of the decoder that contains a whole module."""
    layers = config.num_hidden_layers
    stages = [stage(name, layers) for name in names.taps(config) if belongs(name, module)]
    first, last = min(stages), max(stages)
    return Part(number, total, range(max(first, 0), min(last + 1, layers)), embeds=first < 0, heads=last == layers)
