"""The command `refimpl`: one verb for each job.

Exit code 0: done, or the numbers agree. 1: they differ. 2: bad usage or bad input, reported in one line.

The command line stands above all packages: no other folder of refimpl imports golden or export.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import refimpl
from refimpl.cli.mapped import name_files_that_shrink
from refimpl.cli.options import stop_printing
from refimpl.cli.parsing import command_line
from refimpl.errors import InputError, Remark, one_line, visible


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    name_files_that_shrink()
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # None where they were closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show Chinese shows code points
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout.isatty() and "write" not in vars(
        sys.stdout
    ):  # a model may say anything, and names in files may hold anything
        sys.stdout.write = partial(_write_visible, sys.stdout.write)  # type: ignore[method-assign]
    try:
        arguments = command_line(refimpl.__version__).parse_args(argv)
        _expect_place()
        with warnings.catch_warnings():
            warnings.simplefilter("default", Remark)
            warnings.showwarning = partial(_show, warnings.showwarning)
            with _ending():
                code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"refimpl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refimpl: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # standard output failed; verbs turn errors about files into InputErrors
        if error.filename is not None:
            print(f"refimpl: cannot use {one_line(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return 2
        stop_printing()
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return 0
        print(f"refimpl: cannot print: {error.strerror}", file=sys.stderr)
        return 2


def _write_visible(write: Callable[[str], int], text: str) -> int:
    return write(visible(text))


def _nowhere() -> TextIO:
    return open(os.devnull, "w")  # it stays open as long as the process


@contextmanager
def _ending() -> Iterator[None]:
    """Lets a verb that gets SIGTERM remove what it has half made, as after Ctrl-C, and end with exit code 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _expect_place() -> None:
    """Raises InputError if the working directory was removed, because relative paths have no meaning then."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the working directory cannot be read: {error.strerror}; change to another one") from None


def _show(usual: Callable, message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Prints a remark as one line, and a library's warning as Python shows it."""
    if issubclass(category, Remark):
        print(f"refimpl: {one_line(str(message))}", file=sys.stderr)
    else:
        usual(message, category, *where)
