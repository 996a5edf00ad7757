"""An exercise: a function to fill in, what it should be, and the mistakes that are made with it.

Each file of `exercises/` holds one, which is called as the file is. What a student writes takes its place by `kind`:

- `method`: a method of `refimpl.decoder.Decoder`, put into the forward of several models
- `decoder`: a whole class `Decoder`, put into the same forwards
- `function`: any other function, called with the arguments of each case and compared with what it should return
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from refimpl.errors import InputError, near

FOLDER = Path(__file__).parent / "exercises"


class Words(NamedTuple):
    """A text in both languages of the book."""

    en: str
    zh: str


class Case(NamedTuple):
    """A call of an exercise's function: what it is about, the arguments, and what it should return."""

    about: str
    arguments: tuple
    expected: Any


@dataclass(frozen=True)
class Mistake:
    """A known mistake: the code that makes it, and what a student who made it is told."""

    function: Any
    says: Words

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclass
class Exercise:
    """`function`: the name that a student fills in. `breaks`: the first tensor or case that the starter gets wrong."""

    kind: Literal["method", "decoder", "function"]
    function: str
    breaks: str
    title: Words
    task: Words
    hints: tuple[Words, Words]
    cases: Callable[[], Iterator[Case]] | None = None
    name: str = ""
    starter: Any = None
    solution: Any = None
    mistakes: list[Mistake] = field(default_factory=list)

    def starts_as(self, function: Any) -> Any:
        """Decorator of what a student's file begins with."""
        self.starter = function
        return function

    def solved_by(self, function: Any) -> Any:
        """Decorator of a solution."""
        self.solution = function
        return function

    def mistaken(self, en: str, zh: str) -> Callable[[Any], Any]:
        """Decorator of a known mistake, with what a student is told who made it."""

        def register(function: Any) -> Any:
            self.mistakes.append(Mistake(function, Words(en, zh)))
            return function

        return register

    def source(self, function: Any) -> str:
        """The code of starter, solution or mistake, as a student writes it: under the exercise's own name."""
        lines = inspect.getsource(function).splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if re.match(r"\s*(def|class) ", line))
        code = textwrap.dedent("".join(lines[first:]))
        return re.sub(rf"\A(def|class) {function.__name__}\b", rf"\1 {self.function}", code)

    def file(self, language: str = "en") -> str:
        """The file that a student starts with."""
        task = "\n".join(f"# {line}".rstrip() for line in getattr(self.task, language).strip().splitlines())
        head = "import math\n\nimport numpy as np\n"
        return f"# exercise: {self.name}\n{task}\n\n{head}\n\n{self.source(self.starter)}"


def names() -> list[str]:
    """All exercises, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def find(name: str) -> Exercise:
    """The exercise of a name. Raises InputError if there is none."""
    known = names()
    if name not in known:
        raise InputError(f"there is no exercise {name!r:.60}{near(name, set(known))}; refimpl learn list shows all")
    exercise: Exercise = import_module(f"{__package__}.exercises.{name}").exercise
    exercise.name = name
    return exercise
