"""The application: OpenAI's routes over some models. Requests are read here, computed by the worker, written here."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from refimpl.errors import InputError
from refimpl.serve.answers import Layout, usage
from refimpl.serve.asks import Ask, RefusedError, read_ask, read_detokenize, read_inside, read_tokenize
from refimpl.serve.guard import Guard
from refimpl.serve.inside import inside
from refimpl.serve.served import Served
from refimpl.serve.worker import DONE, BusyError, GoneError, Job, Work, Worker
from refimpl.serve.writing import Piece, Writer

LARGEST = 4 << 20  # bytes of a request's body
PAGE = Path(__file__).parent / "page"
FILES = {"/": ("index.html", "text/html"), "/chat.js": ("chat.js", "text/javascript"),
         "/style.css": ("style.css", "text/css")}  # fmt: skip
PUBLIC = (*FILES, "/health")  # what is seen without a token; nothing of it is about the models
# A page runs no script but its own, asks no server but its own, and stands in no other page's frame.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache", "x-content-type-options": "nosniff",
}  # fmt: skip


class Json(Response):
    """JSON in UTF-8. Half a surrogate pair, which a request may have brought, stays the escape that it was."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """The bytes of a JSON value."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class Running:
    """A request's job, seen from the event loop: what it found comes out of `found()`.

    A client that goes away stops it.
    """

    def __init__(self, worker: Worker, work: Work):
        self._loop, self._found = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.gone = False  # the client
        self.job: Job = worker.submit(work, self._deliver)

    def _deliver(self, found: Any) -> None:
        self._loop.call_soon_threadsafe(self._found.put_nowait, found)

    async def next(self) -> Any:
        """What the job found next, or DONE. Raises what ended it."""
        found = await self._found.get()
        if isinstance(found, Exception):
            raise found
        return found

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """While inside, a client that goes away stops the job."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.job.stop()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.job.stop()
        self._found.put_nowait(GoneError())


class Api:
    """The handlers of the routes, over models by name and one worker."""

    def __init__(self, served: Sequence[Served], worker: Worker):
        self.served = {one.name: one for one in served}
        self.worker = worker
        self.created = int(time.time())

    def routes(self) -> list[Route]:
        """Path -> handler."""
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/inside", self.inside, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            *(Route(path, self.page, methods=["GET"]) for path in FILES),
        ]

    async def models(self, request: Request) -> Response:
        """The models that there are."""
        return Json({"object": "list", "data": [self._about(one) for one in self.served.values()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return Json(self._about(self._named(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """Whether the server lives, and how many requests wait."""
        return Json({"status": "ok", "waiting": len(self.worker.waiting), "running": self.worker.running is not None})

    async def chat(self, request: Request) -> Response:
        """The answer to a conversation."""
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, chat=False)

    async def tokenizer_info(self, request: Request) -> Response:
        """The special tokens of the first model, as vLLM's route of this name gives them."""
        tokenizer = next(iter(self.served.values())).model.tokenizer
        named = {
            "eos_token": tokenizer.eos_token_id,
            "bos_token": tokenizer.bos_token_id,
            "pad_token": tokenizer.pad_token_id,
        }
        texts = {name: None if id is None else tokenizer.token_bytes(id).decode() for name, id in named.items()}
        return Json({"tokenizer_class": type(tokenizer).__name__, **texts})

    async def tokenize(self, request: Request) -> Response:
        """The ids of a prompt, or of a conversation in the family's layout."""
        ask, model = read_tokenize(await read_body(request))
        served = self._named(model) if model else next(iter(self.served.values()))
        (prompt,) = ask.prompts
        ids = await asyncio.to_thread(served.prompt if ask.chat else lambda _, text: served.encode(text), ask, prompt)
        return Json({"tokens": ids, "count": len(ids), "max_model_len": served.model.config.max_position_embeddings})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        ids, model = read_detokenize(await read_body(request))
        served = self._named(model) if model else next(iter(self.served.values()))
        return Json({"prompt": await asyncio.to_thread(served.decode, ids)})

    async def page(self, request: Request) -> Response:
        """A file of the chat page."""
        name, kind = FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    async def inside(self, request: Request) -> Response:
        """For the page: what a model does inside for the token behind a conversation and the beginning of an answer."""
        ask, answer = read_inside(await read_body(request))
        served = self._named(ask.model)

        def work(go_on: Callable[[], None]) -> Iterator[dict[str, Any]]:
            ids = [*served.prompt(ask, ask.prompts[0]), *answer]
            try:
                yield inside(served.model, ids, served.dtype, go_on)
            except InputError as error:
                raise RefusedError(400, str(error)) from None

        running = Running(self.worker, work)
        async with running.watched(request.receive):
            return Json(await running.next())

    async def _answer(self, request: Request, chat: bool) -> Response:
        ask = read_ask(await read_body(request), chat)
        served = self._named(ask.model)
        running = Running(self.worker, lambda go_on: served.answers(ask, go_on))
        layout = Layout(ask, served.model.tokenizer.token_bytes)
        if not ask.stream:
            async with running.watched(request.receive):
                return await whole(running, layout)
        try:
            first = await self._first(running, request)  # an error that shows before the first token has its own status
        except BaseException:
            running.job.stop()
            raise
        return Events(running, layout, first)

    async def _first(self, running: Running, request: Request) -> Any:
        """What a job found first; while it waits, a client that goes away stops it."""
        watch = asyncio.create_task(running._watch(request.receive))
        try:
            return await running.next()
        finally:
            watch.cancel()

    def _named(self, name: str) -> Served:
        if name not in self.served:
            known = ", ".join(self.served)
            raise RefusedError(
                404, f"there is no model {name!r:.80} here; there is {known}", "model", "model_not_found"
            )
        return self.served[name]

    def _about(self, one: Served) -> dict[str, Any]:
        config = one.model.config
        return {"id": one.name, "object": "model", "created": self.created, "owned_by": "refimpl", "about": one.about,
                "family": config.family, "max_model_len": config.max_position_embeddings}  # fmt: skip


