"""What engines get wrong, as models that get it wrong: an engine that answers like one of them has its fault.

`FAULTS[feature]` are pairs: the fault in words, and a function from the right model to the wrong one. It returns None
for a family that the fault cannot befall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refimpl import positions
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.decoder import Decoder
from refimpl.model import Model

Breaking = Callable[[Model], Model | None]


class Neighbours(Decoder):
    """RoPE that turns neighbours, as in GPT-J, in place of element i and i + D/2."""

    def rope(self, x, cos, sin):
        """Pairs (2i, 2i + 1)."""
        order = np.arange(x.shape[-1]).reshape(-1, 2).T.ravel()
        return super().rope(x[..., order], cos, sin)[..., np.argsort(order)]


class Backwards(Decoder):
    """RoPE whose sine has the other sign for keys only: a transposed rotation."""

    def rope(self, x, cos, sin):
        """Turns the other way."""
        return (
            super().rope(x, cos, -sin) if x.shape[1] == self.config.num_key_value_heads else super().rope(x, cos, sin)
        )


def packed(order: str) -> type[Decoder]:
    """W_pack's rows read in another order than q, k, v."""

    class Packed(Decoder):
        def linear(self, name, x):
            """W_pack's output, put into the wrong places."""
            y = super().linear(name, x)
            if not name.endswith("W_pack"):
                return y
            parts = dict(zip("qkv", np.split(y, 3, axis=-1), strict=True))
            if order == "heads":
                B, T, C = y.shape
                y = y.reshape(B, T, self.config.num_attention_heads, 3, -1).swapaxes(2, 3)
                return np.ascontiguousarray(y).reshape(B, T, C)
            return np.concatenate([parts[one] for one in order], axis=-1)

    return Packed


class WithoutBias(Decoder):
    """q, k and v without their bias (Qwen2)."""

    def linear(self, name, x):
        """The product alone."""
        return self.tap(name, self.ops.linear(x, self.weights[f"{name}.weight"], None))


class Biased(Model):
    """A model with another bias of attention than `refimpl.positions` gives."""

    slopes: Callable[[int], np.ndarray] = staticmethod(positions.alibi_slopes)
    farthest: int | None = None
    causal_only = False

    def attention_bias(self, mask, tokens, dtype):
        """ALiBi with other slopes, or none, or one that ends at a distance."""
        config = replace(self.config, rope_theta=10000.0)  # the mask alone
        allowed = positions.attention_bias(config, mask, tokens, dtype)
        if self.causal_only:
            return allowed
        place = positions.token_positions(mask)
        distance = (place[:, None, :] - place[:, -tokens:, None]).astype(dtype)[:, None]
        if self.farthest is not None:
            distance = np.maximum(distance, -self.farthest)
        return allowed + self.slopes(config.num_attention_heads).astype(dtype)[:, None, None] * distance


def biased(**changes) -> Breaking:
    """A fault of ALiBi."""
    kind = type("Wrong", (Biased,), {k: staticmethod(v) if callable(v) else v for k, v in changes.items()})
    return lambda model: kind(model.config, model.weights, model.folder) if model.config.alibi else None


def head(model: Model) -> Model | None:
    """NormHead left out, or applied where there is none."""
    kept = model.weights["lm_head.weight"]
    other = Weight(kept.array) if isinstance(kept, NormHead) else NormHead(kept.array)
    return Model(model.config, model.weights.replace({"lm_head.weight": other}), model.folder)


def base(factor: float) -> Breaking:
    """RoPE with another base."""

    def broken(model: Model) -> Model | None:
        theta = model.config.rope_theta
        return (
            None
            if theta is None
            else Model(replace(model.config, rope_theta=theta * factor), model.weights, model.folder)
        )

    return broken


def decoder(kind: type[Decoder], only: Callable[[Model], bool]) -> Breaking:
    """A fault of the decoder, of the models that `only` names."""
    return lambda model: model.with_decoder(kind) if only(model) else None


class Shifted(Model):
    """New tokens behind a cache stand one position too far from the prompt. `prompt`: its tokens."""

    def position_tables(self, positions, dtype):
        """The tables, with the shift."""
        return super().position_tables(positions + (positions.shape[1] == 1), dtype)


class Unmasked(Model):
    """Padding on the left is looked at like any token."""

    def forward(self, ids, dtype, attention_mask, cache, tap, logits_to_keep=0):
        """The forward without its mask."""
        return super().forward(ids, dtype, None, cache, tap, logits_to_keep)


def kind_of(kind: type[Model], only: Callable[[Model], bool] = lambda model: True) -> Breaking:
    """A fault of how a model is called."""
    return lambda model: kind(model.config, model.weights, model.folder) if only(model) else None


def _rope(model: Model) -> bool:
    return not model.config.alibi


def _packed(model: Model) -> bool:
    return model.config.qkv_packed


FAULTS: dict[str, dict[str, Breaking]] = {
    "head": {"NormHead is left out, or applied to a family without it": head},
    "RoPE's pairs": {
        "neighbours are turned, not the two halves of a head": decoder(Neighbours, _rope),
        "keys are turned backwards": decoder(Backwards, _rope),
    },
    "RoPE's base": {
        "the base is 100 times too large": base(100.0), "the base is 100 times too small": base(0.01),
    },
    "ALiBi": {
        "there is no ALiBi": biased(causal_only=True),
        "slopes of a head count that is no power of two are a plain series": biased(
            slopes=lambda heads: 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
        ),
    },
    "ALiBi beyond 2048 tokens": {
        "distances end at 2048": biased(farthest=2048), "there is no ALiBi": biased(causal_only=True),
    },
    "W_pack": {
        "its rows are read as k, q, v": decoder(packed("kqv"), _packed),
        "its rows are read as q, v, k": decoder(packed("qvk"), _packed),
        "its rows are read head by head": decoder(packed("heads"), _packed),
    },
    "bias of q, k, v": {"the bias is left out": decoder(WithoutBias, lambda model: model.config.qkv_bias)},
    "KV cache": {"new tokens stand one position too far": kind_of(Shifted, _rope)},
    "batch": {"padding is looked at": kind_of(Unmasked)},
}  # fmt: skip
