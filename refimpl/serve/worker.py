"""One thread computes, one request after the other: a model uses all cores for one token, so taking turns is fastest.

    worker = Worker(16)
    job = worker.submit(work, deliver)
    job.stop()                          # nobody wants it any more

`work(go_on)` yields what it finds. `deliver` gets each of these, then the exception that ended the work, or DONE. It is
called in the worker's thread. `go_on` raises GoneError once the job was stopped.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

Work = Callable[[Callable[[], None]], Iterator[Any]]
Deliver = Callable[[Any], None]
DONE = object()  # follows the last of what a job found


class GoneError(Exception):
    """Nobody waits for this computation any more."""


class BusyError(Exception):
    """Too many requests wait. `seconds`: when to try again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} requests wait already; try again in {seconds} s")
        self.seconds = seconds


class Job:
    """A computation that waits, runs, or was stopped."""

    def __init__(self, work: Work, deliver: Deliver):
        self.work, self.deliver, self.stopped = work, deliver, False

    def stop(self) -> None:
        """Ends it at the next token; if it still waits, it never runs."""
        self.stopped = True

    def go_on(self) -> None:
        """Raises GoneError if nobody wants the job any more."""
        if self.stopped:
            raise GoneError


class Worker:
    """The thread and the queue before it. `longest`: how many jobs may wait."""

    def __init__(self, longest: int):
        self.longest = longest
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.closed = False
        self.seconds = 1.0  # that a job takes, lately
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="refimpl-worker", daemon=True)
        self._thread.start()

    def submit(self, work: Work, deliver: Deliver) -> Job:
        """A job at the end of the queue. Raises BusyError if the queue is full."""
        with self._changed:
            self.waiting = deque(job for job in self.waiting if not job.stopped)
            if self.closed or len(self.waiting) >= self.longest:
                raise BusyError(len(self.waiting), max(1, min(60, math.ceil(self.seconds * (len(self.waiting) + 1)))))
            job = Job(work, deliver)
            self.waiting.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Stops all jobs, and takes no more. A signal's handler may call it: it takes no lock."""
        self.closed = True
        for job in (*tuple(self.waiting), *([self.running] if self.running else [])):
            job.stop()

    def close(self, patience: float = 10.0) -> None:
        """Stops all jobs, and waits for the one that runs until its next token."""
        self.stop()
        with self._changed:
            self._changed.notify()
        self._thread.join(patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self.waiting)
                if not self.waiting:
                    return
                job = self.running = self.waiting.popleft()
            began = time.monotonic()
            try:
                self._compute(job)
            except Exception:  # the event loop that would have listened has ended
                job.stop()
            self.seconds += 0.3 * (time.monotonic() - began - self.seconds)
            self.running = None

    def _compute(self, job: Job) -> None:
        try:
            job.go_on()
            for found in job.work(job.go_on):
                job.go_on()
                job.deliver(found)
            job.deliver(DONE)
        except Exception as error:  # whatever a request brings about, the next one is served
            job.deliver(error)
