"""What a change of the weights costs: how far the model's next-token distributions are from the reference's.

The names and definitions are those of llama.cpp's `perplexity --kl-divergence`. At each position p is the judged
model's distribution of the next token, q the reference's, and y the token that followed:

    perplexity     exp of the mean of -ln p(y), and its ratio to the reference's on the same tokens
    KL divergence  sum of q (ln q - ln p) over the vocabulary, in nats: mean, median, 99 % and largest over the tokens
    same top-1     the share of positions where both models find the same next token likeliest
    Δp             p(y) - q(y): its root mean square, and its mean, which is negative where the model knows less

The number after ± is the standard error of a mean over the tokens; exp and square root carry it on to first order. The
ratio's error is small because both models read the same tokens. Neighbouring tokens depend on each other, so the true
errors are somewhat larger.

This differs from llama.cpp in two ways. llama.cpp counts only the second half of each window; here every token counts
but a window's first. llama.cpp keeps ln q in 16 bits and drops terms below exp(-16); here all words count in float64.

Source: `kl_divergence` and `mean_and_uncertainty` in llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from golden.cost.reading import AS_USUAL, Reading
from refimpl.errors import InputError
from refimpl.loss import predictions
from refimpl.model import Model
from refimpl.sweep import Result
from refimpl.windows import windows

ROWS = 1 << 21  # logits that are widened to float64 at a time


@dataclass(frozen=True)
class Quality:
    """The figures of a model a judged by a reference b on the same tokens.

    KL is in nats, `same_top` and Δp are from 0 to 1. `sqnr` is that of the logits in dB: 10 log10(sum(b^2) /
    sum((a - b)^2)), infinite where both are the same. `…_error` are standard errors.
    """

    tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    reference_perplexity_error: float
    ratio: float
    ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: float
    same_top_error: float
    rms_dp: float
    rms_dp_error: float
    mean_dp: float
    mean_dp_error: float
    sqnr: float

    def __str__(self) -> str:
        return "\n".join((
            f"perplexity     {self.perplexity:.3f} ± {self.perplexity_error:.3f}, "
            f"of the reference {self.reference_perplexity:.3f} ± {self.reference_perplexity_error:.3f}",
            f"ratio          {self.ratio:.4f} ± {self.ratio_error:.4f}",
            f"KL divergence  {self.kl_mean:.5f} ± {self.kl_error:.5f} nats, "
            f"median {self.kl_median:.5f}, 99 % {self.kl_99:.4f}, largest {self.kl_max:.3f}",
            f"same top-1     {self.same_top:.2%} ± {self.same_top_error:.2%}",
            f"RMS Δp         {self.rms_dp:.2%} ± {self.rms_dp_error:.2%}, mean {self.mean_dp:+.2%} ± "
            f"{self.mean_dp_error:.2%}",
            f"SQNR of logits {self.sqnr:.1f} dB",
            f"tokens         {self.tokens}",
        ))  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All figures for JSON, which has no infinity: None stands for an infinite SQNR."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}


def quality(
    model: Model,
    reference: Model,
    ids,
    reading: Reading = AS_USUAL,
    cache_dtype: str | None = None,
) -> Quality:
    """Judges `model` by `reference` on a text or its ids, window by window, so that logits never pile up.

    The usual window is the model's context. `cache_dtype`: the format of the judged model's key/value cache; the
    reference's cache keeps what is computed. Raises InputError if there is nothing to predict, and for different
    vocabularies.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {reference.config.vocab_size}"
        raise InputError(f"the vocabularies have {sizes} words; only models of the same tokenizer can be compared")
    rows = windows(reference, ids, reading.window)
    pieces = [(model, reference, row, reading.dtype, cache_dtype) for row in rows]
    return summary(reading.each(scores, pieces, "judging"))


