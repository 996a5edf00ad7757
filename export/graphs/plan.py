"""The decoder in parts: what each graph takes, computes and gives.

A device takes a large model in parts, and each part as several graphs over the same weights: one reads a prompt, many
tokens at a time, another a token at a time. Names and layouts are those of AI Hub's generic LLM export, S tokens at a
time in a window of `context`:

    input   input_ids (1, S) int32, or the hidden state (1, S, C) of the part before, under the name of its tap
            attention_mask (1, 1, S, context), added to the scores; (1, H, S, context) with ALiBi, which is part of it
            position_ids_cos, position_ids_sin (1, 1, S, D/2), not with ALiBi
            past_key_{l}_in (K, 1, D, context - S), past_value_{l}_in (K, 1, context - S, D), of each layer in turn
    output  the hidden state (1, S, C), or logits (1, S, V)
            past_key_{l}_out (K, 1, D, S), past_value_{l}_out (K, 1, S, D): those of the new tokens only

`Part.outputs` computes a part on whatever kind of tensor it is given: symbols make the graph, NumPy arrays its golden.

A module or a tap can be a graph alone: a part that is cut at its taps (`cut.py`). Its inputs and outputs that lie
inside the decoder have the names and layouts of the taps; its other ends are those of a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from export.graphs.cut import Cut, cut_out, dependencies, matching_modules, matching_taps, stage, visible
from export.graphs.naming import boundary
from export.graphs.part import Part, around, parts_of
from export.graphs.profiles import profile_named
from refimpl import names
from refimpl.config import Config
from refimpl.errors import InputError, at_most
from refimpl.model import Model
from refimpl.positions import LOWEST, attention_bias, token_positions
from refimpl.trace import Tap, silent

Arrays = dict[str, np.ndarray]  # what goes into a graph or comes out of it, by name
Way = Literal["isolated", "chained"]  # a graph with its golden inputs, or with what the graphs before it gave


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    `token_axis` is the axis of its tokens. `key_axis`, if it has one, is the axis of the window that they look at.
    `tap` is the tensor that it shows, and `tap_axes` transposes it to the tap's layout. An input continues its
    `source`: the output of another graph, or a tap.
    """

    name: str
    shape: tuple[int, ...]
    token_axis: int
    dtype: str = "float32"
    tap: str | None = None
    tap_axes: tuple[int, ...] | None = None
    source: str | None = None
    key_axis: int | None = None


