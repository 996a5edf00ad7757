"""Safetensors files, written tile by tile into a new folder: whole or not there, and resumed after an interruption.

Everything is written into `OUT.part`, which becomes OUT when it is complete. If work is interrupted or the disk is
full, the next run with the same plan goes on after the last complete file. Memory holds a few tiles, whatever the size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from refimpl.checkpoint.safetensors_files import DTYPES
from refimpl.errors import InputError, at_most
from refimpl.files import inside, read_json, sha256

SUMS, JOURNAL, LOCK, INDEX = "SHA256SUMS", "journal.json", "refimpl.lock", "model.safetensors.index.json"
MADE = {SUMS, JOURNAL, LOCK, "config.json", "conversion.json", "quantization.json"}  # made anew, never copied
ADAPTERS = "adapter_"  # how an adapter's files begin; none is copied, for half of it would be worse
TILE_BYTES = 8 << 20  # bytes that are read, converted, hashed and written at a time
WAITING = 8  # tiles that may wait for their hash
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# Files of weights, which are written anew. All other files of a checkpoint are copied.
WEIGHT_FILES = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".part")


class Entry(Protocol):
    """A tensor to be written."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order, a few MiB at a time."""


Shards = Mapping[str, Mapping[str, Entry]]  # a file's name -> its tensors


def size_of(entry: Entry) -> int:
    """How many bytes a tensor has."""
    return math.prod(entry.shape) * entry.dtype.itemsize


def byte_count(size: int | str) -> int:
    """A number of bytes from a number or a text such as "5GB", which is 5_000_000_000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).upper())
    number = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise InputError(f"the shard size is {size!r}, expected bytes such as 5GB, 500MB or 2GiB")
    return number


def cut(entries: Mapping[str, Entry], limit: int) -> dict[str, dict[str, Entry]]:
    """File name -> its entries, in order, each file with up to `limit` bytes of tensors."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(map(size_of, shards[-1].values())) + size_of(entry) > limit:
            shards.append({})
        shards[-1][name] = entry
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{k:05}-of-{len(shards):05}.safetensors": shard for k, shard in enumerate(shards, 1)}


def _ordered(shard: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries in an order in which every tensor begins at a multiple of its numbers' size.

    That is their own order if possible, which keeps the parts of a quantized matrix together; else wide numbers first.
    """
    at = 0
    for entry in shard.values():
        if at % entry.dtype.itemsize:
            break
        at += size_of(entry)
    else:
        return dict(shard)
    return dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))


def _header(shard: Mapping[str, Entry]) -> bytes:
    """The beginning of a safetensors file: the length of its JSON in 8 bytes, and the JSON, padded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    at = 0
    for name, entry in _ordered(shard).items():
        shape, stop = list(entry.shape), at + size_of(entry)
        header[name] = {"dtype": names[entry.dtype], "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _file_size(shard: Mapping[str, Entry]) -> int:
    return len(_header(shard)) + sum(map(size_of, shard.values()))


def files_of(folder: Path) -> list[Path]:
    """The files of a folder in the order of their names, without its subfolders."""
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Name -> size, time and number of each file of a folder: what changes when a file does."""
    stats = {path.name: path.stat() for path in files_of(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def expect_unchanged(folder: Path, before: Mapping[str, tuple[int, int, int]]) -> None:
    """Raises InputError if the files of a folder are not those of `before` (see `stamps`).

    Files are mapped and read bit by bit. If one changes meanwhile, the result mixes its old and its new content.
    """
    after = stamps(folder)
    if changed := sorted(name for name in {**before, **after} if before.get(name) != after.get(name)):
        raise InputError(f"{folder} has changed while it was read: {at_most(changed, 3)}; repeat when it is complete")


@contextmanager
def workplace(out: Path, shards: Shards, about: Mapping[str, Any], resumable: bool = True) -> Iterator[Path]:
    """The folder `OUT.part`, with a journal of the files that are done. It becomes OUT when the block ends.

    A folder that earlier work left is used again if its shards and `about` are the same; `about` is all else that the
    shards depend on. If the block fails, the folder stays for the next run. It is removed after an InputError, which
    would come again, and if the work is not `resumable`. Raises InputError for every error of the file system.
    """
    headers = {name: hashlib.sha256(_header(shard)).hexdigest() for name, shard in shards.items()}
    plan = json.loads(json.dumps({**about, "headers": headers}))
    total = sum(map(_file_size, shards.values()))
    try:
        if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise InputError(f"{out} exists already; choose another place or remove it")
        work = out.with_name(out.name + ".part")
        # Files of an earlier run, even half ones, are kept or written over, so they need no new room.
        left = total - sum(file.stat().st_size for end in ("", ".part") for file in work.glob(f"*.safetensors{end}"))
        disk = next(folder for folder in (work, *work.parents) if folder.exists())
        if (free := shutil.disk_usage(disk).free) < left:
            sizes = f"{left / 1e9:.3g} GB are to be written, but the disk of {out} has {free / 1e9:.3g}"
            raise InputError(f"{sizes}; free some")
        work.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in work.iterdir()}
        if found - {LOCK} and JOURNAL not in found:
            raise InputError(
                f"{work} was not left by a conversion, but this one needs the name; move it, or choose another place"
            )
        with _alone(work):
            if not (work / JOURNAL).exists():
                write_json(work / JOURNAL, {"plan": plan, "done": {}})
            elif read_json(work / JOURNAL).get("plan") != plan:
                raise InputError(f"{work} was left by another conversion; remove it, or repeat that one")
            try:
                yield work
            except BaseException as error:
                if isinstance(error, InputError) or not resumable:
                    shutil.rmtree(work)
                raise
            (work / JOURNAL).unlink()
            (work / LOCK).unlink()
            os.replace(work, out)
    except OSError as error:
        where = f" ({error.filename})" * bool(error.filename)
        raise InputError(f"cannot make {out}: {error.strerror}{where}; mend that and repeat, no work is lost") from None


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Locks a folder against other conversions, until the block or the process ends."""
    with open(work / LOCK, "a") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), os.stat(work / LOCK))
        except BlockingIOError:
            held = False
        except ImportError:
            held = True
        if not held:
            raise InputError(f"another conversion is writing {work}; wait for it, or choose another place")
        yield


