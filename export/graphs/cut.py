"""A stretch of the decoder cut at its taps: what a module or an operation reads, computes and gives.

Taps delimit operations. Nobody writes down a second time which tap follows from which: the decoder runs on symbols, and
from each tap the graph is walked back to the taps before it. So a module, or a tap, can be a graph of its own. Its
inputs are the nearest tensors outside of it; its outputs are those that something outside reads.

>>> config = Config(family="Baichuan2-7B", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
>>> matching_modules(config, ["*.1.mlp", "model.n*"])
('model.layers.1.mlp', 'model.norm')
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.graphs.data import Parameter
from export.graphs.ops import OnnxOps
from export.graphs.symbols import Graph, Stack, Tensor
from refimpl.checkpoint.resolve import model_shapes
from refimpl.checkpoint.weights import Weight
from refimpl.config import Config
from refimpl.errors import InputError, at_most
from refimpl.grids.encodings import near
from refimpl.names import taps
from refimpl.trace import Tap

HIDES = {"fused": ("scores", "probs")}  # form -> the taps that are inside one of its nodes


@dataclass(frozen=True)
class Cut:
    """The taps that a graph computes, the taps and inputs that it `reads`, and the taps that it `gives`."""

    inside: tuple[str, ...]
    reads: frozenset[str]
    gives: tuple[str, ...]


def matching_taps(config: Config, patterns: Iterable[str]) -> tuple[str, ...]:
    """The taps that some globs match, in computing order. Raises InputError for a glob that matches none."""
    known = taps(config)
    chosen = _matched(known, patterns)
    return tuple(name for name in known if name in chosen)


def matching_modules(config: Config, patterns: Iterable[str]) -> tuple[str, ...]:
    """The modules and taps that some globs match, in computing order; a match inside of another match is left out.

    Raises InputError for a glob that matches none.
    """
    known: dict[str, None] = {}
    for name in taps(config):
        path = name.split(".")
        known |= dict.fromkeys(".".join(path[:end]) for end in range(1, len(path) + 1))
    chosen = _matched(known, patterns)
    return tuple(name for name in known if name in chosen and not any(belongs(name, m) for m in chosen - {name}))


def _matched(known: Mapping[str, Any], patterns: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        chosen = {pattern} if pattern in known else {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not chosen:
            kinds = {name.rpartition(".")[2] for name in known}
            like = {f"*.{kind}" for kind in kinds if not kind.isdigit()} if pattern.startswith("*") else set(known)
            raise InputError(f"no tensor or module is called {pattern!a:.99}{near(pattern, like)}")
        found |= chosen
    return found


def belongs(name: str, module: str) -> bool:
    """Whether a tap is a module's own, or lies inside of the module; the module "" contains everything."""
    return not module or name == module or name.startswith(f"{module}.")


def stage(name: str, layers: int) -> int:
    """The layer of a tap; -1 for the embedding, and `layers` for the last norm and the head."""
    path = name.split(".")
    return int(path[2]) if path[1:2] == ["layers"] else -1 if name == "model.embed_tokens" else layers


def visible(names: Sequence[str], hides: Sequence[str]) -> Sequence[str]:
    """The names, if no form of the graph hides one. Raises InputError otherwise."""
    if hidden := [name for name in names if name.rpartition(".")[2] in hides]:
        raise InputError(f"the form fused has {at_most(hidden, 2)} inside a node; choose forms without it, or opset 21")
    return names


def cut_out(behind: Mapping[str, set[str]], module: str, gives: Sequence[str], hides: Sequence[str]) -> Cut:
    """The taps of a module, and the taps that they need.

    Without `gives`, its outputs are the taps that something outside reads, and those that the cache keeps. `behind`:
    see `dependencies`. The form of a graph may hide taps (`hides`): the cut is then made at the taps before them.
    """
    own = {name for name in behind if belongs(name, module)}
    outside = set().union(*(behind[name] for name in behind if name not in own))
    kept = {name for name in own if name.endswith((".self_attn.key", ".self_attn.value"))}
    last = [list(behind)[-1]]
    gives = tuple(gives or (name for name in behind if name in own and name in {*outside, *kept, *last}))
    inside, reads, todo = set(), set(), list(visible(gives, hides))
    while todo:
        name = todo.pop()
        if name in inside:
            continue
        inside.add(name)
        for source in behind[name]:
            through = source in own or source.rpartition(".")[2] in hides
            todo.append(source) if through and source in behind else reads.add(source)
    return Cut(tuple(name for name in behind if name in inside), frozenset(reads), gives)


def dependencies(config: Config, inputs: Mapping[str, tuple[int, ...]], run: Callable) -> dict[str, set[str]]:
    """Tap -> the taps and inputs that it is computed from directly, for a stretch of the decoder, in computing order.

    `inputs`: the shapes of what the stretch reads; `run(weights, ops, inputs, tap)` is its forward.
    """
    graph = Graph()
    symbols = {name: graph.input(name, shape) for name, shape in inputs.items()}
    names = {tensor: name for name, tensor in symbols.items()}
    tapped: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor) -> Tensor:
        x = tapped[name] = graph.tap(name, x)
        names[x] = name
        return x

    nothing = np.zeros((), np.float32)
    shapes = model_shapes(config)
    weights = {n: Parameter.whole(n, Weight(np.broadcast_to(nothing, shape))) for n, shape in shapes.items()}
    run(weights, OnnxOps(graph), symbols, tap)
    return {name: _nearest(tensor, names) for name, tensor in tapped.items()}


def _nearest(tensor: Tensor, names: Mapping[Tensor, str]) -> set[str]:
    """The named tensors that are reached first, walking back from a tensor."""
    found, todo, seen = set(), [tensor], {tensor}
    while todo:
        node = todo.pop().node
        for source in node.inputs if node else ():
            if source in names:
                found.add(names[source])
            elif source not in seen:
                seen.add(source)
                todo.append(source)
    return found


def substituting(inputs: Mapping[str, Tensor], then: Tap) -> Tap:
    """The tap that puts a graph's input in the place of the tensor with its name: one tensor, or one for each head."""

    def tap(name: str, x: Any) -> Any:
        if name not in inputs:
            return then(name, x)
        fed = inputs[name]
        if isinstance(x, Stack):
            many = x.pieces[0].shape[x.axis]
            pieces = tuple(fed.heads(x.axis, i, many) for i in range(len(x.pieces)))
            return Stack(pieces, x.axis, x.group)
        return sliceable(fed) if x.features else fed

    return tap


def sliceable(x: Tensor) -> Tensor:
    """The tensor, with a `features` that slices it; a linear's own would compute those features."""

    def features(start: int, stop: int, suffix: str) -> Tensor:
        return sliceable(x.cut(len(x.shape) - 1, start, stop))

    x.features = features
    return x
