"""The ledger: what was sent to AI Hub and what came of it, in one file that a kill at any byte leaves readable.

    {"format": "refimpl hub ledger 1"}
    {"key": "5c0e…", "time": "2025-01-31T12:00:00Z", "kind": "model", "name": "prompt_ar16_cl64_1_of_3-5c0e…-9f2c"}
    {"key": "5c0e…", "time": "…", "id": "mqkyd9o2n"}

Each line is one fact. It is appended and synced before the work goes on, so the file never says less than what was
done. A key is the sha256 of what is sent and where to. An entry joins all lines with its key; later lines win. One line
says what is about to be sent, the next one its id. If a kill comes in between, the server is asked whether it has
something of that `name`, which is unique. A line that a kill cut off is dropped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from export.graphs.plan import Arrays
from refimpl.errors import InputError

FILE = "hub.jsonl"
LARGEST = 64 << 20  # bytes; a session of hundreds of jobs has some hundred thousand
FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "label", "name", "id", "state", "reason", "options", "device", "server", "target",
                     "target_key", "data", "expires", "file", "sha256"), str),
    **dict.fromkeys(("samples", "bytes"), int), **dict.fromkeys(("inputs", "outputs"), dict),
}  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

Entry = dict[str, Any]


class Ledger:
    """A folder's ledger. As a context it is locked and can be written: only one process writes at a time."""

    def __init__(self, folder: str | Path, file: str = FILE):
        self.path = Path(folder) / file
        self.format = f"refimpl {self.path.stem} ledger 1"
        self.entries: dict[str, Entry] = {}
        self._file: IO[bytes] | None = None
        self._whole = self._read()

    def _read(self) -> int:
        """Fills `entries`; returns how many bytes are whole lines. Raises InputError for another kind of file."""
        self.entries = {}
        try:
            if self.path.stat().st_size > LARGEST:
                raise InputError(f"{self.path} is larger than any ledger; move it away")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                fact = json.loads(line)
                good = fact == {"format": self.format} if number == 1 else sound(fact)
                if good and number > 1:
                    self.entries.setdefault(fact["key"], {}).update(fact)
                    good = {"kind", "label"} <= self.entries[fact["key"]].keys()
            except (ValueError, RecursionError):
                good = False
            if not good:
                raise InputError(
                    f"line {number} of {self.path} is damaged; mend it, or move the file away and begin anew"
                )
        return whole

    def get(self, key: str) -> Entry:
        """The facts known of a key; {} for a new one."""
        return self.entries.get(key, {})

    def write(self, key: str, **facts: Any) -> Entry:
        """Adds facts to an entry, and returns it once they are on disk."""
        line = {"key": key, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
        if not sound(line):  # a hostile server may answer anything
            raise InputError(f"AI Hub said of {self.get(key).get('label')} what no ledger holds: {line!a:.300}")
        self._append(line)
        entry = self.entries.setdefault(key, {})
        entry.update(line)
        return entry

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file, "a ledger is written while it is locked"
        try:
            data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; nothing is lost, make room and go on"
            ) from None

    def __enter__(self) -> Ledger:
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            lock(self._file)
            self._whole = self._read()
            self._file.truncate(self._whole)
            if not self._whole:
                self._append({"format": self.format})
        except BlockingIOError:
            self.__exit__()
            raise InputError(f"another process works on {self.path.parent}; wait until it is done") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()  # which unlocks
            self._file = None


def sound(fact: Any) -> bool:
    """Whether a line is well-formed: the fields that are read again have their types, and ids are plain."""
    if not isinstance(fact, dict) or not isinstance(fact.get("key"), str):
        return False
    if not all(isinstance(fact.get(name), (kind, type(None))) for name, kind in FIELDS.items()):
        return False
    if not all(value.isprintable() for value in fact.values() if isinstance(value, str)):  # a terminal shows them
        return False
    if not all(_ID.fullmatch(fact.get(name) or "-") for name in ("id", "target")):
        return False
    graphs = [graph for which in ("inputs", "outputs") for graph in (fact.get(which) or {}).values()]
    return all(isinstance(graph, list) and all(map(sound_tensor, graph)) for graph in graphs)


def sound_tensor(tensor: Any) -> bool:
    """Whether it is an input or output as a server describes it: name, dtype, shape, scale, zero point."""
    if not isinstance(tensor, list) or len(tensor) != 5:
        return False
    name, dtype, shape, *grid = tensor
    numbers = all(isinstance(number, (int, float, type(None))) for number in grid)
    return isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, (list, tuple, type(None))) and numbers


def lock(file: IO[bytes]) -> None:
    """Locks an open file until it is closed, or its process ends. Raises BlockingIOError if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(LARGEST)  # locked bytes cannot be read there, so those are beyond the end
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            raise BlockingIOError from None
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest(content: object) -> str:
    """The sha256 of content, written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def arrays_digest(samples: Sequence[Arrays]) -> str:
    """The sha256 of samples: names, order, dtypes, shapes and bytes."""
    return digest(
        [
            [name, str(a.dtype), list(a.shape), hashlib.sha256(np.ascontiguousarray(a).data).hexdigest()]
            for sample in samples
            for name, a in sample.items()
        ]
    )
