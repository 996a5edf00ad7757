"""A separate process for a library that is a black box: it may crash, hang, print or eat memory without doing harm.

    with Process("export.run.qnn", seconds=600) as child:
        answer = child.ask("open", graph="parts/token_ar1_cl64_2_of_3/model.onnx")

The module has a table `JOBS`: name -> function of keywords. It returns its answer, a dict; or it is a generator, which
yields messages before the answer. A question is a line of JSON, and so is each answer; arrays go through files
(`write_arrays`), and nothing is ever unpickled. What libraries write to the streams 1 and 2 goes to a file; if the
process ends by itself, the error tells the last line of it.

>>> with Process("export.run.process") as child:
...     child.ask("echo", word="黄河")["word"]
'黄河'
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np

from refimpl.errors import InputError, one_line

LONGEST = 64 << 20  # bytes of an answer: the nodes of a large graph are some MB
LOUDEST = 1 << 30  # bytes that libraries may print
TICK = 0.1  # seconds between two looks at the clock and at memory


class EndedError(InputError):
    """The process is gone: it crashed, was killed, or ran past a limit. `reason` says which, in a few words."""

    def __init__(self, reason: str, said: str = ""):
        super().__init__(f"{reason}{f'; the last it said is: {said}' if said else ''}")
        self.reason, self.said = reason, said


class Process:
    """A module's jobs in a process of their own, as a context.

    `seconds`, `memory`: how long one job may take, and how many bytes the process may hold (looked at where there is
    /proc); beyond that it is killed, and `ask` raises `EndedError`. `environment` is added to this process's own.
    `folder` is a place for files, gone with the process. `peak`: the most bytes that it held, as of the last answer.
    """

    def __init__(
        self, module: str, seconds: float | None = None, memory: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.module, self.seconds, self.memory, self.environment = module, seconds, memory, dict(environment or {})
        self.peak = 0
        self._child: subprocess.Popen | None = None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._lock = threading.Lock()

    def __enter__(self) -> Process:
        self._kept = tempfile.TemporaryDirectory(prefix="refimpl-", ignore_cleanup_errors=True)
        self.folder = Path(self._kept.name)
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        own_group: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for the one who asks, who ends the child
        if sys.platform == "win32":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "export.run.process", self.module, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **own_group,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **self.environment, "PYTHONPATH": paths},
        )  # fmt: skip
        threading.Thread(target=_listen, args=(self._child.stdout, self._lines), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def ask(self, job: str, **words: Any) -> dict[str, Any]:
        """The answer. Raises InputError with what the job says is wrong, and `EndedError` if the process is gone."""
        for message in self.hear(job, **words):  # noqa: B007
            pass
        return message

    def hear(self, job: str, **words: Any) -> Iterator[dict[str, Any]]:
        """Each message of a job as it comes; the last is the answer. Raises as `ask` does."""
        with self._lock:
            if not self.alive:
                raise EndedError("the process has ended before")
            assert self._child and self._child.stdin
            try:
                self._child.stdin.write(json.dumps({"job": job, "words": words}).encode() + b"\n")
                self._child.stdin.flush()
            except OSError:
                raise self._ended() from None
            due = None if self.seconds is None else time.monotonic() + self.seconds
            while True:
                message = self._message(due)
                self.peak = max(self.peak, message.pop("peak", 0))
                wrong = message.pop("wrong", None)
                if wrong is not None:
                    raise InputError(one_line(str(wrong)))
                last = message.pop("last", True)
                yield message
                if last:
                    return

    def _message(self, due: float | None) -> dict[str, Any]:
        """The next line of the child, if it comes in time and the child stays small."""
        while True:
            try:
                line = self._lines.get(timeout=TICK)
            except queue.Empty:
                if due is not None and time.monotonic() > due:
                    self._kill()
                    raise EndedError(f"it was not done in {self.seconds:g} s, and was ended", self.said()) from None
                if self.memory is not None and self._held() > self.memory:
                    self._kill()
                    raise EndedError(
                        f"it needed more than {self.memory / 2**30:.1f} GiB of memory, and was ended"
                    ) from None
                if self.log.exists() and self.log.stat().st_size > LOUDEST:
                    self._kill()
                    raise EndedError("it printed without end, and was ended", self.said()) from None
                continue
            if line is None:
                raise self._ended()
            try:
                message = json.loads(line)
                if isinstance(message, dict):
                    return message
            except ValueError:
                pass
            self._kill()
            raise EndedError("it gave no answer in JSON, and was ended", self.said())

    def _ended(self) -> EndedError:
        assert self._child
        code = self._child.wait()
        try:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        except ValueError:
            how = f"ended by signal {-code}"
        return EndedError(f"the process {how}", self.said())

    def _held(self) -> int:
        """Bytes of the child's memory; 0 where the system does not tell."""
        try:
            assert self._child
            pages = Path(f"/proc/{self._child.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError, AttributeError):
            return 0

    @property
    def log(self) -> Path:
        """The file of all that libraries printed."""
        return self.folder / "printed.txt"

    def said(self) -> str:
        """The last line that libraries printed, as a terminal may show it."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return one_line(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:200]

    def _kill(self) -> None:
        if self._child:
            self._child.kill()
            self._child.wait()

    def end(self) -> None:
        """Ends the process, at once if it still works, and removes its folder."""
        if self._child is None:
            return
        child, self._child = self._child, None
        if child.stdin:
            with suppress(OSError):
                child.stdin.close()  # which tells it to end
        try:
            child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout:
            child.stdout.close()
        self._kept.cleanup()


def _listen(stream: Any, lines: queue.Queue[bytes | None]) -> None:
    with suppress(OSError, ValueError):
        while line := stream.readline(LONGEST):
            lines.put(line)
    lines.put(None)


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Writes arrays as files of the folder; returns [name, file] of each, for `read_arrays`."""
    folder.mkdir(exist_ok=True)
    written = []
    for i, (name, array) in enumerate(arrays.items()):
        np.save(folder / f"{i}.npy", np.asarray(array), allow_pickle=False)
        written.append([name, f"{i}.npy"])
    return written


def read_arrays(folder: Path, written: Iterable[Iterable[str]]) -> dict[str, np.ndarray]:
    """Reads what `write_arrays` has written. Raises InputError for anything else."""
    try:
        return {name: np.load(folder / Path(file).name, allow_pickle=False) for name, file in written}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"the process handed over no arrays: {one_line(str(error))[:200]}") from None


