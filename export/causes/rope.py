"""Positions: keys or queries that RoPE has turned by other angles, or in other pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.causes.evidence import Evidence, Guess
from export.causes.whatif import attends, last_name
from refimpl.positions import rope_tables

THETAS = (1e4, 1e5, 5e5, 1e6)  # the bases of Baichuan, Llama and Qwen


def rope(e: Evidence) -> Iterator[Guess]:
    """Keys or queries turned by other angles, or in other pairs."""
    if last_name(e.tap) not in ("key", "query") or e.config.rope_theta is None or "position_ids_cos" not in e.inputs:
        return
    cos, sin = (e.inputs[f"position_ids_{name}"][:, :, -e.spec.real :].astype(np.float64) for name in ("cos", "sin"))
    plain = turned(e.expected, cos, -sin)  # before RoPE
    positions = e.spec.past + np.arange(e.spec.real)[None]
    size, theta = e.config.head_dim, e.config.rope_theta
    for other in THETAS:
        if other != theta:
            yield Guess(f"RoPE has the base {other:g}, expected {theta:g}",
                        turned(plain, *rope_tables(positions, size, other, np.float64)))  # fmt: skip
    yield Guess("RoPE turns pairs of neighbours (interleaved), expected element i of one half with i of the other",
                interleaved(plain, cos, sin))  # fmt: skip
    moves = {
        by: "padding is counted" for by in (e.spec.tokens - e.spec.real, e.spec.context - e.spec.real - e.spec.past)
    }
    moves |= {-e.spec.past: "the past is not counted", 1: "off by one", -1: "off by one"}
    for by, why in moves.items():
        if by:
            text = f"RoPE's positions are {abs(by)} too {'high' if by > 0 else 'low'}: {why}"
            yield Guess(text, turned(plain, *rope_tables(positions + by, size, theta, np.float64)))
    yield Guess("RoPE is missing", plain)
    yield Guess("RoPE turns the other way: sin has the wrong sign", turned(plain, cos, -sin))
    yield Guess("RoPE has cos and sin exchanged", turned(plain, sin, cos))
    yield Guess("the halves of RoPE's result are exchanged", np.roll(e.expected, size // 2, -1))


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on halves, as the decoder has it."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on neighbours, as GPT-J has it."""
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def positions(e: Evidence) -> Iterator[Guess]:
    """Tables of other positions or of another base, where later tensors show their effect."""
    if not attends(e) or e.config.rope_theta is None or "position_ids_cos" not in e.inputs:
        return
    first = e.spec.past - (e.spec.tokens - e.spec.real) + np.arange(e.spec.tokens)[None]
    size, theta = e.config.head_dim, e.config.rope_theta

    def tables(at: np.ndarray, base: float) -> np.ndarray:
        cos, sin = rope_tables(np.maximum(at, 0), size, base, np.float64)
        return e.with_inputs(position_ids_cos=cos.astype(np.float32), position_ids_sin=sin.astype(np.float32))

    for by in (1, -1):
        yield Guess(
            f"positions are one {'later' if by > 0 else 'earlier'} than they should be", tables(first + by, theta)
        )
    for other in THETAS:
        if other != theta:
            yield Guess(f"RoPE has the base {other:g}, expected {theta:g}", tables(first, other))
    yield Guess("cos and sin are exchanged", e.with_inputs(
        position_ids_cos=e.inputs["position_ids_sin"], position_ids_sin=e.inputs["position_ids_cos"]))  # fmt: skip
