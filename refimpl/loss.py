"""How surprised the model is by a text: the training loss, and perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refimpl.errors import InputError

if TYPE_CHECKING:
    from refimpl.model import Model

IGNORE = -100  # the label of a position that does not count


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p(label) in nats, 0 where the label is -100: logits (..., V), labels (...) -> (...) in logits' dtype."""
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    right = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == IGNORE, 0.0, total - right).astype(logits.dtype)


def loss(model: Model, ids, labels, dtype: str = "float32", attention_mask=None, z_loss_weight=None) -> float:
    """The training loss: mean cross entropy of predicting each next label, plus Baichuan2's z-loss.

    The z-loss, z_loss_weight * mean(max logit ^ 2), keeps logits from drifting. It takes the largest logit where
    others take log-sum-exp, and counts positions that the cross entropy ignores.

    Source: `BaichuanForCausalLM.forward` in the official modeling_baichuan.py.
    """
    logits = model(ids, dtype, attention_mask)[:, :-1]
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    labels = np.asarray(labels).reshape(len(logits), -1)[:, 1:]
    counted = labels != IGNORE
    if not counted.any():
        raise InputError("no label counts: all are -100 or the text is shorter than two tokens")
    weight = model.config.z_loss_weight if z_loss_weight is None else z_loss_weight
    z = weight * np.mean(logits.max(-1) ** 2) if weight else 0.0
    return float(cross_entropy(logits, labels).sum() / counted.sum() + z)


def perplexity(model: Model, ids, dtype: str = "float32", window: int | None = None) -> float:
    """exp of the mean cross entropy per token over a long text, cut into windows that do not overlap.

    `window` is at most, and by default, the model's context. The first token of each window is not predicted.
    """
    ids = model.token_ids(ids)[0]
    window = min(window or model.config.max_position_embeddings, len(ids))
    if window < 2:
        raise InputError("a text of fewer than two tokens has no perplexity")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window]
        if len(piece) < 2:
            break
        logits = model(piece, dtype)[0, :-1]
        total += float(cross_entropy(logits.astype(np.float64), piece[1:]).sum())
        count += len(piece) - 1
    return float(np.exp(total / count))
