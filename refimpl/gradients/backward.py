"""The gradient of a loss by every tensor: the forward on a tape, stage by stage, and back.

A stage is the embedding, a layer, or the head. With `recompute`, only the stream that enters each stage is kept, and
a stage goes onto the tape when its turn comes on the way back: the memory of one layer's activations instead of all
of them, for one more forward. The operations are the same in the same order, and so are the bits.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from refimpl.errors import InputError, at_most
from refimpl.forward import Forward
from refimpl.gradients.objective import NextToken, Objective
from refimpl.gradients.products import one_thread
from refimpl.gradients.tape import Leaves, Tape, Tensor
from refimpl.loss import expect_labels
from refimpl.names import taps
from refimpl.positions import token_positions
from refimpl.trace import Trace, prompt_of

DTYPES = ("float32", "float64")


def gradients(
    model: Forward,
    ids,
    labels,
    wrt: str = "*",
    dtype: str = "float32",
    attention_mask=None,
    z_loss_weight: float | None = None,
    recompute: bool = False,
    feed: Mapping[str, np.ndarray] | None = None,
) -> tuple[float, Trace]:
    """The training loss and its gradients: see `Model.gradients`."""
    ids = model.token_ids(ids)
    labels = expect_labels(labels, ids, model.config.vocab_size)
    weight = model.config.z_loss_weight if z_loss_weight is None else z_loss_weight
    return backward(model, ids, NextToken(labels, weight), wrt, dtype, attention_mask, recompute, feed)


def backward(
    model: Forward,
    ids,
    objective: Objective,
    wrt: str | Callable[[str], bool] = "*",
    dtype: str = "float32",
    attention_mask=None,
    recompute: bool = False,
    feed: Mapping[str, np.ndarray] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> tuple[float, Trace]:
    """The value of `objective` on the logits of `ids`, and its gradients, in the order in which they are known.

    The gradient of a parameter has the parameter's name and shape, that of a tap the tap's. `wrt`: a glob on names, or
    a function that says which are wanted. `feed`: gradients of taps; each replaces the computed one after that was
    recorded, so every recorded gradient shows its own error alone. `weights` stand in for the model's.

    Raises InputError if nothing is wanted, or if the loss is NaN or infinite: it names the first tensor that is.
    """
    ids = model.token_ids(ids)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}: gradients are of real numbers")
    wanted = wrt if callable(wrt) else lambda name: fnmatch.fnmatchcase(name, wrt)
    weights = model.weights if weights is None else weights
    names = [*taps(model.config), *weights]
    if isinstance(wrt, str) and not any(map(wanted, names)):
        raise InputError(f"no tensor is called {wrt!r}; names are such as {at_most(names, 3)}")
    config, about = model.config, {"engine": "refimpl", "kind": "gradients", "dtype": dtype}
    found = Trace(meta={**about, "family": config.family, "config": asdict(config), "ids": prompt_of(ids)})

    def show(name: str, gradient: np.ndarray) -> np.ndarray:
        if wanted(name):
            found[name] = gradient
        return gradient if feed is None or name not in feed else np.asarray(feed[name], gradient.dtype)

    with one_thread(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        stages = _stages(model, ids, dtype, attention_mask, Leaves(weights, wanted, config.tie_word_embeddings))
        runs, stream = [], ids  # for each stage, the stream that enters it, or its tape
        for stage in stages:
            run = stage(stream, recording=not recompute)
            runs.append(stream if recompute else run)
            stream = run.result.array
            del run
        loss, gradient = objective(stream)
        if not np.isfinite(loss):
            raise InputError(f"the loss is {loss}: {_first_nan(model, ids, dtype, attention_mask)}")
        for stage in reversed(stages):
            run = stage(runs.pop()) if recompute else runs.pop()
            gradient = run.backward(gradient, show)
            for leaf in run.leaves:
                if leaf.gradient is not None:
                    found[leaf.name] = leaf.gradient if leaf.name not in found else found[leaf.name] + leaf.gradient
            del run
    return loss, found


@dataclass
class _Run:
    """A stage on its tape: from `source`, where the stream enters, to `result`, and the `leaves` that it read."""

    tape: Tape
    source: Tensor | None
    result: Tensor
    leaves: list

    def backward(self, gradient: np.ndarray, show: Callable) -> Any:
        self.tape.backward(self.result, gradient, show)
        return None if self.source is None else self.source.gradient


def _stages(model: Forward, ids: np.ndarray, dtype: str, attention_mask, leaves: Leaves) -> list[Callable]:
    """The forward as functions of the stream, each of which gives a `_Run`."""
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape or mask.dtype.kind not in "iub":
        raise InputError(f"attention_mask is {mask.dtype} {mask.shape}, expected integers of shape {ids.shape}")
    mask, ops = mask.astype(np.int64), model.ops(dtype)
    model.expect_room(ids.shape[1])
    cos, sin = model.position_tables(token_positions(mask), ops.wide)
    bias = model.attention_bias(mask, ids.shape[1], ops.wide)

    def stage(forward: Callable) -> Callable[..., _Run]:
        def run(stream: np.ndarray, recording: bool = True) -> _Run:
            tape = Tape(ops, model.config.pad_token_id, recording)
            read = Leaves(leaves.weights, leaves.wanted, leaves.tied)
            decoder = replace(model.decoder(ops, tape.tap, None), ops=tape, weights=read)
            source = None if stream is ids else tape.tensor(stream)
            result = forward(decoder, stream if source is None else source)
            return _Run(tape, source, result, list(reversed(read.leaves.values())))

        return run

    layers = [
        stage(lambda decoder, x, i=i: decoder.layer(i, x, cos, sin, bias))
        for i in range(model.config.num_hidden_layers)
    ]
    return [stage(lambda decoder, x: decoder.embed(x)), *layers, stage(lambda decoder, x: decoder.head(x))]


def _first_nan(model: Forward, ids: np.ndarray, dtype: str, attention_mask) -> str:
    """The first tensor of the forward that has a NaN or an infinity, in words."""
    first: list[str] = []

    def tap(name, x):
        if not first and not np.isfinite(x).all():
            first.append(f"{name} is the first tensor with a NaN or infinity")
        return x

    model.forward(ids, dtype, attention_mask, None, tap)
    return first[0] if first else "all logits are finite, but they are too large for it"
