"""Answers in OpenAI's layouts, whole and in a stream's chunks, of chats and of completions.

**Source** OpenAI's API reference: the objects chat.completion, chat.completion.chunk and text_completion.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.serve.asks import Ask
from refimpl.serve.writing import Piece, Token
from refimpl.version import __version__


@dataclass
class Layout:
    """The layout of the answers to one request. `spell`: a token's bytes by its id."""

    ask: Ask
    spell: Callable[[int], bytes]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The one answer that is not a stream. `choices`: the pieces of each."""
        return {
            **self._head("chat.completion" if self.ask.chat else "text_completion"),
            "choices": [self._choice(number, pieces) for number, pieces in enumerate(choices)],
            "usage": usage,
        }

    def chunk(self, number: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A chunk of a stream. `first`: of this choice; a chat's first says who speaks."""
        finish = piece.finish
        if self.ask.chat:
            delta = {
                **({"role": "assistant"} if first else {}),
                **({"content": piece.text} if piece.text or first else {}),
            }
            choice = {
                "index": number,
                "delta": delta,
                "logprobs": self._chat_logprobs(piece.tokens),
                "finish_reason": finish,
            }
        else:
            choice = {"index": number, "text": piece.text, "logprobs": self._text_logprobs(piece.tokens),
                      "finish_reason": finish}  # fmt: skip
        head = self._head("chat.completion.chunk" if self.ask.chat else "text_completion")
        return {**head, "choices": [choice], **({"usage": None} if self.ask.usage else {})}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the usage, which follows all others if it was asked for."""
        head = self._head("chat.completion.chunk" if self.ask.chat else "text_completion")
        return {**head, "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.ask.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.ask.model,
                "system_fingerprint": f"refimpl-{__version__}"}  # fmt: skip

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        if self.ask.chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = self._chat_logprobs(tokens)
        else:
            said, logprobs = {"text": text}, self._text_logprobs(tokens)
        return {"index": number, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Each token with its bytes; `id` is ours, for OpenAI's layout has none."""
        if self.ask.logprobs is None:
            return None
        return {"content": [
            {**self._alternative(token.id, token.logprob),
             "top_logprobs": [self._alternative(id, logprob) for id, logprob in token.top]}
            for token in tokens
        ], "refusal": None}  # fmt: skip

    def _alternative(self, id: int, logprob: float | None) -> dict[str, Any]:
        utf8 = self.spell(id)
        return {"token": spelled(utf8, ""), "logprob": logprob, "bytes": list(utf8), "id": id}

    def _text_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        return {
            "tokens": [spelled(token.utf8) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": [token.start for token in tokens],
            "token_ids": [token.id for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """The likeliest tokens by their text, and the token itself. Of two with the same text, the likelier counts."""
        found: dict[str, float | None] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(spelled(self.spell(id)), logprob)
        return found


def spelled(utf8: bytes, prefix: str = "bytes:") -> str:
    r"""A token's bytes as text; those that are no whole characters as OpenAI writes them.

    >>> spelled("春".encode()), spelled("春".encode()[:2])
    ('春', 'bytes:\\xe6\\x98')
    """
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in utf8)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The tokens of a request: each prompt once, and all of its answers."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}  # fmt: skip
