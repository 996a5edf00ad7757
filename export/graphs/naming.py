"""Names at the ends of a graph: the taps where parts meet, in our words, in Qualcomm's, and as compilers write them."""

from __future__ import annotations

import re

_HIDDEN = re.compile(r"_model_(?:layers_(\d{1,6})_Add_1_Add|embed_tokens_Gather_Gather)_output_0")
_CACHE = re.compile(r"past_(key|value)_(\d{1,6})_(?:in|out)")


def boundary(layer: int) -> str:
    """The tap before a layer, where parts meet."""
    return f"model.layers.{layer - 1}" if layer else "model.embed_tokens"


def hub_boundary(layer: int) -> str:
    """The same in Qualcomm's published parts of Baichuan2, after AI Hub has made each `.` and `/` a `_`."""
    return f"_model_layers_{layer - 1}_Add_1_Add_output_0" if layer else "_model_embed_tokens_Gather_Gather_output_0"


def tap_of(name: str) -> str:
    """The tap that an end of a graph shows: keys and values have one tap, as inputs and as outputs."""
    if found := _CACHE.fullmatch(name):
        return f"model.layers.{int(found[2])}.self_attn.{found[1]}"
    if found := _HIDDEN.fullmatch(name):
        return boundary(int(found[1]) + 1 if found[1] else 0)
    return "lm_head" if name == "logits" else name


def sanitised(name: str) -> str:
    """A name as compilers write it, without the underscores that they put in front or behind."""
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
