"""Choosing the next token: transformers' logits processors in NumPy, and the loop that calls the model.

The order is transformers': repetition penalty, temperature, top-k, top-p, then softmax and a draw. Each processor maps
scores (B, V) to scores; a token that is out gets -inf.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.errors import InputError

if TYPE_CHECKING:
    from refimpl.forward import Forward

PIECE = 512  # prompt tokens at a time: scores (H, 512, S) and logits (512, V) stay small whatever the prompt


def penalize_repetition(scores: np.ndarray, history: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of the ids in `history` (B, N) divided by `penalty` if positive and multiplied if negative, once each.

    Source: Keskar et al., "CTRL" (2019), section 4.1; `RepetitionPenaltyLogitsProcessor` in transformers.
    """
    seen = np.take_along_axis(scores, history, -1)
    out = scores.copy()
    np.put_along_axis(out, history, np.where(seen < 0, seen * penalty, seen / penalty), -1)
    return out


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Only scores that are not below the k-th largest of their row stay; ties with it stay too."""
    k = min(k, scores.shape[-1])
    threshold = np.partition(scores, -k, axis=-1)[..., -k, None]
    return np.where(scores < threshold, -np.inf, scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens whose probabilities reach `p` together stay, and at least one.

    As in transformers: sorted upwards, tokens go while their running sum is at most 1 - p.
    """
    order = np.argsort(scores, axis=-1, kind="stable")
    running = np.cumsum(softmax(np.take_along_axis(scores, order, -1)), axis=-1)
    out = running <= 1 - p
    out[..., -1] = False
    drop = np.empty_like(out)
    np.put_along_axis(drop, order, out, -1)
    return np.where(drop, -np.inf, scores)


def process(scores, history, repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The scores (B, V) from which a token is drawn, after all processors in transformers' order."""
    scores = scores.astype(np.float32, copy=False)  # transformers' processors work in float32 too
    if repetition_penalty != 1.0:
        scores = penalize_repetition(scores, history, repetition_penalty)
    if temperature != 1.0:
        scores = scores / np.float32(temperature)
    if top_k:
        scores = keep_top_k(scores, top_k)
    if top_p < 1.0:
        scores = keep_top_p(scores, top_p)
    return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis; a score of -inf gets exactly 0."""
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def generate(
    model: Forward,
    ids,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    dtype: str = "float32",
    attention_mask=None,
    cache_dtype: str | None = None,
) -> Iterator[Any]:
    """Yields token ids as they are found, up to and including the end-of-sequence id.

    For one prompt (a text, a list, an array (T,)) each is an int; for a batch (B, T), padded on the left and masked,
    each is an array (B,), in which a sequence that has ended goes on with the padding id. What is not given comes from
    the folder's generation_config.json. Without `do_sample` the likeliest token is taken, after the repetition
    penalty; with it, `seed` makes the draws repeatable (NumPy's PCG64, so not the tokens that torch would draw).
    `cache_dtype`: what the cache keeps, see `Model.new_cache`.

    Raises InputError for options out of range, for a prompt that leaves no room in the context, and where logits are
    not finite.
    """
    defaults = model.generation_config

    def option(name, value, fallback, valid, expected):
        for given in (defaults.get(name), fallback):
            value = given if value is None else value
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not valid(value):
            raise InputError(f"{name} is {value!r}, expected {expected}")
        return value

    single = isinstance(ids, str) or np.ndim(ids) == 1
    ids = model.token_ids(ids)
    batch, tokens = ids.shape
    context = model.config.max_position_embeddings
    room = context - tokens
    if room < 1:
        raise InputError(f"the prompt of {tokens} tokens leaves no room in the context of {context}; shorten it")
    wanted = option("max_new_tokens", max_new_tokens, room, lambda n: n == int(n) >= 1, "a whole number from 1")
    wanted = min(int(wanted), room)

    def positive(number):
        return np.float32(number) > 0

    penalty = option("repetition_penalty", repetition_penalty, 1.0, positive, "a positive number")
    settings = {"repetition_penalty": penalty}
    if do_sample:
        settings["temperature"] = option("temperature", temperature, 1.0, positive, "a positive number")
        limit = option("top_k", top_k, 0, lambda k: k == int(k) >= 0, "a whole number, 0 for no limit")
        settings["top_k"] = int(limit)
        settings["top_p"] = option("top_p", top_p, 1.0, lambda p: 0 < p <= 1, "a number above 0 and up to 1")
        if seed is not None and seed < 0:
            raise InputError(f"seed is {seed}, expected a whole number from 0")
    ends = _ids_of("eos_token_id", defaults, model)
    padding = (*_ids_of("pad_token_id", defaults, model), 0)[0]
    model.ops(dtype)  # refuses a dtype that there is not, before anything is yielded
    mask = np.ones_like(ids) if attention_mask is None else np.array(attention_mask)
    if mask.shape != ids.shape or not mask[:, -1].all():
        raise InputError(
            f"attention_mask has shape {mask.shape}, expected {ids.shape}, with padding on the left: what follows a "
            "prompt follows its last column"
        )

    cache = model.new_cache(batch, tokens + wanted, cache_dtype)

    def steps():
        rng = np.random.default_rng(seed)
        ended = np.zeros(batch, bool)
        history = ids
        for start in range(0, tokens, PIECE):
            stop = min(start + PIECE, tokens)
            logits = model(ids[:, start:stop], dtype, mask[:, :stop], cache, logits_to_keep=1)
        while True:
            last = logits[:, -1].astype(np.float32)
            if not np.isfinite(last).all():
                raise InputError(
                    "the next token's logits are NaN or infinite, as a weight or a scale may be; refimpl info looks at "
                    "scales and norms, and refimpl trace shows the first tensor that is"
                )
            scores = process(last, history, **settings)
            chosen = _draw(softmax(scores.astype(np.float64)), rng) if do_sample else scores.argmax(-1)
            chosen = np.where(ended, padding, chosen)
            yield int(chosen[0]) if single else chosen
            ended |= np.isin(chosen, ends)
            history = np.concatenate([history, chosen[:, None]], axis=1)
            if ended.all() or history.shape[1] == tokens + wanted:
                return
            logits = model(chosen[:, None], dtype, cache=cache)  # the cache remembers what is padding

    return steps()


def _ids_of(name: str, defaults: dict[str, Any], model: Forward) -> list[int]:
    """The token ids of a key: of generation_config.json, else of the config; none, one or several."""
    found = defaults.get(name, getattr(model.config, name))
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(number) is int for number in ids):
        raise InputError(f"{name} is {found!r:.40}, expected a token id; mend generation_config.json")
    return ids


def _draw(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index of each row of probs (B, V), by where a uniform number falls in the running sum."""
    running = np.cumsum(probs, axis=-1)
    chosen = (running < rng.random((len(probs), 1)) * running[:, -1:]).sum(-1)
    return np.minimum(chosen, probs.shape[1] - 1)
