"""What a change of the weights costs: how far its next-token distributions are from the reference's.

The words and definitions are those of llama.cpp's `perplexity --kl-divergence`; p is the judged model's distribution of
the next token and q the reference's, y the token that did follow:

    perplexity     exp of the mean of -ln p(y), and the ratio to the reference's, on the same tokens
    KL divergence  sum of q (ln q - ln p) over the vocabulary, in nats: mean, median, 99 % and largest over the tokens
    same top-1     the share of tokens for which both find the same next token likeliest
    Δp             p(y) - q(y): its root mean square, and its mean, which is below 0 where the model knows less

After ± stands the standard error of a mean over the tokens, carried through exp and square root to first order; that of
the ratio knows that both models read the same tokens. Tokens of one text depend on each other, so errors are larger.

Two deviations: llama.cpp counts only the second half of each window, and keeps the reference's ln q in 16 bits and
leaves out of the sum what is below exp(-16). Here every token but a window's first counts, in float64, over all words.

Source: `kl_divergence` and `mean_and_uncertainty` in llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import InputError
from refimpl.loss import predictions
from refimpl.model import Model
from refimpl.sweep import Pool, Result, sweep
from refimpl.windows import windows
from refimpl_kernels import formats

ROWS = 1 << 21  # logits that are turned into float64 at a time


@dataclass(frozen=True)
class Quality:
    """`model` against `reference` over the same tokens. KL in nats; `same_top` and Δp from 0 to 1; `sqnr` of the
    logits in dB: 10 log10(sum(b^2) / sum((a - b)^2)), infinite where both are the same. `…_error`: standard errors."""

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
        """All of it, as JSON has it: no infinite SQNR, but None."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}


