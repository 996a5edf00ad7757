"""Engines that are asked: a server, llama.cpp in this process, a command. Each takes OpenAI's requests.

`ask(body, chat)` gives the answer to a request of /v1/completions, or with `chat` of /v1/chat/completions. It raises
`NotOfferedError` for what the engine refuses, and InputError if it cannot be reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from refimpl.errors import InputError, one_line

LARGEST = 16 << 20  # bytes of an answer


class NotOfferedError(Exception):
    """The engine does not do this at all. The text is what it said."""


class Engine(Protocol):
    """What answers. `name`: of the engine, as the table shows it."""

    name: str

    def ask(self, body: dict[str, Any], chat: bool) -> dict[str, Any]: ...


class Url:
    """A server with OpenAI's API, at an address such as http://127.0.0.1:8000. `model`: None for its first."""

    def __init__(self, url: str, model: str | None = None, token: str | None = None, seconds: float = 600):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the address is {url!r:.60}, expected one such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.seconds = seconds
        listed = self._request("/v1/models", None).get("data", [])
        names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if model is None and not names:
            raise InputError(f"{self.url}/v1/models names no model; give one with --name")
        self.model = model or names[0]
        self.name = f"{self.model} at {self.url}"

    def ask(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The server's answer."""
        return self._request("/v1/chat/completions" if chat else "/v1/completions", {"model": self.model, **body})

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                return _object(answer.read(LARGEST))
        except urllib.error.HTTPError as error:
            said = one_line(error.read(2000).decode(errors="replace"))
            raise NotOfferedError(f"HTTP {error.code}: {said[:200]}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.url} does not answer: {error}; is the server there?") from None


class Gguf:
    """A GGUF file in llama.cpp, in this process (llama-cpp-python)."""

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise InputError(f"{path} is not a file; expected a GGUF file of one of the tiny models")
        try:
            import llama_cpp
        except ImportError:
            raise InputError("llama.cpp is not installed; pip install llama-cpp-python") from None
        with _quiet():
            try:
                self.llama: Any = llama_cpp.Llama(str(path), n_ctx=0, logits_all=True, verbose=False, n_threads=1)
            except (ValueError, RuntimeError) as error:
                raise InputError(f"llama.cpp does not load {path}: {error}") from None
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {Path(path).name}"

    def ask(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """llama.cpp's answer, from an empty cache. Its Python package takes one prompt at a time."""
        self.llama.reset()
        try:
            if chat:
                return dict(self.llama.create_chat_completion(**body))
            return dict(self.llama.create_completion(**body))
        except Exception as error:  # the library raises what it likes
            raise NotOfferedError(f"{type(error).__name__}: {one_line(str(error))[:200]}") from None


class Command:
    """A command that reads requests, one line of JSON each, with their path under "path", and writes an answer each."""

    def __init__(self, command: str):
        self.name = command
        try:
            self.process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        except (OSError, ValueError, IndexError) as error:
            raise InputError(f"cannot run {command!r:.80}: {error}") from None

    def ask(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The command's next line."""
        assert self.process.stdin and self.process.stdout
        try:
            print(
                json.dumps({"path": "chat/completions" if chat else "completions", **body}),
                file=self.process.stdin,
                flush=True,
            )
            line = self.process.stdout.readline(LARGEST)
            answer = _object(line.encode())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.name} has given no answer in JSON: {error}; it should write a line for each request"
            ) from None
        if "error" in answer:
            raise NotOfferedError(one_line(str(answer["error"]))[:200])
        return answer


def _object(data: bytes) -> dict[str, Any]:
    answer = json.loads(data)
    if not isinstance(answer, dict):
        raise ValueError(f"the answer is a JSON {type(answer).__name__}, expected an object")
    return answer


@contextlib.contextmanager
def _quiet():
    """llama.cpp writes to the standard error by itself."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
