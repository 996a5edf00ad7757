"""What happens if a mapped file becomes shorter while it is read.

The weights are mapped, so that a model needs no more memory than it reads. If another program cuts such a file, or its
disk fails, the next access is no exception: the system sends SIGBUS, which ends Python without a word. Here it says
which file that was, and ends with exit code 2.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

ADDRESS = 16  # bytes before si_addr in a siginfo_t of 64-bit Linux
SA_SIGINFO = 4
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on 64-bit Linux."""

    _fields_ = (
        ("handler", Handler), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
    )  # fmt: skip


def name_files_that_shrink() -> None:
    """From here on, a mapped file that is cut ends the process with one line. Only 64-bit Linux offers that."""
    if sys.platform == "linux" and sys.maxsize > 1 << 32:
        action = Action(handler=_told, flags=SA_SIGINFO)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)


@Handler
def _told(number: int, info: int, context: int) -> None:
    """Runs inside the signal. Nothing can go on after it, because the same access would fail again."""
    address = ctypes.c_void_p.from_address(info + ADDRESS).value or 0
    line = (
        f"refimpl: {_file_at(address)} became shorter while it was read, or its disk failed; "
        "wait until nothing writes it, copy it again, and start anew\n"
    )
    os.write(2, line.encode(errors="backslashreplace"))
    os._exit(2)


def _file_at(address: int) -> str:
    """The path of the file that is mapped at an address."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            place, *_, path = line.rstrip("\n").split(maxsplit=5)
            start, stop = (int(end, 16) for end in place.split("-"))
            if start <= address < stop:
                return path
    return "a file"