async def whole(running: Running, layout: Layout) -> Response:
    """The answer in one piece."""
    choices: list[list[Piece]] = []
    prompts: dict[int, int] = {}
    writers: list[Writer] = []
    while (found := await running.next()) is not DONE:
        number, tokens, piece = found
        if isinstance(piece, Writer):
            choices.append([])
            writers.append(piece)
            prompts[number // layout.ask.choices] = tokens
        else:
            choices[-1].append(piece)
    return Json(layout.whole(choices, usage(sum(prompts.values()), spent(writers, layout.ask))))


def spent(writers: Sequence[Writer], ask: Ask) -> int:
    """The tokens of all answers; one that is only read costs none."""
    return 0 if ask.max_tokens == 0 else sum(writer.spent for writer in writers)


class Events(Response):
    """The answer as server-sent events, `data: {…}` each, and `data: [DONE]` at the end."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, layout: Layout, first: Any):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.running, self.layout, self.first = running, layout, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes events as the job finds pieces."""
        async with self.running.watched(receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in self._events():
                    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
            except GoneError:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        layout, found = self.layout, self.first
        prompts: dict[int, int] = {}
        writers: list[Writer] = []
        began = -1
        try:
            while found is not DONE:
                number, tokens, piece = found
                if isinstance(piece, Writer):
                    writers.append(piece)
                    prompts[number // layout.ask.choices] = tokens
                else:
                    yield to_json(layout.chunk(number, piece, first=number != began))
                    began = number
                found = await self.running.next()
            if layout.ask.usage:
                yield to_json(layout.last(usage(sum(prompts.values()), spent(writers, layout.ask))))
            yield b"[DONE]"
        except Exception as error:
            if self.running.gone:
                raise
            yield to_json(failed(error).body())  # the status is sent, so the error is an event


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises RefusedError for one that is too large, or compressed."""
    close = {"connection": "close"}
    too_large = RefusedError(413, f"the body is larger than {LARGEST} bytes", None, "request_too_large", close)
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RefusedError(415, f"the body is encoded as {encoding!r:.40}; send it plain", headers=close)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > LARGEST:
        raise too_large
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST:
            raise too_large
    return bytes(data)


def failed(error: Exception) -> RefusedError:
    """What a client is told of an error. What is nobody's fault but ours shows its traceback here, not there."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusyError):
        return RefusedError(503, str(error), None, "overloaded", {"retry-after": str(error.seconds)})
    if isinstance(error, GoneError):
        return RefusedError(503, "the server ends", None, "shutting_down", {"retry-after": "5"})
    if isinstance(error, InputError):  # of the computation: the request was in order
        return RefusedError(500, str(error))
    if isinstance(error, HTTPException):
        said = {404: "there is no such path here; the API is under /v1", 405: "this path takes another method"}
        return RefusedError(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)
    traceback.print_exception(error)
    return RefusedError(500, "an error of the server; its log has the details")


class Guarded:
    """An application behind a guard, all of whose errors have OpenAI's layout."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        begun = False

        async def sending(message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self.guard.check(Request(scope).headers, scope["path"] in PUBLIC)
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            return
        except Exception as error:
            if not begun:
                told = failed(error)
                await Json(told.body(), told.status, told.headers)(scope, receive, send)
            elif not isinstance(error, GoneError):
                raise


def application(served: Sequence[Served], worker: Worker, guard: Guard) -> ASGIApp:
    """The whole application."""
    app = Starlette(routes=Api(served, worker).routes(), exception_handlers={HTTPException: _http, Exception: _reraise})
    return Guarded(app, guard)


async def _http(request: Request, error: Exception) -> Response:
    told = failed(error)
    return Json(told.body(), told.status, told.headers)


async def _reraise(request: Request, error: Exception) -> Response:
    raise error
