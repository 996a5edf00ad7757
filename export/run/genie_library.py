"""The code that runs beside Qualcomm's Genie in a separate process: the C API of libGenie through ctypes.

`genie.py` asks for these jobs. One dialog at a time is open, and it keeps its conversation until `reset`.

**Source**: QAIRT SDK, `include/Genie/GenieDialog.h`, `GenieTokenizer.h`, `GenieAccuracy.h`, `GenieLog.h` and the Genie
documentation, "Dialog JSON configuration" (docs.qualcomm.com, 80-63442-100).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from export.run.library import library
from refimpl.errors import InputError, one_line

# Genie_Status_t: what a call that fails returns; 0 is success.
STATUS = {1: "warning: aborted", 2: "warning: the bound handle is not used", 3: "warning: paused",
          4: "warning: the context is exceeded", -1: "general error", -2: "invalid argument", -3: "no memory",
          -4: "invalid configuration", -5: "invalid handle", -6: "query failed", -7: "JSON format", -8: "JSON schema",
          -9: "JSON value", -10: "the context limit is exceeded or generation failed"}  # fmt: skip
CONTEXT_EXCEEDED = 4
COMPLETE = 0  # GENIE_DIALOG_SENTENCE_COMPLETE: a whole query
ERROR, LOUD = 1, 2  # levels of GenieLog: an error; and the level asked for, which includes warnings

ALLOCATE = CFUNCTYPE(None, c_size_t, POINTER(c_void_p))
ON_TEXT = CFUNCTYPE(None, c_char_p, c_int32, c_void_p)
ON_LOG = CFUNCTYPE(None, c_void_p, c_char_p, c_uint32, c_uint64, c_void_p)

_SIGNATURES: dict[str, list[Any]] = {
    "GenieLog_create": [c_void_p, ON_LOG, c_uint32, POINTER(c_void_p)],
    "GenieDialogConfig_createFromJson": [c_char_p, POINTER(c_void_p)],
    "GenieDialogConfig_bindLogger": [c_void_p, c_void_p],
    "GenieDialogConfig_free": [c_void_p],
    "GenieDialog_create": [c_void_p, POINTER(c_void_p)],
    "GenieDialog_free": [c_void_p],
    "GenieDialog_reset": [c_void_p],
    "GenieDialog_setMaxNumTokens": [c_void_p, c_uint32],
    "GenieDialog_query": [c_void_p, c_char_p, c_int32, ON_TEXT, c_void_p],
    "GenieDialog_getTokenizer": [c_void_p, POINTER(c_void_p)],
    "GenieTokenizer_encode": [c_void_p, c_char_p, ALLOCATE, POINTER(POINTER(c_int32)), POINTER(c_uint32)],
    "GenieTokenizer_decode": [c_void_p, POINTER(c_int32), c_uint32, ALLOCATE, POINTER(c_char_p)],
    "GenieAccuracyConfig_createFromJson": [c_char_p, POINTER(c_void_p)],
    "GenieAccuracy_createFromDialog": [c_void_p, c_void_p, POINTER(c_void_p)],
    "GenieAccuracy_compute": [c_void_p, ALLOCATE, POINTER(c_char_p)],
}


class _Genie:
    """The loaded library, its log, and the dialog that is open."""

    def __init__(self, printed: Path) -> None:
        path, self.printed = library("Genie"), printed
        try:
            self.functions = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise InputError(f"cannot load {path.name}: {error}; install onnxruntime-qnn again") from None
        for name, arguments in _SIGNATURES.items():
            getattr(self.functions, name).argtypes = arguments
        self.libc = ctypes.CDLL(None)
        self.errors: list[str] = []
        self.on_log = ON_LOG(self._log)
        self.log, self.dialog = c_void_p(), c_void_p()
        self.call("GenieLog_create", None, self.on_log, LOUD, byref(self.log))
        self.kept: list[Any] = []
        self.allocate = ALLOCATE(self._allocate)

    def _log(self, handle: Any, form: bytes, level: int, stamp: int, arguments: Any) -> None:
        text = ctypes.create_string_buffer(4096)
        self.libc.vsnprintf(text, c_size_t(4096), c_char_p(form), c_void_p(arguments))
        line = one_line(text.value.decode("utf-8", "replace").strip())
        if level == ERROR and line:
            self.errors.append(line)

    def _allocate(self, size: int, pointer: Any) -> None:
        buffer = ctypes.create_string_buffer(size + 1)
        self.kept.append(buffer)
        pointer[0] = ctypes.addressof(buffer)

    def call(self, name: str, *arguments: Any) -> int:
        """Calls a function. Raises InputError if it fails, with the errors that Genie logged, and what it printed."""
        self.errors, start = [], self.printed.stat().st_size
        status = getattr(self.functions, name)(*arguments)
        if status < 0:
            with open(self.printed, "rb") as file:
                file.seek(start)
                lines = file.read().decode("utf-8", "replace").splitlines()
            said = [line.strip(" -") for line in lines]
            printed = [one_line(line) for line in said if line and line[0] not in "<\x1b#["]
            reason = "; ".join(dict.fromkeys([*self.errors[-2:], *printed[-2:]]))
            raise InputError(f"{name} says {STATUS.get(status, status)}{f': {reason}' if reason else ''}")
        return status


_open: list[_Genie] = []


def _genie(folder: Path) -> _Genie:
    if not _open:
        _open.append(_Genie(folder / "printed.txt"))
    return _open[0]


def open_dialog(folder: Path, bundle: str, config: str) -> dict[str, Any]:
    """Opens a dialog in a bundle's folder by its configuration, JSON text. Closes the one before."""
    genie, started = _genie(folder), time.perf_counter()
    os.chdir(bundle)
    if genie.dialog:
        genie.call("GenieDialog_free", genie.dialog)
        genie.dialog = c_void_p()
    made = c_void_p()
    genie.call("GenieDialogConfig_createFromJson", config.encode(), byref(made))
    genie.call("GenieDialogConfig_bindLogger", made, genie.log)
    genie.call("GenieDialog_create", made, byref(genie.dialog))
    version = [getattr(genie.functions, f"Genie_getApi{part}Version")() for part in ("Major", "Minor", "Patch")]
    return {"version": ".".join(map(str, version)), "seconds": time.perf_counter() - started}


