"""Another model: a norm without its gain, another activation, a residual that is dropped, heads in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from export.causes.whatif import Hypothesis, Operation, WhatIf, last_name
from refimpl.names import NORMS


def architecture(e: WhatIf) -> Iterator[Hypothesis]:
    """Operations as another model, or a careless compiler, has them."""
    config = e.config
    H, D, root = config.num_attention_heads, config.head_dim, config.head_dim**0.5

    def normed(eps: float = config.rms_norm_eps, centred: bool = False, gain: bool = True) -> Callable:
        def change(o: Operation) -> np.ndarray:
            x = o.before - (o.before.mean(-1, keepdims=True) if centred else 0)
            return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * (o.weight if gain else 1)

        return change

    for eps in (1e-5, 1e-6, 1e-8):
        if eps != config.rms_norm_eps:
            yield Hypothesis(f"RMSNorm has the epsilon {eps:g}, expected {config.rms_norm_eps:g}", NORMS, normed(eps))
    for at in [*((name,) for name in NORMS), NORMS]:
        yield Hypothesis("RMSNorm has no gain: its weight is not applied", at, normed(gain=False))
        yield Hypothesis("the mean is subtracted: LayerNorm, expected RMSNorm", at, normed(centred=True))
        yield Hypothesis("RMSNorm is missing", at, lambda o: o.before)
    yield Hypothesis("gate_proj and up_proj are exchanged", ("gate_proj", "up_proj"), _exchanged)
    gate = {"GELU": _gelu, "ReLU": lambda x: np.maximum(x, 0), "the sigmoid alone": _sigmoid, "missing": lambda x: x}
    for name, function in gate.items():
        yield Hypothesis(f"the activation is {name}, expected SiLU", ("act_fn",), _of(function))
    for name in ("act_fn", "up_proj"):
        yield Hypothesis(f"the product of gate and up is {name} alone", ("product",), _of(lambda x: x, name))
    residual = {"attention_residual": "o_proj", "layer": "down_proj"}
    for at in [("attention_residual",), ("layer",), tuple(residual)]:
        yield Hypothesis("the residual stream is dropped: what is added to it goes on alone", at,
                         lambda o: o[residual[last_name(o.tap)]])  # fmt: skip
    for name, added in residual.items():
        yield Hypothesis(f"{added} is not added to the residual stream", (name,), _without(added))
    yield Hypothesis(f"scores are not divided by the root of the head's size: {root:.4g} times too large", ("scores",),
                     lambda o: o.right * root)  # fmt: skip
    yield Hypothesis(f"scores are divided by the root of the head's size twice: {1 / root:.4g} of what they should be",
                     ("scores",), lambda o: o.right / root)  # fmt: skip
    if config.num_key_value_heads < H:
        yield Hypothesis("query heads take the key heads by turns, expected neighbours to share one",
                         ("scores", "context"), _by_turns)  # fmt: skip
    for head in range(H):
        kept = np.repeat(np.arange(H) != head, D)
        yield Hypothesis(f"head {head} of attention gives zeros", ("context",), _times(kept))


def _of(function: Callable[[np.ndarray], np.ndarray], what: str = "gate_proj") -> Callable[[Operation], np.ndarray]:
    """The change that applies a function to another tap of the layer."""
    return lambda o: function(o[what])


def _without(what: str) -> Callable[[Operation], np.ndarray]:
    return lambda o: o.right - o[what]


def _times(factors: np.ndarray) -> Callable[[Operation], np.ndarray]:
    return lambda o: o.right * factors


def _exchanged(o: Operation) -> np.ndarray:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}[last_name(o.tap)]
    return o.linear(o.parameter(f"{o.tap.rpartition('.')[0]}.{other}.weight"))


def _by_turns(o: Operation) -> np.ndarray:
    """Query head h with key head h mod K."""
    config, (B, _, T) = o.whatif.config, o["query"].shape[:3]
    turns = np.arange(config.num_attention_heads) % config.num_key_value_heads
    if last_name(o.tap) == "scores":
        past = np.asarray(o.whatif.inputs[f"past_key_{o.layer}_in"]).transpose(1, 0, 3, 2)
        keys = np.concatenate([past, o["key"]], 2)[:, turns]
        return o["query"] @ keys.swapaxes(2, 3) / math.sqrt(config.head_dim)
    past = np.asarray(o.whatif.inputs[f"past_value_{o.layer}_in"]).transpose(1, 0, 2, 3)
    values = np.concatenate([past, o["value"]], 2)[:, turns]
    return (o["probs"] @ values).transpose(0, 2, 1, 3).reshape(B, T, -1)


def _gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
