"""A Baichuan of 7B in LLaMA's layout, as people publish it ("LLaMAfied"), and the way back.

    Baichuan    self_attn.W_pack (3C, C)                       NormHead is applied by the code
    LLaMA       self_attn.q_proj, k_proj, v_proj (C, C) each   NormHead has been applied

W_pack is q, k and v below one another. The rest is the same, so software for LLaMA computes the same numbers. 13B has
no such layout, because LLaMA's code lacks ALiBi.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.config import Config
from refimpl.errors import InputError

LAYOUTS = ("baichuan", "llama")
PACKED, APART = "W_pack", ("q_proj", "k_proj", "v_proj")
# Keys of config.json that belong to one layout.
OF_BAICHUAN = ("auto_map", "z_loss_weight", "lm_head_normalized")
OF_LLAMA = ("num_key_value_heads", "attention_bias", "mlp_bias", "head_dim", "rope_theta", "rope_parameters")


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a weight, as a weight."""

    whole: Any
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    def read(self, dtype: np.dtype, rows: slice = slice(None)) -> np.ndarray:
        start, stop, _ = rows.indices(self.stop - self.start)
        return self.whole.read(dtype, slice(self.start + start, self.start + stop))


@dataclass(frozen=True, eq=False)
class Joined:
    """Weights below one another, as one weight."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self, dtype: np.dtype, rows: slice = slice(None)) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        found = []
        for part in self.parts:
            count = part.shape[0]
            if start < count and stop > 0:
                found.append(part.read(dtype, slice(max(start, 0), min(stop, count))))
            start, stop = start - count, stop - count
        return np.concatenate(found)


def in_layout(layout: str, config: Config, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint in another layout, by the names that they have there, in their order.

    Raises InputError for an unknown layout, and for a model that has none of that kind.
    """
    if layout not in LAYOUTS:
        raise InputError(f"the layout is {layout!r:.40}, expected one of {', '.join(LAYOUTS)}")
    if config.qkv_bias or config.alibi:
        raise InputError(f"{config.family} has no layout of {layout}'s; Baichuan-7B and Baichuan2-7B have two")
    if config.qkv_packed == (layout == "baichuan"):
        raise InputError(f"this {config.family} is in the layout of {layout} already; leave --layout out")
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        module = name.split(".")[-2]
        if module == PACKED:
            rows = weight.shape[0] // 3
            for number, apart in enumerate(APART):
                found[name.replace(PACKED, apart)] = Rows(weight, number * rows, (number + 1) * rows)
        elif module == APART[0]:
            found[name.replace(module, PACKED)] = Joined(tuple(weights[name.replace(module, one)] for one in APART))
        elif module not in APART:
            found[name] = weight
    return found


def config_keys(layout: str, config: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json in another layout."""
    llama = layout == "llama"
    kept = {key: value for key, value in keys.items() if key not in (OF_BAICHUAN if llama else OF_LLAMA)}
    if llama:
        return kept | {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
            "num_key_value_heads": config.num_key_value_heads, "rope_theta": config.rope_theta,
        }  # fmt: skip
    kept |= {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"]}
    return kept | ({"z_loss_weight": 0.0, "lm_head_normalized": True} if config.family == "Baichuan2-7B" else {})
