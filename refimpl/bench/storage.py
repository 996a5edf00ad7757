"""How fast a checkpoint is quantized, compared with a plain copy; and how fast a quantized one is opened.

`quantize` reads a synthetic checkpoint on disk, in bfloat16 and in the true shapes of Baichuan2-7B, with as many layers
as are asked for. In turns, each from a cold page cache to synced files:

- `copy`: every file, as `shutil.copyfile` does it
- `quantize`: `refimpl.blocks.save.quantize_checkpoint`, the format's own way
- `search`: the same with a search for the scales of least squared error, if the format has one
- `quantize, cores`, `search, cores`: the same arithmetic on all cores, from pages that are warm, and nothing written

No quantizer can be faster than the copy or than its arithmetic. The slower of the two binds, and the table says how
much of its speed is reached.

`load` opens a quantized folder in Q4_0. `open` is `refimpl.load`, `token` the first token after it, each with a cold
and with a warm page cache; `read` reads every byte of the warm files once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.bench.race import Timing, synthetic
from refimpl.blocks.quantize import Scheme, plan, quantizing
from refimpl.blocks.save import quantize_checkpoint, save
from refimpl.checkpoint import shards
from refimpl.checkpoint.doctor import HEADS, KEYS, OFFICIAL
from refimpl.checkpoint.folder import Checkpoint
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import config_from_keys
from refimpl.errors import InputError
from refimpl.model import load
from refimpl_kernels.formats.table import FORMATS

BLOCK_BYTES = 64 << 20  # random numbers that are repeated


@dataclass(frozen=True)
class Repeated:
    """A bfloat16 tensor to be written: one block of numbers again and again."""

    shape: tuple[int, ...]
    block: np.ndarray
    start: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def tiles(self) -> Iterator[np.ndarray]:
        """Its bytes in order."""
        at, left = self.start, shards.size_of(self)
        while left:
            tile = self.block[at : at + left]
            yield tile
            at, left = 0, left - len(tile)


def run(what: str, layers: int, rounds: int, threads: int, format: str = "q4_0") -> dict:
    """The facts of `quantize` or `load`: seconds of each row, bytes, and the peak of anonymous memory.

    If other work shares the machine, the cores' seconds say more than the clock.

    Raises InputError for fewer than one round, layer or thread, and for a disk that is too small.
    """
    if rounds < 1 or layers < 1 or threads < 1:
        raise InputError("rounds, layers and threads are numbers from 1")
    with tempfile.TemporaryDirectory() as place:
        if what == "load":
            return _load(Path(place), layers, rounds)
        return _quantize(Path(place), layers, rounds, threads, format)


def show(facts: dict) -> str:
    """The facts as a table."""
    lines = [f"Baichuan2-7B with {facts['layers']} of 32 layers, {facts['bytes'] / 1e9:.2f} GB, {facts['of']}"]
    for row in facts["rows"]:
        times = f"   {row['times']:6.3f} x {facts['reference']}" if "times" in row else ""
        rate = f"   {row['gigabytes_per_second']:6.2f} GB/s" if "gigabytes_per_second" in row else ""
        seconds = f"{row['seconds']:8.3f} s ({row['fastest']:.3f} - {row['slowest']:.3f})"
        binds = f"   {row['reached']:.0%} of {row['binds']}, which binds" if "binds" in row else ""
        lines.append(f"{row['name']:15} {seconds}   {row['cpu_seconds']:7.3f} s of a core{rate}{times}{binds}")
    if "peak_memory" in facts:
        lines.append(f"quantizing takes {facts['peak_memory'] / 1e6:.0f} MB of memory at most, beside mapped files")
    return "\n".join(lines)


@dataclass
class Timed(Timing):
    """The seconds that something took, by the clock and of this process's cores, round by round."""

    cpu: list[float] = field(default_factory=list)

    def time(self, once: Callable[[], Any]) -> Any:
        """Calls `once`, takes the time, and returns what it gives."""
        start, busy = time.perf_counter(), time.process_time()
        result = once()
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - busy)
        return result


def _facts(rows: dict[str, Timed], reference: str, nbytes: dict[str, int]) -> list[dict[str, Any]]:
    found = []
    for name, row in rows.items():
        middle = float(np.median(row.seconds))
        one = {"name": name, "seconds": middle, "fastest": min(row.seconds), "slowest": max(row.seconds)}
        one["cpu_seconds"] = float(np.median(row.cpu))
        if name in nbytes:
            one["gigabytes_per_second"] = nbytes[name] / middle / 1e9
        if reference in rows and name != reference:
            one["times"] = float(np.median([a / b for a, b in zip(rows[reference].seconds, row.seconds, strict=True)]))
        found.append(one)
    return found


