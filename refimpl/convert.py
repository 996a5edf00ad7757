"""A checkpoint in any layout becomes safetensors: `refimpl convert SRC --out DST`.

What is written is what the weights read as, tile by tile, so that memory stays small whatever the size: as they are,
in another format, with NormHead applied, or with a LoRA adapter merged in. The same tensors and options give the same
files, byte for byte, however the source was stored; `conversion.json` says what that was, and `SHA256SUMS` has its sum.

Everything is made in `DST.part`, which becomes DST when it is complete. A conversion that was interrupted, or found the
disk full, goes on there where it stopped, if its options, its adapter's sha256 and the sizes and times of the source's
files are the same. The source is only read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kernels.ops import DTYPES
from refimpl.config import Config, read_config
from refimpl.errors import InputError
from refimpl.files import inside, read_json, sha256
from refimpl.lora import adapter_files, merge
from refimpl.weights import FLOATS, SAFETENSORS_DTYPES, NormHead, Weight, expected_shapes, read_checkpoint, resolve

SHARD_BYTES = 5_000_000_000
TILE_BYTES = 8 << 20
SUMS, REPORT, JOURNAL, LOCK = "SHA256SUMS", "conversion.json", "journal.json", "lock"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# Weights of any kind: they are what a conversion replaces. All other files go along as they are.
WEIGHT_FILES = (".bin", ".safetensors", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".part")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what its rows read as in `dtype`."""

    weight: Any
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.weight.shape) * self.dtype.itemsize

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order, a few MiB at a time."""
        rows = self.weight.shape[0]
        step = max(1, TILE_BYTES * rows // max(1, self.nbytes))
        for start in range(0, rows, step):
            block = self.weight.read(self.dtype, slice(start, start + step))
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def convert(
    source: str | Path, out: str | Path, dtype: str | None = None, shard_size: int | str = SHARD_BYTES,
    normalize_head: bool = False, lora: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the checkpoint in `source` as safetensors into the new folder `out`; gives what `conversion.json` says.

    `dtype`: "float32", "bfloat16" or "float16" for all parameters; as they are if not given. `shard_size`: bytes in
    a file at most, unless one tensor has more, such as 5_000_000_000 or "5GB". `lora`: the folder of a peft adapter
    to merge (`refimpl.lora`). The folder's other files are copied: not its subfolders, and of links those alone that
    stay in it or lead into Hugging Face's cache. `sha256sum -c SHA256SUMS` checks all that was written.

    `normalize_head` applies NormHead, so that what was made for Baichuan 1 runs a Baichuan2: each row of lm_head is
    divided by its length, in the format that is written, as the official README's script does in the format that it
    finds. In bfloat16 both the length and the quotient are rounded, and a row's length is 1 only to about 0.4 %
    (`row lengths` in the result); `dtype="float32"` keeps it to 1e-7. The config then says `lm_head_normalized`,
    which this package reads and checks; the official Baichuan2 code would normalise, and round, once more.

    Raises InputError for a source that cannot be loaded or leads elsewhere, an `out` that exists, cannot be written or
    is being written by another, numbers that a format cannot hold, and an adapter that is not understood.

    Source: the head as in README.md of baichuan-inc/Baichuan2, "migrating Baichuan 1 optimisations".
    """
    source, out = Path(source), Path(os.path.realpath(out))
    if source.resolve() in out.parents:
        raise InputError(f"{out} is inside {source}, which stays as it is; choose another place")
    config = read_config(source)
    tensors = read_checkpoint(source)
    resolve(config, tensors)  # everything is there and fits
    entries = _entries(config, tensors, dtype, normalize_head)
    if lora is not None:
        entries |= {
            name: Entry(weight, entries[name].dtype)
            for name, weight in merge(Path(lora), {name: entry.weight for name, entry in entries.items()}).items()
        }
    shards = _shards(entries, _bytes(shard_size))
    adapter = {path.name: sha256(path) for path in adapter_files(Path(lora))} if lora else None
    report: dict[str, Any] = {
        "family": config.family,
        "options": {"dtype": dtype, "normalize_head": normalize_head, "lora": adapter},
        "source": {path.name: path.stat().st_size for path in _files(source)},
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries.values()),
    }
    headers = {name: hashlib.sha256(_header(shard)).hexdigest() for name, shard in shards.items()}
    plan = {**report, "headers": headers, "changed": [path.stat().st_mtime_ns for path in _files(source)]}
    total = sum(map(_file_size, shards.values()))
    with _workplace(out, plan, total) as work:
        _copy_others(source, work)
        _write_config(source, work, dtype, normalize_head)
        sums = _write_shards(work, shards, total)
        if len(shards) > 1:
            places = {name: file for file, shard in shards.items() for name in shard}
            index = {"metadata": {"total_size": report["bytes"]}, "weight_map": places}
            _write_json(work / "model.safetensors.index.json", index)
        if normalize_head:
            report["row lengths"] = _row_lengths(entries["lm_head.weight"])
        _write_json(work / REPORT, report)
        sums |= {path.name: sha256(path) for path in _files(work) if path.name not in (*sums, JOURNAL, LOCK)}
        (work / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    return report


def _entries(config: Config, tensors: Mapping[str, Any], dtype: str | None, normalize_head: bool) -> dict[str, Entry]:
    """What is written of each tensor, in the model's own order: the same for every way in which it was stored."""
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    if normalize_head and not config.norm_head:
        raise InputError(f"this {config.family} has no NormHead to apply; leave --normalize-head out")
    order = {name: place for place, name in enumerate(expected_shapes(config))}
    entries = {}
    for name in sorted(tensors, key=lambda name: (order.get(name, len(order)), name)):
        array = tensors[name]
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS or not array.ndim:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise InputError(f"{name} is {found}, expected floats; is it quantized? convert what it was made of")
        # Buffers such as v1's rotary frequencies are no parameters, and are kept as exact as they are.
        wanted = DTYPES[dtype] if dtype and name in order else array.dtype
        head = normalize_head and name == "lm_head.weight"
        entries[name] = Entry((NormHead if head else Checked)(array), wanted)
    return entries


class Checked(Weight):
    """A weight that does not become infinite by being converted."""

    def _convert(self, values, dtype):
        with np.errstate(over="ignore"):
            converted = super()._convert(values, dtype)
        if converted.dtype != values.dtype and np.isinf(converted).any() and not np.isinf(values).any():
            largest = np.abs(values.astype(np.float64)).max()
            raise InputError(f"a weight of magnitude {largest:g} is beyond {dtype}; convert to bfloat16 or float32")
        return converted


def _bytes(size: int | str) -> int:
    """5_000_000_000 of that number or of "5GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).upper())
    number = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise InputError(f"the shard size is {size!r}, expected bytes such as 5GB, 500MB or 2GiB")
    return number


def _shards(entries: dict[str, Entry], limit: int) -> dict[str, dict[str, Entry]]:
    """The entries under the names of the files that hold them, cut in order."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(e.nbytes for e in shards[-1].values()) + entry.nbytes > limit:
            shards.append({})
        shards[-1][name] = entry
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{k:05}-of-{len(shards):05}.safetensors": shard for k, shard in enumerate(shards, 1)}


def _ordered(shard: dict[str, Entry]) -> dict[str, Entry]:
    """Wide numbers first, so that every tensor begins at a multiple of its numbers' size."""
    return dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))


