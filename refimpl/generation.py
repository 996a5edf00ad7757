"""Choosing the next token: transformers' logits processors in NumPy, and the loop that calls the model.

The order is transformers': repetition penalty, temperature, top-k, top-p, then softmax and a draw. Each processor maps
scores (B, V) to scores; a token that cannot be drawn any more gets -inf.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.errors import InputError
from refimpl_kernels.ops import softmax

if TYPE_CHECKING:
    from refimpl.cache import KVCache
    from refimpl.forward import Forward

PIECE = 512  # prompt tokens at a time: scores (H, 512, S) and logits (512, V) stay small whatever the prompt


def _positive(number: Any) -> bool:
    return bool(np.float32(number) > 0)


# What an option may be: a test, and how its error message says it.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: n == int(n) >= 1, "a whole number from 1"),
    "repetition_penalty": (_positive, "a positive number"),
    "temperature": (_positive, "a positive number"),
    "top_k": (lambda k: k == int(k) >= 0, "a whole number, 0 for no limit"),
    "top_p": (lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its scores. Without `do_sample` it is the likeliest, after the repetition penalty.

    With it, `temperature`, `top_k` and `top_p` shape what a token is drawn from, and `seed` makes the draws repeatable
    (NumPy's PCG64, so not the tokens that torch would draw).
    """

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampling:
        """The options that are given, else those of a generation_config.json; only what the choice depends on is read.

        Raises InputError for an option out of range.
        """
        asked = cls(**given)
        read = ("repetition_penalty", "temperature", "top_k", "top_p") if asked.do_sample else ("repetition_penalty",)
        options = {name: _option(name, given.get(name), defaults, getattr(cls, name)) for name in read}
        if not asked.do_sample:
            return cls(**options)
        if asked.seed is not None and asked.seed < 0:
            raise InputError(f"seed is {asked.seed}, expected a whole number from 0")
        return cls(**{**options, "do_sample": True, "top_k": int(options["top_k"]), "seed": asked.seed})

    def process(self, scores: np.ndarray, history: np.ndarray) -> np.ndarray:
        """The scores (B, V) from which a token is chosen, after all processors in transformers' order."""
        scores = scores.astype(np.float32, copy=False)  # transformers' processors work in float32 too
        if self.repetition_penalty != 1.0:
            scores = penalize_repetition(scores, history, self.repetition_penalty)
        if self.temperature != 1.0:
            scores = scores / np.float32(self.temperature)
        if self.top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p < 1.0:
            scores = keep_top_p(scores, self.top_p)
        return scores

    def choose(self, scores: np.ndarray, history: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One token id (B,) for each row of scores (B, V)."""
        scores = self.process(scores, history)
        return _draw(softmax(scores.astype(np.float64)), rng) if self.do_sample else scores.argmax(-1)


def generate(
    model: Forward,
    ids,
    max_new_tokens: int | None = None,
    dtype: str = "float32",
    attention_mask=None,
    cache_dtype: str | None = None,
    **sampling: Any,
) -> Iterator[Any]:
    """Yields token ids as they are found, up to and including the end-of-sequence id.

    For one prompt (a text, a list, an array (T,)) each is an int; for a batch (B, T), padded on the left and masked,
    each is an array (B,), in which a sequence that has ended goes on with the padding id. `sampling`: the fields of
    `Sampling`. What is not given comes from the folder's generation_config.json. `cache_dtype`: what the cache keeps,
    see `Model.new_cache`.

    Raises InputError for options out of range, for a prompt that leaves no room in the context, and where logits are
    not finite.
    """
    single = isinstance(ids, str) or np.ndim(ids) == 1
    ids, defaults = model.token_ids(ids), model.generation_config
    batch, tokens = ids.shape
    context = model.config.max_position_embeddings
    room = context - tokens
    if room < 1:
        raise InputError(f"the prompt of {tokens} tokens leaves no room in the context of {context}; shorten it")
    wanted = min(int(_option("max_new_tokens", max_new_tokens, defaults, room)), room)
    choice = Sampling.of(sampling, defaults)
    ends, padding = _ids_of("eos_token_id", model), (*_ids_of("pad_token_id", model), 0)[0]
    model.ops(dtype)  # refuses an unknown dtype before anything is yielded
    mask = np.ones_like(ids) if attention_mask is None else np.array(attention_mask)
    if mask.shape != ids.shape or not mask[:, -1].all():
        raise InputError(
            f"attention_mask has shape {mask.shape}, expected {ids.shape} with any padding on the left, for the new "
            "tokens follow the last column"
        )
    cache = model.new_cache(batch, tokens + wanted, cache_dtype)

    def steps():
        rng, history, ended = np.random.default_rng(choice.seed), ids, np.zeros(batch, bool)
        scores = _next_scores(model, ids, mask, cache, dtype)
        while True:
            chosen = np.where(ended, padding, choice.choose(scores, history, rng))
            yield int(chosen[0]) if single else chosen
            ended |= np.isin(chosen, ends)
            history = np.concatenate([history, chosen[:, None]], axis=1)
            if ended.all() or history.shape[1] == tokens + wanted:
                return
            scores = _next_scores(model, chosen[:, None], None, cache, dtype)  # the cache remembers what is padding

    return steps()


def _next_scores(
    model: Forward, ids: np.ndarray, mask: np.ndarray | None, cache: KVCache, dtype: str
) -> np.ndarray:  # fmt: skip
    """Scores (B, V) of the token that follows `ids` (B, T), which are read piece by piece and stay in the cache."""
    for start in range(0, ids.shape[1], PIECE):
        stop = min(start + PIECE, ids.shape[1])
        seen = None if mask is None else mask[:, :stop]
        logits = model(ids[:, start:stop], dtype, seen, cache, logits_to_keep=1)
    scores = logits[:, -1].astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(
            "the next token's logits are NaN or infinite, so a weight or a scale may be, too; refimpl info looks at "
            "scales and norms, and refimpl trace shows the first tensor that is"
        )
    return scores


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


def _option(name: str, given: Any, defaults: Mapping[str, Any], fallback: Any) -> Any:
    """The first of the three that is not None. Raises InputError for what VALID does not allow."""
    value = next(value for value in (given, defaults.get(name), fallback) if value is not None)
    valid, expected = VALID[name]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not valid(value):
        raise InputError(f"{name} is {value!r}, expected {expected}")
    return value


def _ids_of(name: str, model: Forward) -> list[int]:
    """The token ids of a key of generation_config.json, else of the config: none, one or several."""
    found = model.generation_config.get(name, getattr(model.config, name))
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(number) is int for number in ids):
        raise InputError(f"{name} is {found!r:.40}, expected a token id; mend generation_config.json")
    return ids


def _draw(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index of each row of probs (B, V), by where a uniform number falls in the running sum."""
    running = np.cumsum(probs, axis=-1)
    chosen = (running < rng.random((len(probs), 1)) * running[:, -1:]).sum(-1)
    return np.minimum(chosen, probs.shape[1] - 1)
