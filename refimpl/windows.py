"""A long text cut into windows. Each is run by itself, so that it sees nothing of those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refimpl.errors import InputError

if TYPE_CHECKING:
    from refimpl.forward import Forward

WINDOW = 512  # tokens that are run at a time: attention's scores grow with the square of their number


def cut(model: Forward, ids, window: int) -> list[np.ndarray]:
    """A text or its ids cut into windows (n,) int64 that do not overlap and fit the context. A last one may be short.

    Raises InputError for ids outside the vocabulary, and for a window below one token.
    """
    ids = model.token_ids(ids)[0]
    size = min(window, model.config.max_position_embeddings)
    if size < 1:
        raise InputError(f"window is {window}, expected a positive number of tokens")
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def windows(model: Forward, ids, window: int | None = None) -> list[np.ndarray]:
    """A long text or its ids cut into windows (n,) int64 that do not overlap, of two tokens at least.

    Each has as many tokens as the context, or `window` tokens if that is less. A token that is left over is dropped,
    for nothing follows it. Raises InputError if there is nothing to predict.
    """
    text = model.token_ids(ids)[0]
    context = model.config.max_position_embeddings
    size = context if window is None else min(window, context)
    if size < 2 or len(text) < 2:
        raise InputError("a text, or a window, of fewer than two tokens has nothing to predict; give more")
    return [text[start : start + size] for start in range(0, len(text) - 1, size)]
