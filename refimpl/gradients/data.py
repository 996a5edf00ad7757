"""Conversations as training examples, in the format and with the preprocessing of the official fine-tuning script.

    [{"id": "1", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}, …]

    ids      195  question         196   answer  …  </s>
    labels    2   -100 … -100     -100   answer  …  </s>

Each turn begins with its token. Labels are the assistant's words and its stop: the label of the next 195 is </s>. The
user's words do not count. Tokens beyond the maximum length are cut off.

The file may also be JSON Lines: one conversation a line. One deviation: the official script masks every token of id 0
as padding, even an <unk> in the text; here the whole text is attended to.

Source: `SupervisedDataset.preprocessing` in fine-tune.py of baichuan-inc/Baichuan2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import InputError
from refimpl.files import read_small
from refimpl.loss import IGNORE
from refimpl.text.tokenizer import Tokenizer

LARGEST = 2 << 30  # bytes of a data file
USER, ASSISTANT = "human", "gpt"
SPACE = " \t\r\n"


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation: `ids` (T,) and `labels` (T,), int64."""

    ids: np.ndarray
    labels: np.ndarray


def read_examples(path: str | Path, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """The examples of a data file. Raises InputError, with the line, for an entry that is not a conversation.

    An example that is cut before the assistant's first word has nothing to learn from. A file without examples, or with
    such examples alone, is refused.
    """
    if not tokenizer.family.startswith("Baichuan"):
        raise InputError(f"conversations are laid out as for Baichuan2, and this is a {tokenizer.family}")
    found = []
    for line, item in _items(Path(path)):
        try:
            found.append(lay_out(item, tokenizer, max_length))
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    if not found:
        raise InputError(f"{path} holds no conversation; expected a list of them")
    if not any((example.labels[1:] != IGNORE).any() for example in found):
        raise InputError(f"{path} has no answer within {max_length} tokens; there is nothing to learn from")
    return found


def lay_out(item: Any, tokenizer: Tokenizer, max_length: int) -> Example:
    """The ids and labels of a conversation. Raises InputError for anything else."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns:
        raise InputError(f"expected an object with a list of conversations, found {item!r:.60}")
    settings = tokenizer.chat_settings
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in (USER, ASSISTANT):
            raise InputError(f"a turn is {turn!r:.60}, expected from {USER!r} or {ASSISTANT!r}")
        if not isinstance(turn.get("value"), str):
            raise InputError(f"a turn's value is {turn.get('value')!r:.40}, expected text")
        words = tokenizer.encode(turn["value"])
        if turn["from"] == USER:
            ids += [settings.user_token_id, *words]
            labels += [tokenizer.eos_token_id, *[IGNORE] * len(words)]
        else:
            ids += [settings.assistant_token_id, *words]
            labels += [IGNORE, *words]
    ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    return Example(np.array(ids[:max_length], np.int64), np.array(labels[:max_length], np.int64))


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """The conversations of a JSON list or of JSON Lines, each with the line where it begins."""
    try:
        text = read_small(path, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    decoder, at, line = json.JSONDecoder(), 0, 1
    listed = text.lstrip().startswith("[")
    between = SPACE + ("[,]" if listed else "")
    while True:
        while at < len(text) and text[at] in between:
            line += text[at] == "\n"
            at += 1
        if at == len(text):
            break
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            wrong = line + text.count("\n", at, getattr(error, "pos", at))
            raise InputError(f"{path}, line {wrong}: this is not JSON ({getattr(error, 'msg', error)})") from None
        yield line, item
        line += text.count("\n", at, end)
        at = end
    if listed and not text.rstrip().endswith("]"):
        raise InputError(f"{path}, line {line}: the list is not closed; is the file cut short?")