def scores(model: Model, reference: Model, ids: np.ndarray, dtype: str, cache_dtype: str | None = None) -> Result:
    """The figures of each predicted token of one window: name -> (n,) float64. See `compared`."""
    judged = predictions(model, ids, dtype, cache_dtype=cache_dtype)
    pairs = zip(judged, predictions(reference, ids, dtype), strict=True)
    return joined([compared(a, b, following) for (a, following), (b, _) in pairs])


def compared(a: np.ndarray, b: np.ndarray, following: np.ndarray) -> Result:
    """The figures of logits `a` (n, V) judged by logits `b` (n, V); `following` (n,) are the tokens that came next.

    Each is (n,) float64: "loss" and "reference_loss", -ln of the probability of the token that came; "kl"; "same_top",
    0 or 1; "signal" and "noise", the sums over the vocabulary of b² and (a - b)². Raises InputError for NaN and
    infinity.
    """
    step, found = max(1, ROWS // a.shape[-1]), []
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        x, y, right = a[rows].astype(np.float64), b[rows].astype(np.float64), following[rows, None]
        with np.errstate(over="ignore", invalid="ignore"):
            signal, noise = (y * y).sum(-1), np.square(x - y).sum(-1)
        if not np.isfinite(noise).all():
            raise InputError("the logits hold NaN or infinity, which give no distribution to judge; refimpl trace "
                             "shows the tensor where they begin")  # fmt: skip
        same = x.argmax(-1) == y.argmax(-1)
        x, y = log_softmax(x), log_softmax(y)
        found.append({
            "loss": -np.take_along_axis(x, right, -1)[:, 0],
            "reference_loss": -np.take_along_axis(y, right, -1)[:, 0],
            "kl": (np.exp(y) * (y - x)).sum(-1),
            "same_top": same.astype(np.float64), "signal": signal, "noise": noise,
        })  # fmt: skip
    return joined(found)


def joined(results: Iterable[Result]) -> dict[str, np.ndarray]:
    """The figures of several pieces of text, one after another along the last axis."""
    results = list(results)
    return {name: np.concatenate([result[name] for result in results], -1) for name in results[0]}


def summary(results: Iterable[Result]) -> Quality:
    """The figures of all tokens as one Quality. Rounding may make a KL slightly negative."""
    tokens = joined(results)
    kl, losses = tokens["kl"], (tokens["loss"], tokens["reference_loss"])
    (loss, loss_error), (reference, reference_error) = map(mean_and_error, losses)
    difference, difference_error = mean_and_error(losses[0] - losses[1])
    dp = np.exp(-losses[0]) - np.exp(-losses[1])
    square, square_error = mean_and_error(dp * dp)
    signal, noise = float(tokens["signal"].sum()), float(tokens["noise"].sum())
    (kl_mean, kl_error), (same, same_error), (mean_dp, mean_dp_error) = map(
        mean_and_error, (kl, tokens["same_top"], dp)
    )
    rms, ratio = math.sqrt(square), math.exp(difference)
    return Quality(
        tokens=len(kl),
        perplexity=math.exp(loss), perplexity_error=math.exp(loss) * loss_error,
        reference_perplexity=math.exp(reference), reference_perplexity_error=math.exp(reference) * reference_error,
        ratio=ratio, ratio_error=ratio * difference_error,
        kl_mean=kl_mean, kl_error=kl_error, kl_median=float(np.median(kl)), kl_99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        same_top=same, same_top_error=same_error,
        rms_dp=rms, rms_dp_error=0.5 / rms * square_error if rms else 0.0,
        mean_dp=mean_dp, mean_dp_error=mean_dp_error,
        sqnr=10 * math.log10(signal / noise) if noise else math.inf,
    )  # fmt: skip


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """The mean of independent values (n,), and its standard error: 0 for a single one.

    >>> mean_and_error(np.array([1.0, 0.0, 1.0, 0.0, 1.0]))
    (0.6, 0.24...)
    """
    return float(x.mean()), float(x.std() / math.sqrt(max(1, len(x) - 1)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The logarithms of the softmax along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
