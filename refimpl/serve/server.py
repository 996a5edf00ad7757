"""Sockets, uvicorn, Ctrl-C: an application served until somebody ends it."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from refimpl.errors import InputError
from refimpl.serve.app import application
from refimpl.serve.connection import READ_SECONDS, REQUEST_SECONDS, with_limits
from refimpl.serve.guard import Guard
from refimpl.serve.served import Served
from refimpl.serve.worker import Worker

CONNECTIONS = 256  # at a time


class Server(uvicorn.Server):
    """uvicorn's server, which stops the computations when it is asked to end."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends at the next token. Once more ends at once."""
        self.force_exit: bool = bool(self.should_exit)
        self.should_exit: bool = True
        self.worker.stop()


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one. Raises InputError if the address is unknown or taken."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        taken = getattr(error, "errno", 0) == errno.EADDRINUSE
        advice = "another program serves there: choose another --port" if taken else "choose another --host or --port"
        raise InputError(
            f"cannot serve at {host} port {port}: {getattr(error, 'strerror', None) or error}; {advice}"
        ) from None
    return found


def serve(
    served: Sequence[Served], host: str = "127.0.0.1", port: int = 8000, token: str | None = None, waiting: int = 32,
    request_seconds: float = REQUEST_SECONDS, read_seconds: float = READ_SECONDS,
) -> None:  # fmt: skip
    """Serves models until SIGINT or SIGTERM. The first line that it prints has the address.

    `waiting`: how many requests may wait. Raises InputError for an address that cannot be served at.
    """
    guard = Guard(host, token)
    bound = listening(host, port)
    worker = Worker(waiting)
    config = uvicorn.Config(
        application(served, worker, guard), http=with_limits(request_seconds, read_seconds), ws="none",
        lifespan="off", access_log=False, log_level="error", limit_concurrency=CONNECTIONS, server_header=False,
        timeout_graceful_shutdown=5, proxy_headers=False,
    )  # fmt: skip
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    name = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(one.name for one in served)} at http://{name}:{bound.getsockname()[1]} (Ctrl-C ends it)",
          flush=True)  # fmt: skip
    try:
        asyncio.run(Server(config, worker).serve(sockets=[bound]))
    finally:
        worker.close()
        bound.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    print("ended")