def write_shards(work: Path, shards: Shards, verb: str) -> dict[str, str]:
    """Writes the shards that the journal does not list, and an index if there are several; returns their sha256.

    `verb` stands beside the progress.
    """
    journal = read_json(work / JOURNAL)
    done: dict[str, str] = journal["done"]
    total = sum(map(_file_size, shards.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc=verb, disable=None) as progress:
        for file, shard in shards.items():
            if (work / file).exists() and sha256(work / file) == done.get(file):
                progress.update(_file_size(shard))
            else:
                done[file] = _write_shard(work / file, shard, progress)
                write_json(work / JOURNAL, journal)
    if len(shards) > 1:
        places = {name: file for file, shard in shards.items() for name in shard}
        held = sum(size_of(entry) for shard in shards.values() for entry in shard.values())
        write_json(work / INDEX, {"metadata": {"total_size": held}, "weight_map": places})
    return dict(done)


def _write_shard(path: Path, shard: Mapping[str, Entry], progress: tqdm) -> str:
    """Writes one file, under a temporary name first. Returns its sha256, which another thread computes."""
    digest, part = hashlib.sha256(), path.with_name(path.name + ".part")
    with ThreadPoolExecutor(1) as hashing, open(part, "wb", buffering=0) as file:
        pending: deque[Future] = deque()
        for tile in _tiles(shard):
            if len(pending) == WAITING:
                pending.popleft().result()
            pending.append(hashing.submit(digest.update, tile.data))
            view = tile.data
            while view:
                view = view[file.write(view) :]
            progress.update(len(tile))
        for hashed in pending:
            hashed.result()
        os.fsync(file.fileno())
    os.replace(part, path)
    return digest.hexdigest()


def _tiles(shard: Mapping[str, Entry]) -> Iterator[np.ndarray]:
    yield np.frombuffer(_header(shard), np.uint8)
    for name, entry in _ordered(shard).items():
        try:
            yield from entry.tiles()
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def copy_others(source: Path, work: Path) -> None:
    """Copies a checkpoint's other files, without subfolders and without an adapter that lies beside the weights.

    Raises InputError for a link that leads out of the folder and its cache.
    """
    for name in (path.name for path in files_of(source)):
        if not name.endswith(WEIGHT_FILES) and name not in MADE and not name.startswith((".", ADAPTERS)):
            shutil.copyfile(inside(source, name), work / name)


def write_sums(work: Path, sums: Mapping[str, str]) -> None:
    """Writes SHA256SUMS, which `sha256sum -c` checks. The sums of shards are given, the others computed."""
    rest = {path.name: sha256(path) for path in files_of(work) if path.name not in (*sums, JOURNAL, LOCK)}
    every = {**sums, **rest}
    (work / SUMS).write_text("".join(f"{every[name]}  {name}\n" for name in sorted(every)))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
