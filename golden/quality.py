"""What a change of the weights costs: how far its next-token distributions are from the reference's.

The words are llama.cpp's: KL divergence of the reference's distribution from the changed model's (in nats, for each
token), same top 1 (how often both find the same token likeliest), and perplexity of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.errors import InputError
from refimpl.loss import cross_entropy, predictions
from refimpl.model import Model


@dataclass(frozen=True)
class Quality:
    """`model` against `reference` over the same tokens. KL in nats; `same_top` a share from 0 to 1; `sqnr` of the
    logits in dB: 10 log10(sum(b^2) / sum((a - b)^2)), infinite where both are the same."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_max: float
    same_top: float
    sqnr: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} (reference {self.reference_perplexity:.2f}), "
            f"KL {self.kl_mean:.4f} nats (max {self.kl_max:.2f}), same top-1 {self.same_top:.1%}, {self.tokens} tokens"
        )


def quality(model: Model, reference: Model, ids, window: int | None = None, dtype: str = "float32") -> Quality:
    """Judges `model` by `reference` on a text (or its ids), a piece at a time, so that logits never pile up.

    Windows are those of `refimpl.loss.predictions`. Raises InputError if there is nothing to predict.
    """
    kls, losses, same, signal, noise = [], [], [], 0.0, 0.0
    ids = reference.token_ids(ids)
    pairs = zip(*(predictions(m, ids, dtype, window) for m in (model, reference)), strict=True)
    for (a, following), (b, _) in pairs:
        a, b = a.astype(np.float64), b.astype(np.float64)
        signal, noise = signal + float(np.sum(b * b)), noise + float(np.sum((a - b) ** 2))
        logp_a, logp_b = _log_softmax(a), _log_softmax(b)
        kls.append((np.exp(logp_b) * (logp_b - logp_a)).sum(-1))
        losses.append([cross_entropy(x, following) for x in (a, b)])
        same.append(a.argmax(-1) == b.argmax(-1))
    kl, agree, loss = np.concatenate(kls), np.concatenate(same), np.concatenate(losses, axis=1).mean(1)
    return Quality(
        tokens=len(kl), perplexity=float(np.exp(loss[0])), reference_perplexity=float(np.exp(loss[1])),
        kl_mean=float(kl.mean()), kl_max=float(kl.max()), same_top=float(agree.mean()),
        sqnr=10 * math.log10(signal / noise) if noise else math.inf,
    )  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def read_documents(path: Path, model: Model) -> list[int]:
    """The ids of a text file whose documents are separated by blank lines, each followed by the end-of-sequence id.

    That is how Baichuan's training data, and the embedded model's, are laid out. Raises InputError for a file that
    cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from None
    ids: list[int] = []
    for document in text.strip().split("\n\n"):
        ids += [*model.tokenizer.encode(document.strip("\n") + "\n"), model.tokenizer.eos_token_id]
    return ids