def _quantize(place: Path, layers: int, rounds: int, threads: int, format: str) -> dict:
    ways: dict[str, str | None] = {"quantize": None}
    if "search" in FORMATS[Scheme(format).format].options:
        ways["search"] = "mse"
    source = write_checkpoint(place / "source", layers)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    model = load(source)
    peak = 0

    def cores(search: str | None, most: int | None = None) -> None:
        schemes = plan(model.weights, format, search=search).schemes
        with quantizing(model.weights, schemes, None, threads) as blocks:
            for name in list(schemes)[:most]:
                blocks(name)

    def quantize(search: str | None) -> None:
        nonlocal peak
        with AnonymousMemory() as memory:
            quantize_checkpoint(source, place / "out", format, threads=threads, search=search)
        peak = max(peak, memory.peak - memory.first)

    passes: dict[str, Callable[[], None]] = {"copy": lambda: copy_folder(source, place / "out")}
    for way, search in ways.items():
        cores(search, most=1)  # compiled, if there is anything to compile
        passes |= {way: partial(quantize, search), f"{way}, cores": partial(cores, search)}
    rows = {name: Timed(name) for name in passes}
    for _ in range(rounds):
        for name, once in passes.items():
            if name.endswith("cores"):
                for path in source.iterdir():
                    _read(path)
            else:
                cold(source)
                os.sync()
            rows[name].time(once)
            shutil.rmtree(place / "out", ignore_errors=True)
    facts = _facts(rows, "copy", dict.fromkeys(rows, nbytes))
    seconds = {row["name"]: row["seconds"] for row in facts}
    for row in facts:
        if row["name"] in ways:
            limits = {"the copy": seconds["copy"], "the cores' arithmetic": seconds[f"{row['name']}, cores"]}
            row["binds"] = max(limits, key=lambda name: limits[name])
            row["reached"] = limits[row["binds"]] / row["seconds"]
    return {
        "what": "quantize", "layers": layers, "bytes": nbytes, "of": f"bfloat16 to {format}, {threads} threads",
        "reference": "copy", "rows": facts, "peak_memory": peak,
    }  # fmt: skip


def _load(place: Path, layers: int, rounds: int) -> dict:
    folder = place / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**official_keys("Baichuan2-7B"), "num_hidden_layers": layers}))
    made = synthetic(layers)
    save(Checkpoint(folder, made.config, made.weights), place / "quantized")
    del made
    folder = place / "quantized"
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    names = [f"{what}, {how}" for how in ("cold", "warm") for what in ("open", "token")]
    rows = {name: Timed(name) for name in (*names, "read")}
    for _ in range(rounds):
        for how in ("cold", "warm"):
            if how == "cold":
                cold(folder)
            model = rows[f"open, {how}"].time(lambda: load(folder))
            rows[f"token, {how}"].time(partial(model, [[5]]))
            del model
        rows["read"].time(lambda: [_read(path) for path in folder.iterdir()])
    return {
        "what": "load", "layers": layers, "bytes": nbytes, "of": "in Q4_0", "reference": "read",
        "rows": _facts(rows, "read", {"read": nbytes}),
    }  # fmt: skip


def _read(path: Path) -> int:
    """Every byte of a file, summed."""
    return int(np.add.reduce(np.memmap(path, np.uint8, "r")[: path.stat().st_size // 8 * 8].view(np.uint64)))


def official_keys(family: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint as published, as far as this package reads it."""
    keys: dict[str, Any] = {"model_type": "baichuan", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    keys |= dict(zip(KEYS, OFFICIAL[family], strict=True), torch_dtype="bfloat16")
    keys["num_attention_heads"], for_keys = HEADS[family]
    if family == "Qwen2-7B":
        keys |= dict(model_type="qwen2", num_key_value_heads=for_keys, rope_theta=1e6)
    if family.startswith("Baichuan2"):
        keys["tokenizer_class"] = "BaichuanTokenizer"
    return {**keys, "model_max_length" if family.endswith("13B") else "max_position_embeddings": 4096}


def random_block(rng: np.random.Generator) -> np.ndarray:
    """The bytes of random bfloat16 numbers, as large as weights are. A checkpoint may repeat them."""
    block = rng.standard_normal(BLOCK_BYTES // 2, dtype=np.float32) * 0.02
    return block.astype(ml_dtypes.bfloat16).view(np.uint8)


def write_checkpoint(folder: Path, layers: int, seed: int = 0) -> Path:
    """A checkpoint of Baichuan2-7B's shapes with seeded bfloat16 numbers, in safetensors files."""
    rng = np.random.default_rng(seed)
    block = random_block(rng)
    keys = {**official_keys("Baichuan2-7B"), "num_hidden_layers": layers}
    shapes = expected_shapes(config_from_keys(keys))
    starts = rng.integers(0, 4096, len(shapes)) * 4096
    entries = {
        name: Repeated(shape, block, int(start)) for (name, shape), start in zip(shapes.items(), starts, strict=True)
    }
    files = shards.cut(entries, 5_000_000_000)
    with shards.workplace(folder, files, {}, resumable=False) as work:
        shards.write_shards(work, files, "writing")
        shards.write_json(work / "config.json", keys)
    return folder


def copy_folder(source: Path, out: Path) -> None:
    """shutil's copy of every file, synced to the disk as a conversion is."""
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb") as file:
            os.fsync(file.fileno())


def cold(folder: Path) -> None:
    """Drops a folder's files from the page cache, where the system can be asked to."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class AnonymousMemory:
    """The largest anonymous memory of this process while the block runs, in bytes; `first`: what it had before.

    Mapped pages of files do not count, because they belong to the page cache. Only Linux tells; elsewhere all is 0.
    """

    def __enter__(self) -> AnonymousMemory:
        self.first = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
