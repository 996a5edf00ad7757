"""Debian's Chromium, asked through its debugging pipe: a page is opened, and JavaScript says what stands on it."""

import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page. Messages go through two pipes, JSON with a zero byte at the end."""

    def __init__(self, reads: int, writes: int):
        self.reads, self.writes, self.number, self.rest, self.session = reads, writes, 0, b"", None

    def tell(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            while b"\0" not in self.rest:
                ready = select.select([self.reads], [], [], deadline - time.monotonic())[0]
                assert ready, f"the browser does not answer {method}"
                self.rest += os.read(self.reads, 1 << 20)
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.session = None
        target = self.tell("Target.createTarget", url=url)["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def value(self, expression: str):
        """What an expression gives on the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30):
        """The expression's value, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value}"
            time.sleep(0.05)
        return value


@contextmanager
def browser(folder):
    """A `Browser` with its profile in `folder`; skips the test where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    theirs, ours = os.pipe(), os.pipe()
    flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={folder}"
    command = f"exec {CHROMIUM} {flags} about:blank 3<&{theirs[0]} 4>&{ours[1]}"
    environment = {**os.environ, "HOME": str(folder)}
    process = subprocess.Popen(
        ["bash", "-c", command], pass_fds=(theirs[0], ours[1]), stderr=subprocess.DEVNULL, env=environment
    )
    os.close(theirs[0])
    os.close(ours[1])
    try:
        yield Browser(ours[0], theirs[1])
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours[0])
        os.close(theirs[1])