def serve(jobs: Mapping[str, Callable], folder: Path, questions: Any, answers: Any) -> None:
    """Answers questions until the pipe that they come from is closed; then the process ends at once."""
    waiting: queue.Queue[bytes] = queue.Queue()

    def listen() -> None:
        while line := questions.readline():
            waiting.put(line)
        os._exit(0)  # in the midst of a job, too

    threading.Thread(target=listen, daemon=True).start()

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps({**message, "peak": _peak()}).encode() + b"\n")
        answers.flush()

    while True:
        question = json.loads(waiting.get())
        try:
            found = jobs[question["job"]](folder=folder, **question["words"])
            if isinstance(found, GeneratorType):
                found = _said_by(found, say)
            say({**found, "last": True})
        except Exception as error:  # a library raises its own kinds; all of them are an answer
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            say({"wrong": f"{kind}{' '.join(str(error).split())[:2000]}"})


def _said_by(job: GeneratorType, say: Callable) -> Mapping[str, Any]:
    """Says each message of a job as it comes; returns the answer."""
    while True:
        try:
            say({**next(job), "last": False})
        except StopIteration as stop:
            return stop.value


def _peak() -> int:
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        return 0


def main(module: str, folder: str) -> None:
    """Runs in the child: its own streams go to a file, the pipes stay for questions and answers."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    quiet, printed = os.open(os.devnull, os.O_RDONLY), os.open(f"{folder}/printed.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    for stream, target in ((0, quiet), (1, printed), (2, printed)):
        os.dup2(target, stream)
    serve(importlib.import_module(module).JOBS, Path(folder), questions, answers)


def _echo(folder: Path, word: str) -> dict[str, str]:
    return {"word": word}


JOBS: dict[str, Callable] = {"echo": _echo}

if __name__ == "__main__":
    main(*sys.argv[1:3])
