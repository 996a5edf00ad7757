"""How surprised the model is by a text: the training loss, and perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from refimpl.errors import InputError
from refimpl.windows import windows

if TYPE_CHECKING:
    from refimpl.forward import Forward

IGNORE = -100  # the label of a position that does not count


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p(label) in nats, and 0 where the label is -100: logits (..., V), labels (...) -> (...) in logits' dtype."""
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    right = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == IGNORE, 0.0, total - right).astype(logits.dtype)


def expect_labels(labels, ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """The labels (B, T). Raises InputError unless they are one for each id, in the vocabulary, and some count."""
    labels = np.asarray(labels)
    if labels.size == ids.size:  # a plain list of one text, say
        labels = labels.reshape(ids.shape)
    if labels.shape != ids.shape or labels.dtype.kind not in "iu":
        raise InputError(f"the labels are {labels.dtype} {labels.shape}, expected one for each id, {ids.shape}")
    counted = labels != IGNORE
    if (wrong := labels[counted & ((labels < 0) | (labels >= vocabulary))]).size:
        raise InputError(f"the labels are token ids, or {IGNORE} for what does not count, but one is {wrong[0]}")
    if not counted[:, 1:].any():
        raise InputError("no label counts: all are -100, or the text is shorter than two tokens")
    return labels.astype(np.int64)


def loss(model: Forward, ids, labels, dtype: str = "float32", attention_mask=None, z_loss_weight=None) -> float:
    """The training loss: mean cross entropy of predicting each next label, plus Baichuan2's z-loss.

    The z-loss, z_loss_weight * mean(max logit ^ 2), keeps logits from drifting. It takes the largest logit where
    others take log-sum-exp, and counts positions that the cross entropy ignores.

    Source: `BaichuanForCausalLM.forward` in the official modeling_baichuan.py.
    """
    ids = model.token_ids(ids)
    labels = expect_labels(labels, ids, model.config.vocab_size)[:, 1:]
    logits = model(ids, dtype, attention_mask)[:, :-1]
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    weight = model.config.z_loss_weight if z_loss_weight is None else z_loss_weight
    z = weight * np.mean(logits.max(-1) ** 2) if weight else 0.0
    return float(cross_entropy(logits, labels).sum() / (labels != IGNORE).sum() + z)


def predictions(
    model: Forward,
    ids,
    dtype: str = "float32",
    window: int | None = None,
    piece: int = 128,
    cache_dtype: str | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The model's predictions over a long text: logits (n, V) and the ids (n,) that did follow, piece by piece.

    The text is cut into `windows`; the first token of each is not predicted. A window is fed `piece` tokens at a
    time, so that logits never pile up. `cache_dtype`: see `Model.new_cache`.

    Raises InputError if there is nothing to predict.
    """
    for row in windows(model, ids, window):
        cache = model.new_cache(capacity=len(row), dtype=cache_dtype)
        for begin in range(0, len(row) - 1, piece):
            end = min(begin + piece, len(row) - 1)
            yield model(row[begin:end], dtype, cache=cache)[0], row[begin + 1 : end + 1]


def perplexity(model: Forward, ids, dtype: str = "float32", window: int | None = None) -> float:
    """exp of the mean cross entropy per token over a long text; windows as in `predictions`."""
    losses = [cross_entropy(x.astype(np.float64), y) for x, y in predictions(model, ids, dtype, window)]
    return float(np.exp(np.concatenate(losses).mean()))