def quality(
    model: Model,
    reference: Model,
    ids,
    window: int | None = None,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
    cache_dtype: str | None = None,
) -> Quality:
    """Judges `model` by `reference` on a text (or its ids), a window at a time, so that logits never pile up.

    Windows are those of `refimpl.windows.windows`. `executor`, `resume`: who computes them, and where finished ones are
    kept (`refimpl.sweep`). `cache_dtype`: what the judged model's cache keeps; the reference's, what is computed.
    Raises InputError if there is nothing to predict, and for different vocabularies.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {reference.config.vocab_size}"
        raise InputError(f"the vocabularies have {sizes} words; only models of the same tokenizer can be compared")
    pieces = [(model, reference, row, dtype, cache_dtype) for row in windows(reference, ids, window)]
    return summary(sweep(scores, pieces, "judging", executor, resume))


def scores(model: Model, reference: Model, ids: np.ndarray, dtype: str, cache_dtype: str | None = None) -> Result:
    """The figures of each token of one window that is predicted: name -> (n,) float64. See `compared`."""
    pairs = zip(
        predictions(model, ids, dtype, cache_dtype=cache_dtype), predictions(reference, ids, dtype), strict=True
    )
    return joined([compared(a, b, following) for (a, following), (b, _) in pairs])


def compared(a: np.ndarray, b: np.ndarray, following: np.ndarray) -> Result:
    """The figures of logits `a` (n, V) judged by `b` (n, V), where the tokens `following` (n,) did follow.

    "loss" and "reference_loss", -ln of the probability of the right token; "kl"; "same_top", 0 or 1; "signal" and
    "noise", sums over the vocabulary of b² and (a - b)²: (n,) float64 each. Raises InputError for NaN and infinity.
    """
    step, found = max(1, ROWS // a.shape[-1]), []
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        x, y, right = a[rows].astype(np.float64), b[rows].astype(np.float64), following[rows, None]
        with np.errstate(over="ignore", invalid="ignore"):
            signal, noise = (y * y).sum(-1), np.square(x - y).sum(-1)
        if not np.isfinite(noise).all():
            raise InputError("NaN or infinity was computed; a distribution of it cannot be judged")
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
    """Figures of several pieces of text one after another, along their last axis."""
    results = list(results)
    return {name: np.concatenate([result[name] for result in results], -1) for name in results[0]}


def summary(results: Iterable[Result]) -> Quality:
    """The figures of all tokens as one Quality. KL may be a little below 0 by rounding alone."""
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
    """Logarithms of the probabilities that logits stand for, along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- formats side by side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A format of a model: memory per weight that is in blocks, bytes of all parameters, and the quality."""

    format: str
    bits_per_weight: float
    nbytes: int
    quality: Quality | None
    why: str = ""  # there is none: the format does not fit this model


def side_by_side(
    reference: Model,
    names: Sequence[str],
    ids,
    block_size: int | None = None,
    keep: Sequence[str] = (),
    window: int | None = None,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> list[Row]:
    """A model in one format after another, each judged by the model as it is; `keep` stays as it is in all of them.

    A format that does not fit the model's sizes has a row that says so. Raises InputError for an unknown format.
    """
    rows = []
    for name in names:
        try:
            formats.format_named(name)
        except ValueError as error:
            raise InputError(str(error)) from None
    for name in names:
        try:
            model = reference.quantize(name, block_size, keep)
        except InputError as error:
            if len(names) == 1:
                raise
            rows.append(Row(name, math.nan, 0, None, str(error)))
            continue
        rows.append(Row(name, *memory(model), quality(model, reference, ids, window, dtype, executor, resume)))
    return rows


def memory(model: Model) -> tuple[float, int]:
    """Bits of each weight that is in blocks, on average, as the engine that defines the format stores it (NaN if none
    is), and bytes of all parameters so stored."""
    blocks = [weight.blocks for weight in model.weights.values() if hasattr(weight, "blocks")]
    bits, count = sum(b.bits_per_weight * math.prod(b.shape) for b in blocks), sum(math.prod(b.shape) for b in blocks)
    rest = sum(weight.array.nbytes for weight in model.weights.values() if hasattr(weight, "array"))
    return bits / count if count else math.nan, round(bits / 8) + rest


def table(rows: Sequence[Row]) -> str:
    """A line for each format, and the reference last."""
    lines = [f"{'format':11}  bits     MB  {'perplexity':>10}  {'ratio':15}  {'KL, nats':19}  {'median':7}  "
             f"{'99 %':6}  {'same top-1':14}  RMS Δp"]  # fmt: skip
    for row in rows:
        q = row.quality
        if q is None:
            lines.append(f"{row.format:11}  {row.why}")
            continue
        lines.append(
            f"{row.format:11}  {row.bits_per_weight:4.2f}  {row.nbytes / 1e6:5.{2 if row.nbytes < 1e8 else 0}f}  "
            f"{q.perplexity:10.3f}  {q.ratio:.4f} ± {q.ratio_error:.4f}  {q.kl_mean:.5f} ± {q.kl_error:.5f}  "
            f"{q.kl_median:.5f}  {q.kl_99:.4f}  {q.same_top:6.2%} ± {q.same_top_error:.2%}  {q.rms_dp:.2%}"
        )
    judged = [row.quality for row in rows if row.quality is not None]
    if judged:
        q = judged[0]
        said = f"{q.reference_perplexity:.3f} ± {q.reference_perplexity_error:.3f}"
        lines.append(f"the model as it is has perplexity {said} on these {q.tokens} tokens")
    return "\n".join(lines)


def to_dicts(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """The same as JSON has it."""
    return [
        {"format": row.format, "why": row.why} if row.quality is None else
        {"format": row.format, "bits_per_weight": row.bits_per_weight, "bytes": row.nbytes, **row.quality.to_dict()}
        for row in rows
    ]  # fmt: skip


def read_documents(path: Path, model: Model, tokens: int | None = None) -> list[int]:
    """The ids of a text file whose documents are separated by blank lines, each followed by the end-of-sequence id.

    That is how Baichuan's training data, and the embedded model's, are laid out. `tokens`: no more than so many. Raises
    InputError for a file that cannot be read or holds no text.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens is {tokens}, expected how many to read, from 1")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from None
    if not text.strip():
        raise InputError(f"{path} holds no text")
    ids: list[int] = []
    for document in text.strip().split("\n\n"):
        ids += [*model.tokenizer.encode(document.strip("\n") + "\n"), model.tokenizer.eos_token_id]
    return ids[:tokens]
