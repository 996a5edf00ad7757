"""The losses that training makes small: functions of the logits alone, which give the loss and its gradient.

    next token     -log p(label), p = softmax(logits)             d/dlogits = p - [the label]
    z-loss         weight * (largest logit)²                      d/dlogits = 2 weight * largest logit, there alone
    teacher        KL(q ‖ p) = Σ q (log q - log p)                d/dlogits = p - q

All are means: the cross entropy over the labels that count, the z-loss over all positions, as the official code has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.loss import IGNORE
from refimpl_kernels.ops import softmax

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]  # logits (B, T, V) -> the loss, and its gradient by them


@dataclass(frozen=True)
class NextToken:
    """The training loss: each position predicts the next one's label. `labels` (B, T) are the ids themselves.

    `real` (B, T), if given: 0 for padding, which the z-loss then leaves out. `counts`: over how many labels and how
    many positions the means are, if these rows are a part of a batch: the parts then add up to the batch's loss.

    Source: `BaichuanForCausalLM.forward` in the official modeling_baichuan.py, which has no `real`.
    """

    labels: np.ndarray
    z_loss_weight: float = 0.0
    real: np.ndarray | None = None
    counts: tuple[int, int] | None = None

    def __call__(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss, and its gradient (B, T, V), which is 0 at the last position, because it has no next token."""
        x, labels = logits[:, :-1], self.labels[:, 1:]  # (B, T-1, V), (B, T-1)
        counted = labels != IGNORE
        seen = np.ones_like(counted) if self.real is None else self.real[:, 1:] > 0
        count, positions = self.counts or (int(counted.sum()), int(seen.sum()))
        gradient = np.empty_like(logits)
        g, gradient[:, -1] = gradient[:, :-1], 0
        np.subtract(x, x.max(-1, keepdims=True), out=g)
        at = np.maximum(labels, 0)[..., None]
        right = np.take_along_axis(g, at, -1)  # the label's logit less the largest
        np.exp(g, out=g)
        total = g.sum(-1, keepdims=True)
        loss = float(np.where(counted, (np.log(total) - right)[..., 0], 0.0).sum(dtype=np.float64) / count)
        g *= counted[..., None] / (total * np.asarray(count, x.dtype))
        share = counted[..., None] / np.asarray(count, x.dtype)
        np.put_along_axis(g, at, np.take_along_axis(g, at, -1) - share, -1)
        if self.z_loss_weight:
            top = x.argmax(-1)[..., None]
            largest = np.take_along_axis(x, top, -1) * seen[..., None]
            loss += self.z_loss_weight * float((largest**2).sum(dtype=np.float64)) / positions
            more = largest * (2 * self.z_loss_weight / positions)
            np.put_along_axis(g, top, np.take_along_axis(g, top, -1) + more, -1)
        return loss, gradient


@dataclass(frozen=True)
class Teacher:
    """How far the next-token distributions are from those of `logits` (B, T, V): the mean KL divergence in nats."""

    logits: np.ndarray

    def __call__(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss, and its gradient (B, T, V)."""
        count = logits[..., 0].size
        q, p = softmax(self.logits.astype(logits.dtype)), softmax(logits)
        tiny = np.finfo(logits.dtype).tiny
        kl = (q * (np.log(np.maximum(q, tiny)) - np.log(np.maximum(p, tiny)))).sum(-1)
        return float(kl.mean(dtype=np.float64)), (p - q) / np.asarray(count, logits.dtype)