def _header(shard: dict[str, Entry]) -> bytes:
    """The beginning of a safetensors file: its length in 8 bytes, and JSON filled up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    names = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
    at = 0
    for name, entry in _ordered(shard).items():
        shape, stop = list(entry.weight.shape), at + entry.nbytes
        header[name] = {"dtype": names[entry.dtype], "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _file_size(shard: dict[str, Entry]) -> int:
    return len(_header(shard)) + sum(entry.nbytes for entry in shard.values())


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


@contextmanager
def _workplace(out: Path, plan: dict[str, Any], total: int) -> Iterator[Path]:
    """The folder `OUT.part` with a journal of what is done, which becomes OUT when the block has written it.

    One of an earlier, equal conversion is taken up again. It stays if the block ends in any way but by an InputError,
    which would come again. Raises InputError in one line for whatever the file system says.
    """
    work = out.with_name(out.name + ".part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists already; choose another place or remove it")
        left = total - sum(file.stat().st_size for file in work.glob("*.safetensors"))
        disk = next(folder for folder in (work, *work.parents) if folder.exists())
        if shutil.disk_usage(disk).free < left:
            raise InputError(f"{left / 1e9:.1f} GB are to be written, but the disk of {out} has less; free some")
        work.mkdir(parents=True, exist_ok=True)
        with _alone(work):
            if not any(path.name != LOCK for path in work.iterdir()):
                _write_json(work / JOURNAL, {"plan": plan, "done": {}})
            elif not (work / JOURNAL).exists() or read_json(work / JOURNAL).get("plan") != plan:
                raise InputError(f"{work} was left by another conversion; remove it, or repeat that one")
            try:
                yield work
            except InputError:
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
    """Holds a folder against another conversion to it, until the block or the process ends."""
    with open(work / LOCK, "w") as file:
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


def _write_shards(work: Path, shards: dict[str, dict[str, Entry]], total: int) -> dict[str, str]:
    """Writes the shards that the journal does not have yet, and gives the sha256 of each."""
    journal = read_json(work / JOURNAL)
    done: dict[str, str] = journal["done"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as progress:
        for file, shard in shards.items():
            if file not in done or not (work / file).exists():
                done[file] = _write_shard(work / file, shard, progress)
                _write_json(work / JOURNAL, journal)
            else:
                progress.update(_file_size(shard))
    return dict(done)


def _write_shard(path: Path, shard: dict[str, Entry], progress: tqdm) -> str:
    """Writes one file under a temporary name, and gives its sha256, which another thread computes meanwhile."""
    digest, part = hashlib.sha256(), path.with_name(path.name + ".part")
    with ThreadPoolExecutor(1) as hashing, open(part, "wb", buffering=0) as file:
        pending = None
        for tile in _tiles(shard):
            if pending is not None:
                pending.result()  # no more than one tile waits
            pending = hashing.submit(digest.update, tile.data)
            view = tile.data
            while view:
                view = view[file.write(view) :]
            progress.update(len(tile))
        if pending is not None:
            pending.result()
        os.fsync(file.fileno())
    os.replace(part, path)
    return digest.hexdigest()


def _tiles(shard: dict[str, Entry]) -> Iterator[np.ndarray]:
    yield np.frombuffer(_header(shard), np.uint8)
    for name, entry in _ordered(shard).items():
        try:
            yield from entry.tiles()
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def _row_lengths(entry: Entry) -> list[float]:
    """The shortest and the longest row of the head as written, rows of zeros left out."""
    step = max(1, TILE_BYTES // entry.weight.shape[1])
    lengths = np.concatenate([
        np.linalg.norm(entry.weight.read(entry.dtype, slice(start, start + step)).astype(np.float64), axis=-1)
        for start in range(0, entry.weight.shape[0], step)
    ])  # fmt: skip
    lengths = lengths[lengths > 0]
    return [float(lengths.min(initial=1)), float(lengths.max(initial=1))]


def _copy_others(source: Path, work: Path) -> None:
    ours = {SUMS, REPORT, JOURNAL, LOCK, "config.json"}
    for name in (path.name for path in _files(source)):
        if not name.endswith(WEIGHT_FILES) and name not in ours and name[0] != ".":
            shutil.copyfile(inside(source, name), work / name)


def _write_config(source: Path, work: Path, dtype: str | None, normalize_head: bool) -> None:
    keys = read_json(source / "config.json")
    if dtype is not None:
        keys["dtype" if "dtype" in keys else "torch_dtype"] = dtype  # transformers 5 renamed it
    if normalize_head:
        keys["lm_head_normalized"] = True
    _write_json(work / "config.json", keys)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
