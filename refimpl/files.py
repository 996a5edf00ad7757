"""Reading files that may be damaged or hostile, and writing files whole or not at all."""

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
LFS = b"version https://git-lfs.github.com/spec/"  # the first bytes of the pointer that git-lfs puts in a file's place


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a small untrusted file. Raises InputError if it cannot be read, is a pipe or too big."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise InputError(f"{path} is not a file; expected one")
        if path.stat().st_size > limit:
            raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {limit}; is it another file?")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(cannot_read(path, error)) from None
    expect_content(path, data)
    return data


def cannot_read(path: Path, error: OSError) -> str:
    """The error message about a file that cannot be read: what the system says, and what to do.

    >>> cannot_read(Path("config.json"), PermissionError(13, "Permission denied"))
    'cannot read config.json: Permission denied; ask its owner for permission, or see chmod +r'
    """
    denied = isinstance(error, PermissionError)
    advice = "ask its owner for permission, or see chmod +r" if denied else "is the path right?"
    return f"cannot read {path}: {error.strerror or error}; {advice}"


def expect_content(path: Path, beginning: bytes) -> None:
    """Raises InputError if a file begins as git-lfs's pointer to a large file that has not been fetched."""
    if beginning.startswith(LFS):
        raise InputError(f"{path} is only git-lfs's pointer to the file; fetch it: git lfs pull, in its folder")


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The object in a small untrusted JSON file. Raises InputError if it is missing, too big or not an object."""
    try:
        value = parse_json(read_small(path, limit))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}; is it cut short, or was it edited?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes) -> Any:
    """The value of untrusted JSON. Raises ValueError for anything else, and for an object that has a key twice.

    Readers differ in which of the two values they take, so such a file is ambiguous.
    """
    return json.loads(data.decode(), object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!a:.80} twice")
    return found


def inside(folder: Path, name: str) -> Path:
    """The path of a folder's file, links followed. They may lead into the `blobs` of the Hugging Face cache around it.

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
