"""A Python process of its own for a library that may crash, abort, or print whatever it likes.

    with Child("export.phone.reading") as child:          # python -m export.phone.reading
        for answer in child.ask(path="part_1.bin"):       # dictionaries, until there is no more
            ...

The two speak JSON, a line a message. The child keeps the standard output that it was born with for its answers, and
points file descriptors 1 and 2 at a file: what a library prints there is never mistaken for an answer, and its last
lines say why a child died. A child ends when its parent does, because its standard input ends then.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from refimpl.errors import InputError

LAST = 8 << 10  # bytes of noise that are looked through for a reason
Message = dict[str, Any]


class Child:
    """One of our modules as a process, which answers questions one after the other. Use it as a context."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None, limit: float | None = None):
        """`environment` is added to this process's. `limit`: seconds without an answer after which it is killed."""
        self.module, self.limit = module, limit
        self._environment = dict(environment or {})
        self._process: subprocess.Popen | None = None
        self._noise: IO[bytes] | None = None
        self._late = False

    def __enter__(self) -> Child:
        self._noise = tempfile.TemporaryFile()
        path = [str(folder) for folder in sys.path if folder] or [os.getcwd()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **self._environment},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._noise:
            self._noise.close()

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        if self._process:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                try:
                    if stream:
                        stream.close()
                except BrokenPipeError:
                    pass

    def ask(self, **question: Any) -> Iterator[Message]:
        """The answers to a question.

        Raises InputError with the child's own words if it answers with an error, and with its last words if it dies.
        """
        assert self._process and self._process.stdin and self._process.stdout, "a child is used as a context"
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise InputError(self._death()) from None
        while True:
            line = self._line()
            if not line:
                raise InputError(self._death())
            answer = json.loads(line)
            if "error" in answer:
                raise InputError(answer["error"])
            if answer.get("done"):
                return
            yield answer

    def _line(self) -> bytes:
        """The next line of the child, or nothing once it is dead. A child that takes too long is killed."""
        assert self._process and self._process.stdout
        if self.limit is None:
            return self._process.stdout.readline()
        timer = threading.Timer(self.limit, self._too_late)
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()

    def _too_late(self) -> None:
        self._late = True
        if self._process:
            self._process.kill()

    def _death(self) -> str:
        """Why the process is gone, as well as can be told."""
        assert self._process and self._noise
        code = self._process.wait()
        if self._late:
            return f"gave no answer for {self.limit:g} seconds"
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._noise.seek(max(0, self._noise.seek(0, os.SEEK_END) - LAST))
        lines = self._noise.read().decode("utf-8", "replace").strip().splitlines()
        said = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        return how + (f", after it said: {said.strip():.300}" if said else "")


def serve(answer: Callable[..., Iterator[Message]]) -> None:
    """What a child's module runs: `answer(**question)` yields the answers to each question that comes.

    An InputError becomes the answer `error`; any other exception ends the child, which is a bug of ours and is told
    as its death.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions: queue.Queue[bytes] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            questions.put(line)
        os._exit(0)  # the parent is gone, or is done with us; a library may be in the middle of something

    threading.Thread(target=listen, daemon=True).start()

    def reply(message: Message) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    while True:
        question = json.loads(questions.get())
        try:
            for message in answer(**question):
                reply(message)
            reply({"done": True})
        except InputError as error:
            reply({"error": str(error)})


def folder_of(package: str, version: str) -> Path:
    """The folder of an optional package. Raises InputError, with what to do, if it is not here or cannot be."""
    from importlib.util import find_spec

    found = find_spec(package)
    if found and found.origin:
        return Path(found.origin).parent
    here = ".".join(map(str, sys.version_info[:2]))
    raise InputError(
        f"{package} is not installed; install refimpl[htp] (Linux or Windows, with Python {version}; "
        f"this is Python {here} on {platform.system()} {platform.machine()})"
    )
