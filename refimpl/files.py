"""Reading files that may be damaged or hostile, and writing files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refimpl.errors import InputError

SMALL = 64 << 20  # bytes of a file that is read at once; the largest is Qwen2's tokenizer.json with 7 MB


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a small untrusted file. Raises InputError if it cannot be read, is a pipe or too big."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise InputError(f"{path} is not a file; expected one")
        if path.stat().st_size > limit:
            raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {limit}; is it another file?")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; is the path right?") from None


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The object in a small untrusted JSON file. Raises InputError if it is missing, too big or not an object."""
    try:
        value = json.loads(read_small(path, limit).decode())
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; is it cut short?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def inside(folder: Path, name: str) -> Path:
    """A folder's file, its links followed, which may lead into the `blobs` of the Hugging Face cache around it.

    Raises InputError if it is not a file, or if a link leads elsewhere: a downloaded folder must not read your disk.
    """
    path, home = (folder / name).resolve(), folder.resolve()
    caches = [above / "blobs" for above in home.parents if above.name.startswith("models--")]
    if path.parent not in (home, *caches) or not path.is_file():
        raise InputError(f"{folder / name} is not a file of this folder: it leads to {path}; put the file there")
    return path


def sha256(path: str | Path) -> str:
    """The hex digest of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_whole(path: str | Path, text: str) -> None:
    """Writes a file, whole or not at all. Raises InputError if it cannot be written."""
    write_all([(path, text)])


def write_all(texts: Iterable[tuple[str | Path, str]]) -> None:
    """Writes files, pairs of path and text, all of them or none. Raises InputError if one cannot be written."""
    made: dict[Path, Path] = {}
    path = Path()
    try:
        for path, text in ((Path(path), text) for path, text in texts):
            expect_writable([path, *made])
            made[path] = _beside(path)
            made[path].write_text(text, encoding="utf-8")
        for path, partial in made.items():
            partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        for partial in made.values():
            partial.unlink(missing_ok=True)


def expect_writable(paths: Iterable[str | Path]) -> None:
    """Raises InputError unless a file can be written at each path. Long work asks before it begins."""
    places = [Path(path).absolute() for path in paths]
    for path in places:
        problem = (
            "it is a folder" if path.is_dir() else f"{path.parent} is not a folder" if not path.parent.is_dir()
            else "permission denied" if not os.access(path.parent, os.W_OK | os.X_OK)
            else "two files would have this name" if places.count(path) > 1 else ""
        )  # fmt: skip
        if problem:
            raise InputError(f"cannot write {path}: {problem}; choose another place")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """`with whole_folder(out) as partial`: fill `partial`, which becomes `out` at the end.

    Raises InputError if it cannot be made or filled, and then leaves nothing.
    """
    partial = _beside(folder.resolve())
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for a file that is being written, which becomes `path` when it is whole.

    Raises InputError where it cannot be written, and leaves nothing then.
    """
    expect_writable([path])
    partial = _beside(path.absolute())
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