def query(folder: Path, text: str, limit: int) -> Iterator[dict[str, Any]]:
    """Sends a text, and yields each piece of the answer as it comes."""
    genie = _genie(folder)
    genie.call("GenieDialog_setMaxNumTokens", genie.dialog, limit)

    def ask(say: Any) -> int:
        on_text = ON_TEXT(lambda piece, code, data: say({"text": list(piece or b"")}))
        return genie.call("GenieDialog_query", genie.dialog, text.encode(), COMPLETE, on_text, None)

    return (yield from _streamed(ask))


def _streamed(ask: Any) -> Iterator[dict[str, Any]]:
    """Runs a call in a thread, and yields what it says through its callback, message by message; returns the answer."""
    import queue
    import threading

    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def run() -> None:
        started = time.perf_counter()
        try:
            status = ask(messages.put)
            messages.put({"end": {"full": status == CONTEXT_EXCEEDED, "seconds": time.perf_counter() - started}})
        except Exception as error:  # raised again where the job is
            messages.put({"end": error})

    threading.Thread(target=run, daemon=True).start()
    while True:
        message = messages.get()
        if "end" not in message:
            yield message
            continue
        if isinstance(message["end"], Exception):
            raise message["end"]
        return message["end"]


def reset(folder: Path) -> dict[str, Any]:
    """Forgets the conversation."""
    genie = _genie(folder)
    genie.call("GenieDialog_reset", genie.dialog)
    return {}


def encode(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Token ids of texts by Genie's tokenizer."""
    genie, tokenizer = _genie(folder), c_void_p()
    genie.call("GenieDialog_getTokenizer", genie.dialog, byref(tokenizer))
    found = []
    for text in texts:
        ids, count = POINTER(c_int32)(), c_uint32()
        genie.call("GenieTokenizer_encode", tokenizer, text.encode(), genie.allocate, byref(ids), byref(count))
        found.append([ids[i] for i in range(count.value)])
        genie.kept.clear()
    return {"ids": found}


def accuracy(folder: Path, config: str) -> dict[str, Any]:
    """Genie's accuracy on a dataset, as its own JSON text."""
    genie = _genie(folder)
    made, handle, result = c_void_p(), c_void_p(), c_char_p()
    genie.call("GenieAccuracyConfig_createFromJson", config.encode(), byref(made))
    genie.call("GenieAccuracy_createFromDialog", made, genie.dialog, byref(handle))
    genie.call("GenieAccuracy_compute", handle, genie.allocate, byref(result))
    text = genie.kept[-1].value.decode("utf-8", "replace") if genie.kept else ""
    genie.kept.clear()
    return {"json": text}


JOBS = {"open": open_dialog, "query": query, "reset": reset, "encode": encode,
        "accuracy": accuracy}  # fmt: skip
