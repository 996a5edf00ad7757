"""Reading files that may be damaged or hostile, and writing files whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SMALL = 64 << 20  # bytes of a file that is read at once; the largest is Qwen2's tokenizer.json with 7 MB
VALUES = (
    1_000_000  # values in a JSON file, each of which takes about 200 bytes of memory; Qwen2's tokenizer has 600,000
)
MOMENT = 60  # seconds between the making of a file and its locking, at most
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


def read_text(path: Path, limit: int = SMALL) -> str:
    """The text of a UTF-8 file, or of a pipe. Raises InputError if it cannot be read, is no UTF-8 or is too long.

    Not more than `limit` bytes are read, because a device such as /dev/zero has no end.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{path} has more than {limit} bytes of text; cut it: head -c {limit} {path}")
        expect_content(path, data)
        return data.decode()
    except OSError as error:
        raise InputError(cannot_read(path, error)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}; convert it with iconv") from None


def cannot_read(path: Path, error: OSError) -> str:
    """The error message about a file that cannot be read: what the system says, and what to do.

    >>> cannot_read(Path("config.json"), PermissionError(13, "Permission denied"))
    'cannot read config.json: Permission denied; ask its owner for permission, or see chmod +r'
    """
    denied = isinstance(error, PermissionError)
    advice = "ask its owner for permission, or see chmod +r" if denied else "is the path right?"
    return f"cannot read {path}: {error.strerror or error}; {advice}"


def cannot_write(path: Path, error: OSError) -> str:
    """The error message about a file or folder that cannot be written: what the system says, and what to do."""
    advice = "free some space" if error.errno == errno.ENOSPC else "choose another place"
    return f"cannot write {path}: {error.strerror or error}; {advice}"


def expect_content(path: Path, beginning: bytes) -> None:
    """Raises InputError if a file begins as git-lfs's pointer to a large file that has not been fetched."""
    if beginning.startswith(LFS):
        raise InputError(f"{path} is only git-lfs's pointer to the file; fetch it: git lfs pull, in its folder")


def read_json(path: Path, limit: int = SMALL, values: int = VALUES) -> dict[str, Any]:
    """The object in a small untrusted JSON file. Raises InputError if it is missing, too big or not an object."""
    try:
        value = parse_json(read_small(path, limit), values)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}; is it cut short, or was it edited?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes, values: int = VALUES) -> Any:
    """The value of untrusted JSON. Raises ValueError for anything else, and for an object that has a key twice.

    Readers differ in which of the two values they take, so such a file is ambiguous. JSON that may hold more than
    `values` values is refused before it is parsed, because a few bytes of it become a hundred of memory.
    """
    if (most := sum(map(data.count, (b",", b"[", b"{")))) > values:
        raise ValueError(f"it may hold {most} values, expected at most {values}")
    return json.loads(data.decode(), object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
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
    files = [(Path(path), text) for path, text in texts]
    expect_writable(path for path, _ in files)
    with ExitStack() as stack:
        partials = [stack.enter_context(replacing(path)) for path, _ in files]
        for partial, (path, text) in zip(partials, files, strict=True):
            try:
                partial.write_text(text, encoding="utf-8")
            except OSError as error:
                raise InputError(cannot_write(path, error)) from None


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all. Raises InputError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial, dict(about) if about else None)
    except SafetensorError as error:  # what the library makes of a full disk
        raise InputError(f"cannot write {path}: {error}; free some space") from None


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
    try:
        with filling(folder) as partial:
            yield partial
            partial.rename(folder)
    except OSError as error:
        raise InputError(cannot_write(folder, error)) from None


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which is removed at the end unless it was renamed meanwhile."""
    partial = _beside(folder.resolve())
    try:
        partial.mkdir(parents=True)
        with _held(partial):
            yield partial
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
        partial.touch()
        with _held(partial):
            yield partial
            partial.replace(path)
    except OSError as error:
        raise InputError(cannot_write(path, error)) from None
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(partial: Path, folder: Path, kept: Iterable[str], expect_free: Callable[[], None]) -> None:
    """Puts `partial` in the place of `folder`, whose files and folders called `kept` move into it.

    `expect_free` raises if `folder` may not be replaced. It is asked while no other run of this function replaces
    anything there, because somebody else may have written the folder meanwhile. A run that is killed in here is undone
    or finished by `settle`.
    """
    with _held(folder.parent, wait=True):
        _settle(folder, kept)
        expect_free()
        try:
            if folder.exists():
                folder.rename(_replaced(folder))
            partial.rename(folder)
        finally:
            _settle(folder, kept)


def settle(folder: Path, kept: Iterable[str]) -> None:
    """Undoes a `replace_folder` that was killed before the new folder was in its place, or else finishes it."""
    if _replaced(folder).exists():
        with _held(folder.parent, wait=True):
            _settle(folder, kept)


def _settle(folder: Path, kept: Iterable[str]) -> None:
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    elif replaced.exists():
        for name in kept:
            if (replaced / name).exists() and not (folder / name).exists():
                (replaced / name).rename(folder / name)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _beside(path: Path) -> Path:
    """The name of a file or folder that will become `path`. What killed runs left there is removed."""
    for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
        _remove_unless_held(left)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _remove_unless_held(left: Path) -> None:
    """Removes what a killed run left. Another run that is at work holds its own, or has made it just now."""
    try:
        if time.time() - left.stat().st_mtime < MOMENT:
            return
        with _held(left):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError:  # held, or removed by another run
        pass


@contextmanager
def _held(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a file or folder, as long as the process lives. Raises BlockingIOError if another holds it, or waits."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks: there, killed runs leave what they wrote
        yield
        return
    place = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(place)
