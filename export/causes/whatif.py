"""A graph computed again under a hypothesis: what would this tensor be, if something were otherwise?

A hypothesis says at which taps a run goes on with something else: RMSNorm without its gain, a matrix whose codes are
unpacked in the other order, a stream to which nothing is added. The graph runs with it up to the tensor in question, in
the same arithmetic as its reference. So a hypothesis is the same few lines whether a probe has shown the guilty tap
itself, or only a tensor that comes much later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from export.graphs.cut import stage
from export.graphs.naming import boundary
from export.graphs.plan import Arrays, GraphSpec, Value, unpadded
from export.measure.kinds import ENDS, Kind
from export.measure.references import References
from refimpl.config import Config
from refimpl.names import input_of
from refimpl_kernels.affine import Encoding, fake_quantize, integers

LINEARS = ("W_pack", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass(frozen=True)
class Hypothesis:
    """At the taps whose last names are `at`, the run goes on with `change`'s result; None leaves a tap unchanged."""

    text: str
    at: tuple[str, ...]
    change: Callable[[Operation], np.ndarray | None]


@dataclass(frozen=True, eq=False)
class WhatIf:
    """One tensor of a graph, and what it would be if something were otherwise.

    `value`: the tensor, as an output of the graph `spec`. `inputs`: what the graph was given.
    `suspects`: the suspected taps, in computing order; the last is the tensor itself.
    `dtype`: the floats that the device is judged to compute in; rounding to them is not a fault.
    """

    references: References
    kind: Kind
    spec: GraphSpec
    value: Value
    inputs: Mapping[str, np.ndarray]
    suspects: tuple[str, ...]
    dtype: str = field(default="float32", kw_only=True)

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def tap(self) -> str:
        return self.value.tap or self.value.name

    @np.errstate(invalid="ignore")  # bytes in another order may be a signalling NaN
    def shown(self, array: np.ndarray) -> np.ndarray:
        """An array in the graph's layout as this tap in float64, without padding."""
        return unpadded(self.value, array, self.spec).astype(np.float64)

    def run(self, inputs: Mapping[str, np.ndarray], spec: GraphSpec | None = None) -> Arrays:
        """The right answer of this graph, or of another one, to these inputs."""
        names = {value.name for value in self.spec.outputs}
        wanted = [] if self.value.name in names else [self.tap]
        known = self.references.model is not None or not self.kind.on_grids
        return self.references.run(self.kind if known else ENDS, spec or self.spec, inputs, wanted=wanted)

    def with_inputs(self, **changed: np.ndarray) -> np.ndarray:
        """This tensor, had the graph been given these inputs instead."""
        return self.shown(self.run({**self.inputs, **changed})[self.value.name])

    def if_true(self, hypothesis: Hypothesis) -> np.ndarray:
        """This tensor, were a hypothesis true."""
        seen = dict(self.stretch.before)

        def change(name: str, x: Any) -> Any:
            if name in self.suspects and last_name(name) in hypothesis.at:
                other = hypothesis.change(Operation(self, name, x, seen))
                grid = self.references.grids.get(name) if self.kind.on_grids else None
                if other is not None and grid is not None:  # the range of its grid bounds a wrong tensor, too
                    other = fake_quantize(np.asarray(other, np.float32), grid)
                x = x if other is None else np.asarray(other, x.dtype)
            seen[name] = x
            return x

        self.references.run(self.kind, self.stretch.spec, self.stretch.inputs, change=change)
        x = seen[self.tap]
        return self.shown(x.transpose(np.argsort(self.value.tap_axes)) if self.value.tap_axes else x)

    @cached_property
    def stretch(self) -> Stretch:
        """The layers of the graph from the first suspect to the tensor.

        A hypothesis is tried hundreds of times, and a part has many layers.
        """
        spec, part, count = self.spec, self.spec.part, self.config.num_hidden_layers
        if spec.cut:
            return Stretch(spec, self.inputs, Arrays())
        last = stage(self.tap, count)
        first = min((stage(tap, count) for tap in self.suspects), default=last)
        start, stop = max(first, part.layers.start), min(last + 1, part.layers.stop)
        embeds = part.embeds and first <= part.layers.start
        later = replace(
            spec, part=replace(part, layers=range(start, stop), embeds=embeds, heads=part.heads and last == count)
        )
        before = Arrays()
        if start > part.layers.start:
            before = self._stream_before(start)
        given = {value.name: self.inputs[value.name] for value in later.inputs if value.name in self.inputs}
        return Stretch(later, given | ({later.part.reads: before[boundary(start)]} if before else {}), before)

    def _stream_before(self, layer: int) -> Arrays:
        """The right residual stream before a layer of the graph."""
        stream, found = boundary(layer), Arrays()

        def record(name: str, x: Any) -> Any:
            found.update({name: x} if name == stream else {})
            return x

        part = replace(self.spec.part, layers=range(self.spec.part.layers.start, layer), heads=False)
        earlier = replace(self.spec, part=part)
        self.references.run(self.kind, earlier, {v.name: self.inputs[v.name] for v in earlier.inputs}, change=record)
        return found


