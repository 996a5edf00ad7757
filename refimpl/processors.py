"""Logits processors: functions from the next token's scores (B, V) to scores, float32, as transformers has them.

`history` (B, N) are the ids so far, the prompt included. A token that may not come next gets -inf.

Source: transformers' src/transformers/generation/logits_process.py; each function names its class there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl_kernels.ops import softmax

LARGEST = 1e30  # the largest factor of a penalty: a score times this is still a float32


def bias_sequences(
    scores: np.ndarray, history: np.ndarray, biases: Sequence[tuple[Sequence[int], float]]
) -> np.ndarray:
    """Each pair (ids, bias) adds its bias to the last id, in the rows whose history ends with the others.

    Source: `SequenceBiasLogitsProcessor`, and `NoBadWordsLogitsProcessor`, whose biases are -inf.
    """
    added = np.zeros_like(scores)
    for ids, bias in biases:
        *before, last = ids
        if len(before) <= history.shape[1]:
            ends = (history[:, history.shape[1] - len(before) :] == before).all(-1)
            added[ends, last] += np.float32(bias)
    return scores + added


def penalize_repetition(scores: np.ndarray, history: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of the ids in `history` divided by `penalty` if positive and multiplied if negative, once each.

    Source: Keskar et al., "CTRL" (2019), section 4.1; `RepetitionPenaltyLogitsProcessor`.
    """
    seen = np.take_along_axis(scores, history, -1)
    out = scores.copy()
    np.put_along_axis(out, history, np.where(seen < 0, seen * penalty, seen / penalty), -1)
    return out


def forbid_repeated_ngrams(scores: np.ndarray, history: np.ndarray, size: int) -> np.ndarray:
    """No `size` tokens in a row come twice: an id that has followed the last `size - 1` ids before is forbidden.

    Source: `NoRepeatNGramLogitsProcessor`.
    """
    length = history.shape[1]
    if length < size:
        return scores
    windows = np.lib.stride_tricks.sliding_window_view(history, size, axis=1)  # (B, N - size + 1, size)
    repeated = (windows[..., :-1] == history[:, None, length - size + 1 :]).all(-1)
    rows, places = np.nonzero(repeated)
    out = scores.copy()
    out[rows, windows[rows, places, -1]] = -np.inf
    return out


def suppress(scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Forbids these ids. Source: `SuppressTokensLogitsProcessor`, `MinLengthLogitsProcessor`."""
    out = scores.copy()
    out[:, list(ids)] = -np.inf
    return out


def force(scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Forces one of these ids; all are equally likely. Source: `ForcedEOSTokenLogitsProcessor`."""
    out = np.full_like(scores, -np.inf)
    out[:, list(ids)] = 0
    return out


def raise_end(scores: np.ndarray, ends: Sequence[int], factor: float, steps: int) -> np.ndarray:
    """The scores of the ids that end a text grow by |score| * (factor ** steps - 1).

    Source: `ExponentialDecayLengthPenalty`.
    """
    out = scores.copy()
    now = scores[:, list(ends)]
    with np.errstate(invalid="ignore", over="ignore"):  # -inf stays -inf, and no other score becomes infinite
        grown = now + np.abs(now) * np.float32(min(np.float64(factor) ** steps - 1, LARGEST))
    out[:, list(ends)] = np.where(np.isfinite(now), grown, now)
    return out


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keeps the scores that reach the k-th largest of their row, ties included."""
    k = min(k, scores.shape[-1])
    threshold = np.partition(scores, -k, axis=-1)[..., -k, None]
    return np.where(scores < threshold, -np.inf, scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keeps the likeliest tokens whose probabilities together reach `p`, and at least one.

    From the least likely up, tokens are dropped while their running sum is at most 1 - p. Source: `TopPLogitsWarper`.
    """
    order = np.argsort(scores, axis=-1, kind="stable")
    running = np.cumsum(softmax(np.take_along_axis(scores, order, -1)), axis=-1)
    out = running <= 1 - p
    out[..., -1] = False
    return _without(scores, order, out)


def keep_min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keeps tokens whose probability is at least `p` times the largest. Source: `MinPLogitsWarper`."""
    probs = softmax(scores)
    return np.where(probs < np.float32(p) * probs.max(-1, keepdims=True), -np.inf, scores)


def keep_typical(scores: np.ndarray, mass: float) -> np.ndarray:
    """Keeps the tokens whose surprise is nearest to the expected one, until their probabilities together reach `mass`.

    Source: Meister et al., "Locally Typical Sampling" (2022); `TypicalLogitsWarper`.
    """
    probs = softmax(scores)
    with np.errstate(divide="ignore", invalid="ignore"):  # a token that cannot come: probability 0, surprise infinite
        surprise = -np.log(probs)
        expected = np.nansum(probs * surprise, -1, keepdims=True)
    distance = np.abs(surprise - expected)
    order = np.argsort(distance, axis=-1, kind="stable")
    sorted_distance = np.take_along_axis(distance, order, -1)
    running = np.cumsum(np.take_along_axis(probs, order, -1), axis=-1)
    last = np.minimum((running < mass).sum(-1, keepdims=True), scores.shape[-1] - 1)
    out = sorted_distance > np.take_along_axis(sorted_distance, last, -1)
    out[..., 0] = False
    return _without(scores, order, out)


def _without(scores: np.ndarray, order: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The scores, with -inf for those that are `out`. Entry j of a row of `out` is about the score `order[j]`."""
    drop = np.empty_like(out)
    np.put_along_axis(drop, order, out, -1)
    return np.where(drop, -np.inf, scores)
