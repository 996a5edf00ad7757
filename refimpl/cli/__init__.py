"""The command `refimpl`: one verb for each job.

Exit code 0: done, or the numbers agree. 1: they differ. 2: bad usage or bad input, told in one line. 130 and 143: ended
by Ctrl-C or SIGTERM; nothing half-written stays, but for what a repeated `refimpl convert` takes up again.

The command line stands above all packages, so in refimpl this folder alone imports golden and export, where used.
"""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import refimpl

from refimpl.cli import running, checkpoints, goldens, devices  # isort: skip  # noqa: F401  as the help lists them
from refimpl.cli.verbs import parser, stop_printing
from refimpl.errors import InputError, one_line


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Chinese shows its code points
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser(refimpl.__version__).parse_args(argv)
        with _terminable():
            code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("refimpl: interrupted", file=sys.stderr)
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except OSError as error:
        if error.filename is not None:
            print(f"refimpl: {one_line(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return 2
        stop_printing()  # it is of standard output
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return 0
        print(f"refimpl: cannot print: {error.strerror}", file=sys.stderr)
        return 2


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, with which schedulers and shells end a program, ends the block as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # no other may set it
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