@dataclass(frozen=True, eq=False)
class Stretch:
    """Some layers of a graph, their inputs, and the residual stream `before` them, if it is not an input."""

    spec: GraphSpec
    inputs: Mapping[str, np.ndarray]
    before: Arrays


@dataclass(frozen=True, eq=False)
class Operation:
    """A tap in a run: `right` is its computed value, `seen` all taps before it."""

    whatif: WhatIf
    tap: str
    right: np.ndarray
    seen: Mapping[str, np.ndarray]

    def __getitem__(self, what: str) -> np.ndarray:
        """The tap of the same layer with this last name."""
        return next(x for name, x in reversed(list(self.seen.items())) if last_name(name) == what)

    @property
    def layer(self) -> int:
        return int(self.tap.split(".")[2])

    @cached_property
    def before(self) -> np.ndarray:
        """The tensor that a norm reads."""
        if self.tap.endswith("post_attention_layernorm"):
            return self["attention_residual"]
        spec = self.whatif.spec
        at = boundary(spec.config.num_hidden_layers if self.tap == "model.norm" else self.layer)
        return self.seen[at] if at in self.seen else spec.filled(self.whatif.inputs)[spec.part.reads]

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.whatif.references.parameters(self.whatif.kind)

    def parameter(self, name: str) -> np.ndarray:
        return self.parameters[name].read(np.dtype(np.float64))

    @cached_property
    def weight(self) -> np.ndarray:
        return self.parameter(f"{self.tap}.weight")

    @property
    def bias(self) -> np.ndarray:
        name = f"{self.tap}.bias"
        return self.parameter(name) if name in self.parameters else np.zeros(1)

    @cached_property
    def grid(self) -> Encoding | None:
        """The grid of the weight, if it has one for each row or block."""
        encodings = self.whatif.references.encodings
        found = encodings.parameters.get(f"{self.tap}.weight") if encodings and self.whatif.kind.coded else None
        return found if isinstance(found, Encoding) and found.scale.ndim else None

    @cached_property
    def codes(self) -> np.ndarray:
        """The codes of the weight, 0 for 0."""
        assert self.grid is not None and self.whatif.references.model is not None
        weights = self.whatif.references.model.weights
        return integers(weights[f"{self.tap}.weight"].read(np.dtype(np.float32)), self.grid).astype(np.int64)

    def linear(self, weight: np.ndarray) -> np.ndarray:
        """The tap, had another matrix made it."""
        return (self.seen[input_of(self.tap)] @ weight.T + self.bias).astype(self.right.dtype)


def last_name(tap: str) -> str:
    """The last part of a tap's name; "layer" for the output of a layer."""
    last = tap.rpartition(".")[2]
    return "layer" if last.isdigit() else last


def reads_past(tensor: WhatIf) -> bool:
    """Whether keys of the past come before a tensor in its graph."""
    before = ("input_layernorm", "W_pack", "q_proj", "k_proj", "v_proj", "query", "key", "value")
    return bool(tensor.spec.part.layers) and not (_in_first_layer(tensor) and last_name(tensor.tap) in before)


def attends(tensor: WhatIf) -> bool:
    """Whether the mask is added before a tensor in its graph."""
    return reads_past(tensor) and not (_in_first_layer(tensor) and last_name(tensor.tap) == "scores")


def _in_first_layer(tensor: WhatIf) -> bool:
    return tensor.tap.startswith(f"model.layers.{tensor.spec.part.layers.start}.")
