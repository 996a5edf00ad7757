"""The questions of a family, with PyTorch's answers and those of the known faults: `data/FAMILY.json`.

`tests/make_conformance.py` makes these files. It looks for prompts to which each known fault gives another answer than
the right one, so one answer decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.config import FAMILIES
from refimpl.conformance.kit import VERSION
from refimpl.errors import InputError
from refimpl.files import read_json

DATA = Path(__file__).parent / "data"
TOLERANCE = 0.05  # nats: llama.cpp, whose cache is in float16, is at most 0.035 off on these models


@dataclass(frozen=True)
class Answer:
    """A text, the likeliest first tokens with their log-probabilities, and why it ended ("": that does not matter)."""

    text: str
    top: dict[str, float]
    finish: str = ""


@dataclass(frozen=True)
class Question:
    """A request, the right answer, and what known faults answer. `ids`: the prompt's, in place of its text.

    `chat`: a request of /v1/chat/completions. `same`: further fields, with each of which the answer is the same.
    """

    feature: str
    body: dict[str, Any]
    ids: Any
    right: Answer
    faults: dict[str, Answer]
    chat: bool = False
    same: tuple[dict[str, Any], ...] = ()


def questions(family: str) -> list[Question]:
    """A family's questions. Raises InputError for another name than those of `refimpl.config.FAMILIES`."""
    if family not in FAMILIES:
        raise InputError(f"the family is {family!r:.40}, expected one of {', '.join(FAMILIES)}")
    data = read_json(DATA / f"{family}.json")
    if data["version"] != VERSION:
        raise InputError(f"{DATA / family}.json is of other weights; run tests/make_conformance.py")
    return [
        Question(one["feature"], one["body"], one["ids"], Answer(**one["right"]),
                 {cause: Answer(**answer) for cause, answer in one["faults"].items()}, one["chat"], tuple(one["same"]))
        for one in data["questions"]
    ]  # fmt: skip
