"""How a token knows where it is: RoPE's tables, ALiBi's slopes, and the mask.

All of these are inputs of the decoder, so that prefill, decoding, padding and a phone's static cache are the same
code there.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.config import Config

# exp(-30000) is 0 in every format, and ALiBi takes at most 3500 off at 4096 tokens; float16 ends at -65504.
LOWEST = -3e4


def rope_tables(positions: np.ndarray, head_dim: int, theta: float, dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of each pair's angle: positions (B, T) -> two arrays (B, 1, T, D/2) of `dtype`.

    Pair i turns by position * theta^(-2i/D). Frequencies and angles are computed in `dtype`: the official float32
    tables have the error of a float32 angle (1e-4 at position 4000), from which the float64 oracle is free.

    Source: `RotaryEmbedding` in the official modeling_baichuan.py (7B), whose tables hold each column twice.
    """
    exponents = np.arange(0, head_dim, 2, dtype=dtype) / np.asarray(head_dim, dtype)
    frequencies = 1.0 / np.power(np.asarray(theta, dtype), exponents)                           # (D/2,)
    angles = positions.astype(dtype)[:, None, :, None] * frequencies                            # (B, 1, T, D/2)
    return np.cos(angles), np.sin(angles)


def alibi_slopes(heads: int) -> np.ndarray:
    """How steeply each head forgets: (H,) float64, a geometric series from 2^(-8/H) to 2^-8.

    8 heads have 1/2, 1/4 … 1/256. The first head takes 5 off the score of a key 10 tokens back, so that this key gets
    e^5 = 148 times less attention. The last head takes off 0.04 and hardly forgets.

    If H is not a power of two, the largest power of two below H has its series, and the other heads have every second
    term of the next power's series.

    Source: Press, Smith, Lewis, "Train Short, Test Long" (2022); `_get_interleave` in modeling_baichuan.py (13B).
    """
    power = 2 ** math.floor(math.log2(heads))
    start = 2.0 ** (-8.0 / power)
    slopes = [start**k for k in range(1, power + 1)]
    between = math.sqrt(start)  # the series of 2 * power
    slopes += [between**k for k in range(1, 2 * (heads - power), 2)]
    return np.array(slopes)


def token_positions(mask: np.ndarray) -> np.ndarray:
    """The position of each token (B, S) under an attention mask (B, S): how many before it are not padding."""
    return np.maximum(np.cumsum(mask > 0, axis=1) - 1, 0)


def attention_bias(config: Config, mask: np.ndarray, tokens: int, dtype) -> np.ndarray:
    """What is added to the scores of the last `tokens` positions: (B or 1, H or 1, T, S) of `dtype`.

    A query may look at keys that are not later than it, are not padding, and have the same value in `mask` (B, S): 0
    for padding, 1 for tokens, others to keep packed sequences apart, as in the official 13B code. There the bias is 0,
    or ALiBi's slope * (key's position - query's). Elsewhere it is LOWEST, for which softmax gives exactly 0.

    LOWEST is finite, because padding looks at nothing, and the softmax of a row of -inf is NaN. It fits into float16,
    because a device may compute in that format.

    The official 13B code adds slope * key, which is the same after softmax. But it rounds the bias to the model's
    16-bit format, where steep heads lose their locality: at key 2000, bfloat16 has steps of 8. We keep it in `dtype`.
    """
    size = mask.shape[1]
    queries, keys = np.arange(size - tokens, size)[:, None], np.arange(size)[None, :]           # (T, 1), (1, S)
    allowed = (mask[:, None, :] == mask[:, -tokens:, None]) & (mask[:, None, :] > 0)            # (B, T, S)
    allowed = (allowed & (keys <= queries))[:, None]                                            # (B, 1, T, S)
    if config.alibi:
        positions = token_positions(mask)                                                       # (B, S)
        distance = (positions[:, None, :] - positions[:, -tokens:, None]).astype(dtype)[:, None]  # (B, 1, T, S)
        bias = alibi_slopes(config.num_attention_heads).astype(dtype)[:, None, None] * distance  # (B, H, T, S)
    else:
        bias = np.zeros((1, 1, 1), dtype)
    return np.where(allowed, bias, np.asarray(LOWEST, dtype))