@dataclass(frozen=True)
class GraphSpec:
    """One graph of an export, and its golden's shape: `real` of its tokens are not padding, and follow `past` others.

    `module`: the graph is only this module of the part. `probe`: taps that it gives beside its outputs; with `until`
    it ends at them, and they are its outputs. `hides`: the kinds of taps that are inside of its form's nodes.
    """

    config: Config
    part: Part
    tokens: int
    context: int
    real: int
    past: int
    lowest_mask: float = LOWEST
    module: str = ""
    probe: tuple[str, ...] = ()
    until: bool = False
    hides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """AI Hub's name of a graph; its runtime reads the numbers in it."""
        kind = "token" if self.tokens == 1 else "prompt"
        which = self.module or f"{self.part.number}_of_{self.part.total}"
        return f"{kind}_ar{self.tokens}_cl{self.context}_{which}"

    @property
    def whole(self) -> GraphSpec:
        """The part, without a cut and probes."""
        return replace(self, module="", probe=(), until=False)

    @cached_property
    def cut(self) -> Cut | None:
        """Where the part is cut, if it is."""
        if not (self.module or self.until):
            return None
        inputs = {value.name: value.shape for value in self.whole.inputs}
        behind = dependencies(self.config, inputs, lambda *run: self.part.outputs(self.config, *run))
        return cut_out(behind, self.module, self.probe if self.until else (), self.hides)

    @cached_property
    def taps(self) -> list[str]:
        """The taps that the graph computes, in computing order."""
        if self.cut:
            return list(self.cut.inside)
        layers, part = self.config.num_hidden_layers, self.part
        stages = {*part.layers, *[-1] * part.embeds, *[layers] * part.heads}
        return [name for name in self._rows if stage(name, layers) in stages]

    @cached_property
    def _rows(self) -> dict[str, names.Row]:
        return names.taps(self.config)

    def value(self, tap: str) -> Value:
        """A tap as an input or output: in its own name and layout, padding included."""
        row = self._rows[tap]
        size, axes = names.shape(row, self.config, batch=1, tokens=self.tokens, keys=self.context), row.shape.split()
        keys = axes.index("S") if "S" in axes else None
        return Value(tap, size, axes.index("T"), tap=tap, source=tap, key_axis=keys)

    @cached_property
    def inputs(self) -> list[Value]:
        """The inputs in order: ids, hidden state or taps, mask, position tables, then each layer's past."""
        values = self._inputs
        if not self.cut:
            return values
        known, reads = {value.name for value in values}, self.cut.reads
        inner = [self.value(name) for name in self._rows if name in reads - known]
        return [v for v in values[:1] if v.name in reads] + inner + [v for v in values[1:] if v.name in reads]

    @property
    def _inputs(self) -> list[Value]:
        config, part, S = self.config, self.part, self.tokens
        bias_heads = config.num_attention_heads if config.alibi else 1
        if part.embeds:
            values = [Value("input_ids", (1, S), 1, "int32")]
        else:
            hidden = (1, S, config.hidden_size)
            values = [Value(part.reads, hidden, 1, tap=boundary(part.layers.start), source=part.reads)]
        if part.layers:
            values.append(Value("attention_mask", (1, bias_heads, S, self.context), 2))
        if part.layers and not config.alibi:
            table = (1, 1, S, config.head_dim // 2)
            values += [Value("position_ids_cos", table, 2), Value("position_ids_sin", table, 2)]
        for layer in part.layers:
            for what, shape, axis, _ in self._cache(self.context - S):
                values.append(Value(f"past_{what}_{layer}_in", shape, axis, source=f"past_{what}_{layer}_out"))
        return values

    @cached_property
    def outputs(self) -> list[Value]:
        """The outputs in order: hidden state, logits or taps, each layer's new keys and values, then probes."""
        values = self._outputs
        if self.cut:
            known = {value.tap: value for value in values}
            values = [known.get(tap) or self.value(tap) for tap in self.cut.gives]
            values.sort(key=lambda value: value.tap_axes is not None)  # keys and values come last
        given = {value.tap for value in values}
        values = values + [self.value(tap) for tap in self.taps if tap in self.probe and tap not in given]
        return [replace(value, source=None) for value in values]

    @property
    def _outputs(self) -> list[Value]:
        config, part, S = self.config, self.part, self.tokens
        size, tap = (config.vocab_size, "lm_head") if part.heads else (config.hidden_size, boundary(part.layers.stop))
        values = [Value(part.gives, (1, S, size), 1, tap=tap)]
        for layer in part.layers:
            for what, shape, axis, tap_axes in self._cache(S):
                tap = f"model.layers.{layer}.self_attn.{what}"
                values.append(Value(f"past_{what}_{layer}_out", shape, axis, tap=tap, tap_axes=tap_axes))
        return values

    def computed(self, weights: Mapping, ops: Any, inputs: Mapping, tap: Tap = silent) -> dict[str, Any]:
        """The outputs of the graph for `inputs`, by ONNX name.

        If the graph is cut, `inputs` must also hold what its part reads (see `filled`), and `tap` must replace the
        tensors that the cut reads.
        """
        shown: dict[str, Any] = {}

        def showing(name: str, x: Any) -> Any:
            shown[name] = tap(name, x)
            return shown[name]

        shown |= self.part.outputs(self.config, weights, ops, inputs, showing)
        return {value.name: shown[value.name if value.name in shown else str(value.tap)] for value in self.outputs}

    def filled(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of the graph, and zeros for those inputs of its part that the cut graph does not read."""
        return {v.name: inputs[v.name] if v.name in inputs else np.zeros(v.shape, v.dtype) for v in self._inputs}

    def _cache(self, length: int):
        """Kind, shape, token axis and the tap's axes of a layer's keys, which are transposed, and of its values."""
        K, D = self.config.num_key_value_heads, self.config.head_dim
        return [("key", (K, 1, D, length), 3, (1, 0, 3, 2)), ("value", (K, 1, length, D), 2, (1, 0, 2, 3))]


@dataclass(frozen=True)
class Plan:
    """The graphs of an export: one for each part and each of `tokens`, largest first.

    `prompt`: how many tokens the golden prompt has. `profile` says what the host writes, and the names. `modules`: each
    is a graph alone, and there are no parts. `probe`: taps that become outputs of the graphs that compute them.
    `only`: just the graph of that name; with `until` it ends at the probes. `hides`: see `GraphSpec`. `lowest_mask`:
    what the host writes where a token may not look, such as the low end of the mask's grid; None is the profile's.

    Raises InputError for numbers that do not fit the config, or each other.
    """

    config: Config
    tokens: tuple[int, ...]
    context: int
    parts: int
    prompt: int = 1
    profile: str = "plain"
    modules: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()
    only: str = ""
    until: bool = False
    hides: tuple[str, ...] = ()
    lowest_mask: float | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_parts()
        self._check_names()
        if not self.runs:
            raise InputError(f"there is no graph {self.only!a:.99}")
        visible(self.probe, self.hides)

    def _check_sizes(self) -> None:
        longest, sizes = self.config.max_position_embeddings, self.tokens
        for number in (*sizes, self.context, self.parts, self.prompt):
            if type(number) is not int:
                raise InputError(f"tokens, context, parts and prompt are whole numbers, not {number!r}")
        if not 2 <= self.context <= longest:
            raise InputError(f"context is {self.context}, expected 2 to {longest}, which the model was made for")
        if not sizes or list(sizes) != sorted(set(sizes), reverse=True) or sizes[-1] < 1 or sizes[0] >= self.context:
            raise InputError(
                f"tokens is {at_most(sizes)}, expected different numbers from 1 to {self.context - 1}, largest first: "
                f"the context of {self.context} holds past and new tokens"
            )
        if not 1 <= self.prompt <= self.room:
            raise InputError(
                f"the prompt has {self.prompt} tokens, expected 1 to {self.room}, as many as fit every graph"
            )

    def _check_parts(self) -> None:
        even, layers = profile_named(self.profile).even, self.config.num_hidden_layers
        parts_of(layers, self.parts)
        if even and self.parts > 1 and layers % (self.parts - 1):
            dividing = [1, *(parts + 1 for parts in range(1, layers + 1) if layers % parts == 0)]
            raise InputError(
                f"parts is {self.parts}, but {layers} layers do not divide into {self.parts - 1} alike beside the "
                f"embedding's; {at_most(dividing, 12)} do"
            )
        if self.modules and self.parts != 1:
            raise InputError(f"parts is {self.parts}, but the graphs are modules; give one of the two")

    def _check_names(self) -> None:
        modules, probe = matching_modules(self.config, self.modules), matching_taps(self.config, self.probe)
        if (modules, probe) != (self.modules, self.probe):
            raise InputError("modules and probes are not in computing order, or one is inside another")

    def probing(self, patterns: Iterable[str]) -> Plan:
        """This plan with probes: every tap that a glob matches and a graph computes.

        Raises InputError for a glob that matches no computed tap, and for a tap that a form hides.
        """
        patterns = tuple(patterns)
        shown = {tap for run in self.runs for spec in run for tap in spec.taps}
        for pattern in patterns:
            matched = matching_taps(self.config, [pattern])
            if shown.isdisjoint(matched):
                raise InputError(f"no graph here computes {at_most(matched, 3)}, so none can show it")
        return replace(self, probe=tuple(t for t in matching_taps(self.config, patterns) if t in shown))

    @property
    def room(self) -> int:
        """The longest golden prompt: the largest graph reads it, and each other one goes on from there."""
        return min(self.tokens[0], self.context - max(self.tokens[1:], default=0))

    @property
    def chained(self) -> bool:
        """Whether the graphs together are the model, so that each can go on from those before it."""
        return not self.modules and not self.only

    @cached_property
    def runs(self) -> list[list[GraphSpec]]:
        """The graphs of each size. Those of the largest read the prompt; the others have it as their past."""
        profile, layers = profile_named(self.profile), self.config.num_hidden_layers
        parts = [(part, "") for part in parts_of(layers, self.parts, profile.hub_names)]
        if self.modules:
            total = len(self.modules)
            parts = [(around(self.config, m, i + 1, total), m) for i, m in enumerate(self.modules)]
        runs: list[list[GraphSpec]] = []
        for tokens in self.tokens:
            real, past = (tokens, self.prompt) if runs else (self.prompt, 0)
            lowest = profile.lowest_mask if self.lowest_mask is None else self.lowest_mask
            numbers = (tokens, self.context, real, past, lowest)
            more = (self.probe, self.until, self.hides)
            runs.append([GraphSpec(self.config, part, *numbers, module, *more) for part, module in parts])
        chosen = [[spec for spec in run if self.only in ("", spec.name)] for run in runs]
        return [run for run in chosen if run]


def host_inputs(model: Model, spec: GraphSpec, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The inputs that the host computes: ids, mask and position tables. All of `ids` are real tokens.

    The window is right-aligned: `[padding, past, padding, ids]`. Positions count only tokens that are not padding.
    A masked place gets the lowest mask: -30000, which float16 can hold, or -50, which Genie writes and which a 16-bit
    grid with a step of 0.0008 can hold.
    """
    mask = np.zeros((1, spec.context), np.int64)
    start = spec.context - spec.tokens
    mask[:, start - spec.past : start] = 1
    mask[:, spec.context - spec.real :] = 1
    bias = attention_bias(model.config, mask, spec.tokens, np.float32)
    inputs = {
        "input_ids": np.array([[0] * (spec.tokens - spec.real) + list(ids)], np.int32),
        "attention_mask": np.maximum(bias, np.float32(spec.lowest_mask)),
    }
    cos, sin = model.position_tables(token_positions(mask)[:, start:], np.float64)
    if cos is not None and sin is not None:
        inputs |= {"position_ids_cos": cos.astype(np.float32), "position_ids_sin": sin.astype(np.float32)}
    return inputs


def carry(spec: GraphSpec, value: Value, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The input `value`, made of other graphs' outputs: their real tokens, right-aligned after zeros."""
    carried = np.zeros(value.shape, value.dtype)
    count = spec.real if value.tap else spec.past
    if count and value.source:
        source = np.moveaxis(outputs[value.source], value.token_axis, -1)
        np.moveaxis(carried, value.token_axis, -1)[..., -count:] = source[..., -count:]
    return carried


def unpadded(value: Value, array: np.ndarray, spec: GraphSpec) -> np.ndarray:
    """An output in the layout of its tap, without padding among its tokens, or among the keys that they look at."""
    if value.key_axis is not None:
        new = spec.context - spec.tokens
        keys = [*range(new - spec.past, new), *range(spec.context - spec.real, spec.context)]
        array = np.take(array, keys, value.key_axis)
    array = np.moveaxis(array, value.token_axis, 0)[-spec.real :]
    array = np.moveaxis(array, 0, value.token_axis)
    return array.transpose(value.tap_axes) if value.tap_axes else array
