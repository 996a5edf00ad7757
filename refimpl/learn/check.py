"""Grading: a student's function in the forward of several models, or called with cases; what is wrong first.

Truth is PyTorch's where a golden recorded the tensor, and otherwise `refimpl.decoder`, which the goldens judge.
All runs are float64. The models have RoPE, ALiBi, grouped heads, a batch and padding, so no answer can be written
down for one.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import golden
import refimpl
from golden.check import without_padding
from refimpl.decoder import Decoder
from refimpl.errors import InputError, Remark
from refimpl.learn.exercise import Exercise
from refimpl.names import taps
from refimpl.trace import Trace, feeding, recording

DATA = Path(golden.__file__).parent / "data"
PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"
TINY = ("baichuan-7b-v1-tiny", "baichuan2-13b-tiny", "qwen2-tiny")
NEAR = 0.01  # of the error itself: what is nearer to a known mistake than this is that mistake


@dataclass(frozen=True)
class World:
    """One prompt of one model, with its true tensors in float64."""

    name: str
    model: Any
    case: Any
    truth: Trace

    def run(self, decoder: type[Decoder], fed: bool) -> tuple[Trace, Exception | None]:
        """What a decoder computes, recorded as far as it came, and the error that ended it."""
        trace = Trace(meta=self.truth.meta)
        tap = recording(trace, then=feeding(self.truth if fed else {}))
        try:
            with np.errstate(all="ignore"):
                self.model.with_decoder(decoder).forward(self.case.ids, "float64", self.case.attention_mask, None, tap)
        except Exception as error:
            return trace, error
        return trace, None


@dataclass(frozen=True)
class Grade:
    """What a check found. `place`: the first wrong tensor or case; empty if all is right."""

    right: bool
    world: str = ""
    place: str = ""
    where: str = ""
    got: str = ""
    expected: str = ""
    wrong: int = 0
    total: int = 0
    answer: str = ""
    error: str = ""
    line: int = 0
    mistake: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@cache
def worlds() -> tuple[World, ...]:
    """The embedded model on the book's prompt, then every recorded case of the small models."""
    model = refimpl.load(backend="numpy")
    case = golden.bundle.Case(model.token_ids(PROMPT), None, PROMPT)
    found = [World("embedded", model, case, model.trace(case.ids, "float64"))]
    for name in TINY:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Remark)  # a small vocabulary does not say which Baichuan it is
            model = refimpl.load(DATA / name / "model", backend="numpy")
        recorded = golden.read(DATA / name / "golden", verify=False)
        for key, case in recorded.cases.items():
            truth = model.trace(case.ids, "float64", attention_mask=case.attention_mask)
            if "float64" in recorded.dtypes:
                truth.update({tap: np.asarray(x) for tap, x in recorded.trace(key, "float64").items()})
            found.append(World(f"{name}/{key}", model, case, truth))
    return tuple(found)


def grade(exercise: Exercise, written: Any) -> Grade:
    """Judges what a student wrote: the function, or for a whole decoder the class."""
    found = _cases(exercise, written) if exercise.kind == "function" else _forwards(exercise, written)
    if found.right or found.error:
        return found
    for mistake in exercise.mistakes:
        if _same(exercise, written, mistake.function, found):
            return Grade(**{**asdict(found), "mistake": mistake.name})
    return found


def _decoder(exercise: Exercise, written: Any) -> type[Decoder]:
    if exercise.kind == "method":
        return type("Student", (Decoder,), {exercise.function: written})
    if not isinstance(written, type):
        raise InputError(f"{exercise.function} is {written!r:.60}, expected a class")
    return type("Student", (written, Given), {})


class Given(Decoder):
    """What a class of a student finds there: the decoder, and the gain of a norm as an array."""

    def gain(self, name: str) -> np.ndarray:
        return self.ops.parameter(self.weights[f"{name}.weight"])


def _judged(world: World, trace: Trace) -> Any:
    sides = (without_padding(Trace(side, world.truth.meta), world.model.config, world.case)
             for side in (trace, world.truth))  # fmt: skip
    return golden.compare(*sides)


def _forwards(exercise: Exercise, written: Any) -> Grade:
    """Birth in every world first, then outcome: an error shows where it is made, before what it leads to."""
    decoder = _decoder(exercise, written)
    for fed in (True, False):
        for world in worlds():
            trace, error = world.run(decoder, fed)
            report = _judged(world, trace)
            if error is None and report:
                continue
            guilty = next((t for t in report.failures if t.problem != "missing"), report.failures[0])
            if error is not None:
                line, text = said(error)
                return Grade(False, world.name, guilty.name, error=text, line=line)
            outcome, _ = world.run(decoder, fed=False)
            wrong = _judged(world, outcome).failures
            return Grade(False, world.name, guilty.name, _where(world, trace, guilty), f"{guilty.value:.6g}",
                         f"{guilty.reference:.6g}", len(wrong), len(world.truth), _answer(world, outcome))  # fmt: skip
    return Grade(
        True,
        total=sum(len(world.truth) for world in worlds()),
        answer=_answer(worlds()[0], worlds()[0].run(decoder, fed=False)[0]),
    )


