"""`Served`: a model under the name that clients call it by, and how a request becomes its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.serve.asks import Ask, RefusedError, refused
from refimpl.serve.writing import Piece, Wish, Writer, expect_room


@dataclass(frozen=True)
class Served:
    """A model, its name, and how it computes. `about`: a line on what it is."""

    name: str
    model: Forward
    about: str = ""
    dtype: str = "float32"
    cache_dtype: str | None = None

    def prompt(self, ask: Ask, prompt: Any) -> list[int]:
        """The token ids of one of a request's prompts. Raises RefusedError for one that the context cannot hold.

        A conversation is laid out as its family does it, so the Baichuans leave out the oldest rounds of a long one. A
        role's token that somebody has typed into a message stays plain text: the messages are not the server's. In a
        prompt of /v1/completions it is the token, as in `refimpl generate`.
        """
        context, tokenizer = self.model.config.max_position_embeddings, self.model.tokenizer
        where = "messages" if ask.chat else "prompt"
        try:
            if not ask.chat:
                ids = list(map(int, self.model.token_ids(prompt)[0]))
                expect_room(len(ids), ask.max_tokens, context)
                return ids
            if ask.max_tokens is not None and ask.max_tokens >= context:
                raise InputError(f"the context has {context} tokens, and an answer of {ask.max_tokens} does not fit")
            last = [message for message in prompt if message["role"] == "system"][:1] + prompt[-1:]
            said = sum(len(tokenizer.encode(message["content"], plain=True)) + 1 for message in last)
            expect_room(said, ask.max_tokens, context)
            return tokenizer.chat(prompt, ask.max_tokens, plain=True)
        except InputError as error:
            code = "context_length_exceeded" if "context" in str(error) else None
            raise RefusedError(400, str(error), where, code) from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises RefusedError for one that is none."""
        try:
            return self.model.tokenizer.encode(text)
        except InputError as error:
            raise refused(error) from None

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Raises RefusedError for ids outside the vocabulary."""
        try:
            return self.model.tokenizer.decode(ids)
        except InputError as error:
            raise refused(error) from None

    def answers(self, ask: Ask, go_on: Callable[[], None]) -> Iterator[tuple[int, int, Piece | Writer]]:
        """The answers of a request, one after the other: the number of the choice, its prompt's tokens, and a piece.

        A Writer stands before the pieces of each choice, once its request is known to be in order. With a seed, the
        choices of a prompt have the seeds from it on. Raises RefusedError.
        """
        prompts = [self.prompt(ask, prompt) for prompt in ask.prompts]
        number = 0
        for ids in prompts:
            for choice in range(ask.choices):
                options = dict(ask.options)
                options.setdefault("do_sample", self.model.generation_config.get("do_sample") is not False)
                if "seed" in options:
                    options["seed"] += choice
                wish = Wish(ask.max_tokens, ask.stop, ask.logprobs, ask.echo, self.dtype, self.cache_dtype, go_on)
                try:
                    writer = Writer(self.model, ids, wish, options)
                except InputError as error:
                    raise refused(error) from None
                yield number, len(ids), writer
                for piece in writer.pieces():
                    yield number, len(ids), piece
                number += 1
