"""Questions with one right answer, as chapters hold them, and as the command line asks them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refimpl.errors import InputError

FOLDER = Path(__file__).parent / "chapters"
BLOCK = re.compile(r"^```quiz\s*\n(.*?)^```\s*$", re.M | re.S)
ANSWER = re.compile(r"^- \[([ x])\] (.+?) :: (.+)$")


@dataclass(frozen=True)
class Answer:
    """One answer, and why it is right or wrong."""

    text: str
    why: str
    right: bool


@dataclass(frozen=True)
class Question:
    """A question and its answers, exactly one of them right."""

    text: str
    answers: tuple[Answer, ...]


def read_question(block: str) -> Question:
    """The question of a `quiz` block. Raises InputError for a line that is no answer, and for not one right answer."""
    question, *lines = [line.strip() for line in block.strip().splitlines() if line.strip()]
    answers = []
    for line in lines:
        if not line.startswith("- ["):
            question += " " + line
            continue
        hit = ANSWER.match(line)
        if hit is None:
            raise InputError(
                f"a quiz has the line {line!r:.80}, expected '- [ ] answer :: why' or '- [x] answer :: why'"
            )
        answers.append(Answer(hit[2], hit[3], hit[1] == "x"))
    if sum(one.right for one in answers) != 1:
        raise InputError(
            f"the question {question!r:.60} has {sum(one.right for one in answers)} right answers, expected 1"
        )
    return Question(question, tuple(answers))


def questions(text: str) -> list[Question]:
    """All questions of a chapter's Markdown."""
    return [read_question(block) for block in BLOCK.findall(text)]


def ask(chapters: list[Path], language: str, read: Callable[[str], str] = input) -> tuple[int, int]:
    """Asks the questions of these chapters' folders; how many were answered right, of how many asked."""
    right = asked = 0
    for folder in chapters:
        for question in questions((folder / f"{language}.md").read_text(encoding="utf-8")):
            print(f"\n{question.text}")
            for i, one in enumerate(question.answers, 1):
                print(f"  {i}. {one.text}")
            try:
                said = read("> ").strip()
            except EOFError:
                return right, asked
            asked += 1
            chosen = question.answers[int(said) - 1] if said in map(str, range(1, len(question.answers) + 1)) else None
            best = next(one for one in question.answers if one.right)
            right += chosen is best
            print(
                f"  {(chosen or best).why}"
                if chosen is best
                else f"  {chosen.why if chosen else ''} -> {best.text}: {best.why}"
            )
    return right, asked