def _where(world: World, trace: Trace, guilty: Any) -> str:
    """Token and head of the first wrong element: "token 3 (雀), head 0"."""
    a, b = np.asarray(trace[guilty.name]), np.asarray(world.truth[guilty.name])
    letters = taps(world.model.config)[guilty.name].shape.split()
    if a.shape != b.shape or "T" not in letters:
        return ""
    bad = ~(np.abs(a - b) <= max(guilty.allowed, 1e-9) * np.abs(b).max())
    at = np.argwhere(bad)
    index = min(at.tolist(), key=lambda i: i[letters.index("T")]) if len(at) else list(guilty.index)
    token = index[letters.index("T")]
    words = [f"token {token}"]
    if world.model.folder and world.name == "embedded":
        words[0] += f" ({world.model.tokenizer.decode([int(world.case.ids[0, token])])!r})"
    words += [f"head {index[letters.index(letter)]}" for letter in ("H", "K") if letter in letters]
    if world.truth[guilty.name].shape[0] > 1:
        words.insert(0, f"row {index[0]}")
    return ", ".join(words)


def _answer(world: World, trace: Trace) -> str:
    """The token that the embedded model would write next."""
    if world.name != "embedded" or "lm_head" not in trace:
        return ""
    return world.model.tokenizer.decode([int(np.argmax(np.nan_to_num(trace["lm_head"][0, -1])))])


def _cases(exercise: Exercise, written: Callable) -> Grade:
    assert exercise.cases is not None
    total = 0
    for case in exercise.cases():
        total += 1
        try:
            got = written(*_copied(case.arguments))
        except Exception as error:
            line, text = said(error)
            return Grade(False, "cases", case.about, error=text, line=line)
        if where := _differs(got, case.expected):
            return Grade(False, "cases", case.about, where, _brief(got), _brief(case.expected), total=total)
    return Grade(True, total=total)


def _copied(arguments: tuple) -> tuple:
    """Arguments that a student may write into."""
    return tuple(one.copy() if isinstance(one, np.ndarray) else one for one in arguments)


def _differs(got: Any, expected: Any) -> str:
    """Where two values first differ, "" if they agree: arrays within 1e-9 of the largest value, others exactly."""
    if not isinstance(expected, np.ndarray | float):
        same = type(got) is type(expected) and got == expected
        return "" if same else f"type {type(got).__name__}" if type(got) is not type(expected) else "value"
    try:
        a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    except (TypeError, ValueError):
        return f"a {type(got).__name__}"
    if a.shape != b.shape:
        return f"shape {a.shape}, expected {b.shape}"
    bad = np.argwhere(~((a == b) | (np.abs(a - b) <= 1e-9 * (np.abs(b).max() if b.size else 0))))
    return f"element {tuple(bad[0].tolist())}" if len(bad) else ""


def _same(exercise: Exercise, written: Any, mistake: Any, found: Grade) -> bool:
    """Whether a known mistake gives the same wrong values at the same place."""
    if exercise.kind == "function":
        assert exercise.cases is not None
        case = next(case for case in exercise.cases() if case.about == found.place)
        try:
            return not _differs(*(_number(f(*_copied(case.arguments))) for f in (written, mistake)))
        except Exception:
            return False
    world = next(world for world in worlds() if world.name == found.world)
    ours, theirs = (world.run(_decoder(exercise, f), fed=True)[0].get(found.place) for f in (written, mistake))
    truth = world.truth[found.place]
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.shape != truth.shape:
        return False
    error, apart = np.linalg.norm(ours - truth), np.linalg.norm(ours - theirs)
    return bool(apart <= NEAR * error) if math.isfinite(error) else bool(np.array_equal(ours, theirs, equal_nan=True))


def _number(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list | np.generic) else value


def said(error: Exception) -> tuple[int, str]:
    """The line of the student's file that an error came from, and its text."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__") == "student":
            line = step.tb_lineno
        step = step.tb_next
    return line, f"{type(error).__name__}: {str(error)[:300]}"


def _brief(value: Any) -> str:
    with np.printoptions(precision=5, threshold=8, edgeitems=3):
        return " ".join(str(value).split())[:120]
