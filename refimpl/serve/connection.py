"""A connection that does not wait for ever: uvicorn's HTTP/1.1, with a limit of time on each side.

Whoever opens a connection has so many seconds to send a whole request, and whoever asks for text has so many to read
it. A connection that is late is closed, which stops its computation.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from refimpl.serve.asks import RefusedError

REQUEST_SECONDS = 30.0  # for a whole request to come
READ_SECONDS = 60.0  # for a client to read what waits for it


def with_limits(request_seconds: float = REQUEST_SECONDS, read_seconds: float = READ_SECONDS) -> type[H11Protocol]:
    """The class of connections with these limits."""

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self._await_request()
            else:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(read_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def send_400_response(self, msg: str) -> None:
            self._say(RefusedError(400, f"{msg} See the API's reference for what is expected."))

        def _await_request(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(request_seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
                self._say(RefusedError(408, f"the request did not come within {request_seconds:g} s"))
            else:
                self.transport.close()  # nothing of a request has come

        def _say(self, error: RefusedError) -> None:
            """Answers without the application, and closes."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                data = json.dumps(error.body()).encode()
                headers = [
                    ("content-type", "application/json"),
                    ("content-length", str(len(data))),
                    ("connection", "close"),
                ]
                for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=data),
                              h11.EndOfMessage()):  # fmt: skip
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Connection
