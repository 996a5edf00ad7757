"""A model writes: the answer to a prompt as pieces of text, each with its tokens and their log-probabilities.

`generate` chooses the tokens, as for `refimpl generate`: the same seed gives the same text. What is new here: a piece
of text is held back while a stop string may still follow, and a computation that nobody wants ends at the next token.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import numpy as np

from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.generation import generate
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer. `start`: the characters before it; `utf8`: its bytes.

    `logprob`: natural logarithm of its probability before temperature and all other options; None for the first of a
    prompt, and if none was asked for. `top`: the likeliest tokens there, id and logarithm each, the likeliest first.
    """

    id: int
    utf8: bytes
    start: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer. `finish`: None while more follows, "stop" at an end, "length" at the limit."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


class Heard:
    """A model as `generate` calls it: it remembers the scores of its last call.

    `go_on` is called before each call, and ends the computation by an exception. With `every`, the scores of all tokens
    of a prompt go to it, piece by piece.
    """

    def __init__(self, model: Forward, go_on: Callable[[], None], every: Callable[[np.ndarray], None] | None = None):
        self.model, self.go_on, self.every = model, go_on, every
        self.scores = np.zeros(0, np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids, dtype="float32", attention_mask=None, cache=None, logits_to_keep=0):
        self.go_on()
        keep = 0 if self.every and np.shape(ids)[-1] > 1 else logits_to_keep
        logits = self.model(ids, dtype, attention_mask, cache, logits_to_keep=keep)
        if self.every:
            self.every(logits[0])
        self.scores = logits[0, -1]
        return logits


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities of scores (..., V), float64."""
    scores = scores.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def likeliest(logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest ids and their logarithms, the likeliest first; equal ones by id."""
    if not count:
        return ()
    count = min(count, len(logprobs))
    bar = np.partition(logprobs, -count)[-count]
    found = np.flatnonzero(logprobs >= bar)
    best = found[np.argsort(-logprobs[found], kind="stable")][:count]
    return tuple((int(id), float(logprobs[id])) for id in best)


class Stops:
    """Looks for stop strings in a text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self.strings, self.held, self.found = strings, "", False

    def feed(self, text: str) -> str:
        """What can be given away. Once a stop string is complete, `found` is true, and no text comes any more."""
        if self.found:
            return ""
        self.held += text
        places = [place for one in self.strings if (place := self.held.find(one)) >= 0]
        if places:
            self.found = True
            given, self.held = self.held[: min(places)], ""
            return given
        keep = max((self._begun(one) for one in self.strings), default=0)
        given = self.held[: len(self.held) - keep]
        self.held = self.held[len(given) :]
        return given

    def _begun(self, string: str) -> int:
        """How many of the last characters are the beginning of this stop string."""
        longest = min(len(string) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(string[:n])), 0)


@dataclass(frozen=True)
class Wish:
    """How an answer is wanted: see `refimpl.serve.asks.Ask`. `max_tokens` 0 reads the prompt alone."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    dtype: str = "float32"
    cache_dtype: str | None = None
    go_on: Callable[[], None] = lambda: None


class Writer:
    """One answer to one prompt. `spent`: the tokens chosen so far, those behind a stop string included."""

    def __init__(self, model: Forward, ids: Sequence[int], wish: Wish, options: dict[str, Any]):
        """Raises InputError for options out of range, and a prompt that leaves no room."""
        self.tokenizer: Tokenizer = model.tokenizer
        self.ids, self.wish, self.spent = list(ids), wish, 0
        self.prompt_rows: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        hear = self._prompt_scores if wish.echo and wish.logprobs is not None else None
        self.heard = Heard(model, wish.go_on, hear)
        self.ids_found = generate(
            cast(Forward, self.heard), self.ids, 1 if wish.max_tokens == 0 else wish.max_tokens, wish.dtype,
            cache_dtype=wish.cache_dtype, **options,
        )  # fmt: skip
        found = model.generation_config.get("eos_token_id", model.config.eos_token_id)
        self.ends = set(found) if isinstance(found, list) else {found}

    def _prompt_scores(self, scores: np.ndarray) -> None:
        """Keeps what a row of scores says of the token that follows it in the prompt."""
        for row in scores:
            following = len(self.prompt_rows) + 1
            if following >= len(self.ids):
                return
            logprobs = log_softmax(row)
            top = likeliest(logprobs, self.wish.logprobs or 0)
            self.prompt_rows.append((float(logprobs[self.ids[following]]), top))

    def pieces(self) -> Iterator[Piece]:
        """The answer, piece by piece; the last has a `finish`. With `echo`, the prompt is the first."""
        chosen = self._chosen()
        echoed = ""
        if self.wish.echo:
            chosen = chain([next(chosen)], chosen)  # with the first token, all of the prompt has been read
            echoed = self.tokenizer.decode(self.ids)
            yield Piece(echoed, self._prompt_tokens())
            if self.wish.max_tokens == 0:
                yield Piece("", (), "length")
                return
        stops, waiting = Stops(self.wish.stop), list[Token]()
        seen = given = len(echoed)
        last = -1

        def ids() -> Iterator[int]:
            nonlocal last
            for token in chosen:
                waiting.append(replace(token, start=seen))
                last = token.id
                yield token.id

        for text in self.tokenizer.stream(ids()):
            seen += len(text)
            out = stops.feed(text)
            given += len(out)
            ready = tuple(token for token in waiting if token.start < given)
            del waiting[: len(ready)]
            if stops.found:
                yield Piece(out, ready, "stop")
                return
            if out or ready:
                yield Piece(out, ready)
        yield Piece(stops.held, tuple(waiting), "stop" if last in self.ends else "length")

    def _chosen(self) -> Iterator[Token]:
        """The tokens as `generate` finds them; where their text starts is not known yet."""
        for id in self.ids_found:
            self.spent += 1
            utf8 = self.tokenizer.token_bytes(id)
            if self.wish.logprobs is None:
                yield Token(id, utf8, 0)
            else:
                logprobs = log_softmax(self.heard.scores)
                yield Token(id, utf8, 0, float(logprobs[id]), likeliest(logprobs, self.wish.logprobs))

    def _prompt_tokens(self) -> tuple[Token, ...]:
        """The tokens of the prompt, with what the model said of each."""
        nothing: tuple[float | None, tuple] = (None, ())
        rows = [nothing, *self.prompt_rows] if self.wish.logprobs is not None else [nothing] * len(self.ids)
        found, start, decoder = [], 0, getincrementaldecoder("utf-8")("replace")
        for id, (logprob, top) in zip(self.ids, rows, strict=True):
            utf8 = self.tokenizer.token_bytes(id)
            found.append(Token(id, utf8, start, logprob, top))
            start += len(decoder.decode(utf8))
        return tuple(found)


def expect_room(tokens: int, new: int | None, context: int) -> None:
    """Raises InputError if a prompt and what is asked for exceed the context."""
    if tokens + (1 if new is None else new) > context:
        wanted = "an answer" if new is None else f"an answer of {new}"
        raise InputError(f"the context has {context} tokens; the prompt has {tokens}, and {wanted} does not fit")
