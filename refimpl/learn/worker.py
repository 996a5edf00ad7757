"""A student's code, run in a process of its own, with limits on time, memory and what it writes.

The student runs it by their own wish, so nothing is forbidden to it. The limits keep a slip from hanging the terminal
or filling the memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from refimpl.errors import InputError
from refimpl.files import read_text
from refimpl.learn.check import Grade, grade, said
from refimpl.learn.exercise import Exercise, find

SECONDS, MEMORY, WRITTEN = 10, 2 << 30, 1 << 20


def check(file: str | Path, name: str | None = None) -> tuple[Exercise, Grade, str]:
    """The exercise of a student's file, its grade, and what it printed. `name`: by default as it says.

    Raises InputError for a file that cannot be read, for an unknown exercise, and beyond a limit.
    """
    path = Path(file)
    text = read_text(path)
    name = name or exercise_of(text) or path.stem
    exercise = find(name)
    with TemporaryDirectory(prefix="refimpl-") as folder:
        out, printed = Path(folder, "grade.json"), Path(folder, "printed")
        given = {
            **os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
            "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
        }  # fmt: skip
        command = [sys.executable, "-m", "refimpl.learn.worker", name, str(path.resolve()), str(out)]
        with printed.open("wb") as writes:
            try:
                code = subprocess.run(
                    command, cwd=folder, env=given, stdin=subprocess.DEVNULL, stdout=writes, stderr=subprocess.STDOUT,
                    timeout=SECONDS,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise InputError(
                    f"{path} ran for {SECONDS} s and was stopped; look for a loop without an end"
                ) from None
        words = printed.read_bytes()[:2000].decode("utf-8", "replace")
        if not out.is_file():
            last = (words.strip().splitlines() or ["nothing"])[-1]
            raise InputError(f"{path} ended its process with code {code} and no result; its last words: {last:.200}")
        return exercise, Grade(**json.loads(out.read_bytes())), words


def exercise_of(text: str) -> str:
    """The exercise that a file's first line names, or ""."""
    first = text.partition("\n")[0]
    return first.removeprefix("# exercise:").strip() if first.startswith("# exercise:") else ""


def run(name: str, file: str) -> Grade:
    """Grades a file in this process."""
    exercise = find(name)
    space: dict = {"__name__": "student", "__file__": file}
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), space)  # the student's own code, by their own wish
    except SyntaxError as error:
        return Grade(False, place=file, error=f"SyntaxError: {error.msg}", line=error.lineno or 0)
    except Exception as error:
        line, text = said(error)
        return Grade(False, place=file, error=text, line=line)
    if exercise.function not in space:
        return Grade(False, place=file, error=f"it defines no {exercise.function}; keep the name that it began with")
    try:
        return grade(exercise, space[exercise.function])
    except MemoryError:
        return Grade(False, place=file, error=f"it needs more than the {MEMORY >> 30} GiB of memory that it may use")


def limit() -> None:
    """Sets this process's limits, where the system has them."""
    try:
        import resource
    except ImportError:  # Windows has none; the time limit is the parent's
        return
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, WRITTEN)):
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    limit()
    Path(sys.argv[3]).write_text(run(sys.argv[1], sys.argv[2]).to_json(), encoding="utf-8")
