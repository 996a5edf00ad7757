"""Choosing the next token: the options of transformers' generation_config.json, and the loop that calls the model.

The processors (`refimpl.processors`) come in transformers' order: first biases and penalties, and what is forbidden or
forced. If a token is drawn, temperature, top-k, top-p, min-p, typical-p, softmax and the draw follow.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl import processors
from refimpl.errors import InputError, Remark, at_most
from refimpl_kernels.ops import softmax

if TYPE_CHECKING:
    from refimpl.cache import KVCache
    from refimpl.forward import Forward

PIECE = 512  # prompt tokens at a time: scores (H, 512, S) and logits (512, V) stay small whatever the prompt


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return _real(value) and value == int(value) >= 0


def _positive(value: Any) -> bool:
    return _real(value) and bool(np.float32(value) > 0)


def _ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(id) is int and id >= 0 for id in value)


def _sequences(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_ids(ids) and ids for ids in value)


def _biases(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(isinstance(one, list | tuple) and len(one) == 2 for one in value)
    return pairs and _sequences([ids for ids, _ in value]) and all(_real(bias) for _, bias in value)


def _decay(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _whole(value[0]) and _positive(value[1])


# Option -> a test of its value, and what the error message says is expected.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: _whole(n) and n >= 1, "a whole number from 1"),
    "max_length": (lambda n: _whole(n) and n >= 1, "a whole number from 1"),
    "sequence_bias": (_biases, "a list of pairs [[ids], bias]"),
    "repetition_penalty": (_positive, "a positive number"),
    "no_repeat_ngram_size": (_whole, "a whole number, 0 for no limit"),
    "bad_words_ids": (_sequences, "a list of lists of token ids"),
    "min_length": (_whole, "a whole number"),
    "min_new_tokens": (_whole, "a whole number"),
    "forced_eos_token_id": (
        lambda ids: _ids(ids if isinstance(ids, list | tuple) else [ids]),
        "a token id, or several",
    ),
    "exponential_decay_length_penalty": (_decay, "a pair of a start and a factor"),
    "suppress_tokens": (_ids, "a list of token ids"),
    "begin_suppress_tokens": (_ids, "a list of token ids"),
    "temperature": (_positive, "a positive number"),
    "top_k": (_whole, "a whole number, 0 for no limit"),
    "top_p": (lambda p: _real(p) and 0 < p <= 1, "a number above 0 and up to 1"),
    "min_p": (lambda p: _real(p) and 0 <= p <= 1, "a number from 0 to 1"),
    "typical_p": (lambda p: _real(p) and 0 < p <= 1, "a number above 0 and up to 1"),
}
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # read only where a token is drawn

# Keys of generation_config.json that change the text in transformers and are not done here. With one of these values,
# null or false, they change nothing. Those in NOT_DRAWN matter only where a token is drawn.
NOT_DONE: dict[str, tuple] = {
    "num_beams": (1,), "guidance_scale": (1,), "penalty_alpha": (0,), "dola_layers": (), "force_words_ids": (),
    "constraints": (), "forced_bos_token_id": (), "encoder_repetition_penalty": (1,), "stop_strings": (),
    "encoder_no_repeat_ngram_size": (0,), "max_time": (), "token_healing": (), "watermarking_config": (),
}  # fmt: skip
NOT_DRAWN: dict[str, tuple] = {"top_h": (), "epsilon_cutoff": (0, 1), "eta_cutoff": (0, 1)}


@dataclass(frozen=True)
class Span:
    """Where a text is: how long its prompt was, how long it may become (tokens), and the ids that end it."""

    prompt: int = 0
    longest: int = 0
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its scores. Without `do_sample`, the likeliest after the processors is taken.

    With `do_sample`, a token is drawn. `temperature`, `top_k`, `top_p`, `min_p` and `typical_p` shape the distribution,
    and `seed` makes the draws repeatable (with NumPy's PCG64; torch would draw other tokens). The names and meanings
    are those of transformers' GenerationConfig.
    """

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    sequence_bias: Any = ()
    no_repeat_ngram_size: int = 0
    bad_words_ids: Any = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_eos_token_id: Any = ()
    exponential_decay_length_penalty: Any = (0, 1.0)
    suppress_tokens: Any = ()
    begin_suppress_tokens: Any = ()

    @classmethod
    def of(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampling:
        """Each option as given, else from a generation_config.json. Options that the choice does not need are not read.

        Raises InputError for an option out of range.
        """
        asked = cls(**given)
        read = [field.name for field in fields(cls) if field.name in VALID]
        read = [name for name in read if asked.do_sample or name not in DRAWING]
        options = {name: _option(name, given.get(name), defaults, getattr(cls, name)) for name in read}
        if not asked.do_sample:
            return cls(**options)
        if asked.seed is not None and (not isinstance(asked.seed, int | np.integer) or asked.seed < 0):
            raise InputError(f"seed is {asked.seed!r}, expected a whole number from 0")
        return cls(**{**options, "do_sample": True, "top_k": int(options["top_k"]), "seed": asked.seed})

    def expect_ids_below(self, vocabulary: int) -> None:
        """Raises InputError if an option names a token that the model does not have."""
        sequences = [*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias)]
        lists = {
            "sequence_bias or bad_words_ids": [id for ids in sequences for id in ids],
            "forced_eos_token_id": _several(self.forced_eos_token_id),
            "suppress_tokens": self.suppress_tokens, "begin_suppress_tokens": self.begin_suppress_tokens,
        }  # fmt: skip
        for name, ids in lists.items():
            if outside := [id for id in ids if id >= vocabulary]:
                raise InputError(f"{name} has the token id {outside[0]}, but the vocabulary ends at {vocabulary}")

    def process(self, scores: np.ndarray, history: np.ndarray, span: Span | None = None) -> np.ndarray:
        """The scores (B, V) from which a token is chosen, after all processors in transformers' order."""
        span = span or Span()
        scores = scores.astype(np.float32, copy=False)  # transformers' processors work in float32 too
        scores = self._before_drawing(scores, history, span)
        if self.temperature != 1.0:
            scores = scores / np.float32(self.temperature)
        if self.top_k:
            scores = processors.keep_top_k(scores, self.top_k)
        if self.top_p < 1.0:
            scores = processors.keep_top_p(scores, self.top_p)
        if self.min_p:
            scores = processors.keep_min_p(scores, self.min_p)
        if self.typical_p < 1.0:
            scores = processors.keep_typical(scores, self.typical_p)
        return scores

    def _before_drawing(self, scores: np.ndarray, history: np.ndarray, span: Span) -> np.ndarray:
        """The scores after the processors that apply even if the likeliest token is taken."""
        length = history.shape[1]
        new, ends = length - span.prompt, span.ends
        if self.sequence_bias:
            scores = processors.bias_sequences(scores, history, self.sequence_bias)
        if self.repetition_penalty != 1.0:
            scores = processors.penalize_repetition(scores, history, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            scores = processors.forbid_repeated_ngrams(scores, history, int(self.no_repeat_ngram_size))
        if self.bad_words_ids:
            bad = [(ids, -np.inf) for ids in self.bad_words_ids if not (len(ids) == 1 and ids[0] in ends)]
            scores = processors.bias_sequences(scores, history, bad)
        if length < self.min_length or new < self.min_new_tokens:
            scores = processors.suppress(scores, ends)
        if (forced := _several(self.forced_eos_token_id)) and length == span.longest - 1:
            scores = processors.force(scores, forced)
        start, factor = self.exponential_decay_length_penalty
        if factor != 1.0 and new > start:
            scores = processors.raise_end(scores, ends, factor, new - int(start))
        if self.suppress_tokens:
            scores = processors.suppress(scores, self.suppress_tokens)
        if self.begin_suppress_tokens and new == 0:
            scores = processors.suppress(scores, self.begin_suppress_tokens)
        return scores

    def choose(
        self, scores: np.ndarray, history: np.ndarray, rng: np.random.Generator, span: Span | None = None
    ) -> np.ndarray:  # fmt: skip
        """One token id (B,) for each row of scores (B, V). Raises InputError where the options leave none."""
        scores = self.process(scores, history, span)
        if np.isneginf(scores.max(-1)).any():
            raise InputError(
                "no token may come next: the options forbid all; look at no_repeat_ngram_size, suppress_tokens and "
                "bad_words_ids in generation_config.json"
            )
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
    `Sampling`. Options that are not given come from the folder's generation_config.json. `cache_dtype`: the format of
    the cache, see `Model.new_cache`.

    Raises InputError for options out of range, for a prompt that leaves no room in the context, and for logits that are
    not finite. Warns (`refimpl.errors.Remark`) of keys of generation_config.json that change the text in transformers
    and are not done here, such as num_beams.
    """
    single = isinstance(ids, str) or np.ndim(ids) == 1
    ids, defaults = model.token_ids(ids), model.generation_config
    batch, tokens = ids.shape
    context = model.config.max_position_embeddings
    room = context - tokens
    if room < 1:
        raise InputError(f"the prompt of {tokens} tokens leaves no room in the context of {context}; shorten it")
    wanted = min(_wanted(max_new_tokens, defaults, tokens, room), room)
    choice = Sampling.of(sampling, defaults)
    choice.expect_ids_below(model.config.vocab_size)
    if undone := not_done(defaults, choice.do_sample):
        warnings.warn(undone, Remark, stacklevel=3)
    ends, padding = _ids_of("eos_token_id", model), (*_ids_of("pad_token_id", model), 0)[0]
    inside = tuple(id for id in ends if 0 <= id < model.config.vocab_size)
    span = Span(tokens, tokens + wanted, inside)
    model.ops(dtype)  # refuses an unknown dtype before anything is yielded
    mask = np.ones_like(ids) if attention_mask is None else np.array(attention_mask)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {mask.shape}, expected {ids.shape}: one number for each id")
    if not mask[:, -1].all():
        raise InputError(
            "attention_mask has padding on the right, where the new tokens would follow it; put the padding on the "
            "left (in transformers: tokenizer.padding_side = 'left')"
        )
    cache = model.new_cache(batch, tokens + wanted, cache_dtype)

    def steps():
        rng, history, ended = np.random.default_rng(choice.seed), ids, np.zeros(batch, bool)
        scores = _next_scores(model, ids, mask, cache, dtype)
        while True:
            chosen = np.where(ended, padding, choice.choose(scores, history, rng, span))
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


def not_done(defaults: Mapping[str, Any], drawing: bool) -> str | None:
    """A remark on the keys of a generation_config.json that transformers heeds and `generate` does not; else None.

    >>> not_done({"num_beams": 4, "guidance_scale": 1.0}, drawing=False)
    "generation_config.json says num_beams 4, which is not done here; transformers' text would differ"
    """
    table = {**NOT_DONE, **(NOT_DRAWN if drawing else {})}
    found = [f"{key} {defaults[key]!r:.40}" for key in table if defaults.get(key) not in (None, False, *table[key])]
    if not found:
        return None
    return f"generation_config.json says {at_most(found)}, which is not done here; transformers' text would differ"


def _wanted(given: int | None, defaults: Mapping[str, Any], tokens: int, room: int) -> int:
    """The number of tokens to make: as given, else by max_new_tokens or max_length of the defaults, else `room`."""
    if given is None and defaults.get("max_new_tokens") is None and defaults.get("max_length") is not None:
        longest = int(_option("max_length", None, defaults, None))
        if longest <= tokens:
            raise InputError(
                f"the prompt has {tokens} tokens, and generation_config.json says max_length {longest}; ask for some "
                "max_new_tokens"
            )
        return longest - tokens
    return int(_option("max_new_tokens", given, defaults, room))


def _several(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def _option(name: str, given: Any, defaults: Mapping[str, Any], fallback: Any) -> Any:
    """`given`, else the default, else `fallback`. Raises InputError for a value that VALID does not allow."""
    value = next(value for value in (given, defaults.get(name), fallback) if value is not None)
    valid, expected = VALID[name]
    if not valid(value):
        raise InputError(f"{name} is {value!r:.40}, expected {expected}")
    return value


def _ids_of(name: str, model: Forward) -> list[int]:
    """The token ids of a key of generation_config.json, else of the config: none, one or several."""
    found = model.generation_config.get(name, getattr(model.config, name))
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(number) is int for number in ids):
        raise InputError(f"{name} is {found!r:.40}, expected a token id; mend generation_config.json")
    return ids


def _draw(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index for each row of probs (B, V): the place where a uniform random number falls in the running sum."""
    running = np.cumsum(probs, axis=-1)
    chosen = (running < rng.random((len(probs), 1)) * running[:, -1:]).sum(-1)
    return np.minimum(chosen, probs.shape[1] - 1)
