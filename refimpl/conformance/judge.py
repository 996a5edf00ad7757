"""Asks an engine a family's questions, and says of each feature: right, wrong by how much and why, or not offered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from refimpl.conformance.engines import Engine, NotOfferedError
from refimpl.conformance.questions import TOLERANCE, Answer, Question, questions

RIGHT, WRONG, ABSENT = "right", "WRONG", "not offered"


@dataclass(frozen=True)
class Row:
    """What came of one question. `off`: the largest difference of a log-probability, in nats; None without any."""

    feature: str
    verdict: str
    off: float | None = None
    said: str = ""
    expected: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Conformance:
    """The rows of one engine and family. True if nothing is wrong."""

    engine: str
    family: str
    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return all(row.verdict != WRONG for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.feature) for row in self.rows)
        lines = [f"{self.family}: {self.engine}"]
        for row in self.rows:
            off = "" if row.off is None else f"{row.off:.4f} nats"
            lines.append(f"{row.feature:{width}}  {row.verdict:11}  {off:>12}  {row.cause}".rstrip())
            if row.verdict == WRONG and row.said != row.expected:
                lines.append(f"{'':{width}}  said {row.said[:50]!r}, PyTorch says {row.expected[:50]!r}")
        wrong = sum(row.verdict == WRONG for row in self.rows)
        lines.append(f"{wrong} of {len(self.rows)} wrong" if wrong else f"no feature is wrong, of {len(self.rows)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def conformance(engine: Engine, family: str) -> Conformance:
    """Asks all questions of a family. Raises InputError if the engine cannot be asked."""
    found = questions(family)
    rows = [row for one in tqdm(found, unit="question", disable=None, leave=False) for row in judged(engine, one)]
    return Conformance(engine.name, family, tuple(rows))


def judged(engine: Engine, question: Question) -> Iterator[Row]:
    """The row of a question, and one for each way in which the same answer is to come."""
    for change in ({}, *question.same):
        named = ", ".join(f"{name} {value}" for name, value in change.items() if name != "seed")
        feature = f"{question.feature}: {named}" if named else question.feature
        try:
            answers = asked(engine, question, change)
        except NotOfferedError as error:
            yield Row(feature, ABSENT, cause=str(error))
            continue
        yield _row(feature, question, answers, bool(change))


def asked(engine: Engine, question: Question, change: dict[str, Any]) -> Answer:
    """The engine's answer. Log-probabilities are asked for, and done without where the engine has none.

    A text that stands for the ids is sent first: it shows whether the engine's tokenizer gives the same. Raises
    NotOfferedError.
    """
    body = {**question.body, **change}
    several = isinstance(body.get("prompt"), list)
    more: dict[str, Any] = (
        {} if several else {"logprobs": True, "top_logprobs": 5} if question.chat else {"logprobs": 5}
    )
    try:
        found = engine.ask({**body, **more}, question.chat)
    except NotOfferedError:
        if not more:
            raise
        found = engine.ask(body, question.chat)
    return read(found, question.chat)


def read(answer: dict[str, Any], chat: bool) -> Answer:
    """An engine's answer, from either of OpenAI's layouts. Raises NotOfferedError for another one."""
    try:
        choices = sorted(answer["choices"], key=lambda one: one.get("index", 0))
        texts = [(one["message"]["content"] or "") if chat else one["text"] for one in choices]
        finish, logprobs = choices[0].get("finish_reason") or "", choices[0].get("logprobs") or {}
        if "content" in logprobs:
            first = (logprobs["content"] or [{}])[0]
            top = {one["token"]: float(one["logprob"]) for one in first.get("top_logprobs") or []}
        else:
            top = {token: float(p) for token, p in ((logprobs.get("top_logprobs") or [{}])[0] or {}).items()}
        return Answer("\n".join(map(str, texts)), top, str(finish))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise NotOfferedError(f"the answer has another layout than OpenAI's: {type(error).__name__} {error}") from None


def _row(feature: str, question: Question, found: Answer, drawn: bool) -> Row:
    right = question.right
    off = None if drawn else distance(found, right)
    ended = not right.finish or right.finish == "length" or found.finish == right.finish
    if found.text == right.text and ended and (off is None or off <= TOLERANCE):
        return Row(feature, RIGHT, off)
    near = [(distance(found, fault) or 0.0, cause) for cause, fault in question.faults.items() if same(found, fault)]
    if near:
        cause = min(near)[1]
    elif found.text == right.text and not ended:
        cause = f"the text ends with {found.finish!r}, expected {right.finish!r}"
    elif found.text == right.text:
        cause = (
            "the tokens are right, but the numbers are too far off: coarse weights, or a feature that is nearly right"
        )
    else:
        cause = "none of the known faults"
    return Row(feature, WRONG, off, found.text, right.text, cause)


def distance(found: Answer, other: Answer) -> float | None:
    """How far two answers' first log-probabilities are apart, at the tokens that both name; None if there are none."""
    both = found.top.keys() & other.top.keys()
    return max(abs(found.top[token] - other.top[token]) for token in both) if both else None


def same(found: Answer, fault: Answer) -> bool:
    """Whether an answer is that of a known fault."""
    off = distance(found, fault)
    return found.text == fault.text and (off is None or off <= 2 * TOLERANCE)
