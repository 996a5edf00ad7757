"""The mask: attention that sees too much or too little, and ALiBi's bias in the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from export.causes.evidence import Evidence, Guess
from export.causes.whatif import attends
from refimpl.positions import alibi_slopes


def mask(e: Evidence) -> Iterator[Guess]:
    """Attention that sees too much or too little."""
    if not attends(e) or "attention_mask" not in e.inputs:
        return
    right = e.inputs["attention_mask"]
    low, spec = float(right.min()), e.spec
    seen = right > low / 2
    keys = np.arange(spec.context)
    queries = np.arange(spec.context - spec.tokens, spec.context)[:, None]
    real = seen[0, 0].any(0)
    causal = keys[None] <= queries

    def biased(allowed: np.ndarray) -> np.ndarray:
        bias = np.where(seen, right, 0.0)  # ALiBi's, where it is known
        return np.where(np.broadcast_to(allowed, seen.shape), bias, low).astype(np.float32)

    ideas = {
        "attention sees later tokens: the mask is not causal": real[None] & np.ones_like(causal),
        "attention sees the padding: the mask of padding is missing": causal,
        "attention sees everything: there is no mask": np.ones_like(causal),
        "no token sees itself: the mask is off by one": real[None] & (keys[None] < queries),
        "attention sees the next token, too: the mask is off by one": real[None] & (keys[None] <= queries + 1),
        "attention does not see the past": real[None] & causal & (keys[None] >= spec.context - spec.tokens),
        "attention sees only the past": real[None] & causal & (keys[None] < spec.context - spec.tokens),
    }
    for text, allowed in ideas.items():
        if not np.array_equal(np.broadcast_to(allowed, seen.shape), seen):
            yield Guess(text, e.with_inputs(attention_mask=biased(allowed)))
    yield Guess("the mask is inverted, or its numbers are multiplied and not added",
                e.with_inputs(attention_mask=np.where(seen, low, 0.0).astype(np.float32)))  # fmt: skip
    if e.config.alibi:
        yield from _other_alibi(e, right, seen)
    for weak in (weak for weak in (-1.0, -10.0, -50.0, -100.0) if weak > low):
        yield Guess(f"masked places get {weak:g}, which is too weak to hide them",
                    e.with_inputs(attention_mask=np.where(seen, right, weak).astype(np.float32)))  # fmt: skip


def _other_alibi(e: Evidence, right: np.ndarray, seen: np.ndarray) -> Iterator[Guess]:
    """Other slopes in the mask."""
    heads = e.config.num_attention_heads
    slopes = alibi_slopes(heads)
    others = {
        "ALiBi is missing: the mask has no bias": 0 * slopes,
        "ALiBi's bias has the wrong sign": -slopes,
        "ALiBi's slopes are in the opposite order": slopes[::-1],
        "ALiBi has the slope of its first head in all heads": np.full_like(slopes, slopes[0]),
    }
    for count in {2 ** math.ceil(math.log2(heads)), 2 * heads, *([heads // 2] if heads > 1 else [])} - {heads}:
        others[f"ALiBi's slopes are those of {count} heads, expected {heads}"] = np.resize(alibi_slopes(count), heads)
    for text, other in others.items():
        factor = (other / slopes)[None, :, None, None]
        yield Guess(text, e.with_inputs(attention_mask=np.where(seen, right * factor, right).astype(np.float32)))
