"""Checkpoints of true shape, made here, and what opening, converting and running them costs. Not run by pytest.

    python tests/bench_checkpoints.py generate /tmp/b2-7b --family Baichuan2-7B             # 15 GB
    python tests/bench_checkpoints.py generate /tmp/b2-13b --family Baichuan2-13B --shards 3 --sparse
    python tests/bench_checkpoints.py measure /tmp/b2-7b [--layers 2] [--rounds 2] [--skip-convert]

`generate` writes the archive that `torch.save` writes, without torch: one pickle, storages aligned to 64 bytes, zip64
records beyond 4 GiB. The numbers are one seeded block of bfloat16 again and again, or holes in a sparse file.
`measure` puts plain copies and conversions in turns, each from a cold page cache to synced files, and reads a process's
anonymous memory: mapped pages of files are the page cache's.
"""

import argparse
import ctypes
import json
import math
import mmap
import os
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch_bytes as tb

import refimpl
from refimpl.bench.storage import BLOCK_BYTES as BLOCK
from refimpl.bench.storage import AnonymousMemory, cold, copy_folder, official_keys, random_block
from refimpl.checkpoint.convert import convert
from refimpl.checkpoint.doctor import OFFICIAL
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import config_from_keys

FULL = 0xFFFFFFFF


def generate(folder: Path, family: str, layers: int | None = None, shards: int = 1, sparse: bool = False) -> None:
    """A checkpoint of an official shape in bfloat16, as .bin files."""
    keys = official_keys(family)
    keys["num_hidden_layers"] = layers or keys["num_hidden_layers"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys, indent=2))
    shapes = expected_shapes(config_from_keys(keys))
    content = None if sparse else random_block(np.random.default_rng(0)).tobytes()
    if shards == 1:
        write_bin(folder / "pytorch_model.bin", shapes, content)
        return
    numbers = {name: i * shards // len(shapes) + 1 for i, name in enumerate(shapes)}
    places = {name: f"pytorch_model-{number:05}-of-{shards:05}.bin" for name, number in numbers.items()}
    for file in sorted(set(places.values())):
        write_bin(folder / file, {n: shape for n, shape in shapes.items() if places[n] == file}, content)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def write_bin(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes | None) -> None:
    """What `torch.save` writes of an OrderedDict of bfloat16 tensors; without a block, their bytes are holes."""
    entries, sizes = {}, {}
    for key, (name, shape) in enumerate(shapes.items()):
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        held = tb.storage(str(key), "bfloat16", math.prod(shape))
        entries[name] = tb.tensor(held, 0, shape, strides)
        sizes[f"m/data/{key}"] = 2 * math.prod(shape)
    pickle = tb.PROTO + tb.EMPTY + b"".join(b"(" + tb.value(n) + v + b"u" for n, v in entries.items()) + tb.STOP
    records = []
    with open(path, "wb") as file:

        def member(name: str, size: int, content: bytes | None) -> None:
            at = file.tell()
            wide = at >= FULL or size >= FULL  # miniz writes a zip64 record, and then a wide descriptor
            fields = [size, size] * (size >= FULL) + [at] * (at >= FULL)
            extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if wide else b""
            padding = -(at + 30 + len(name) + len(extra) + 4) % 64
            local = extra + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            head = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(local))
            file.write(head + name.encode() + local)
            crc = 0
            if content is not None:
                file.write(content)
                crc = zlib.crc32(content)
            elif block is None:
                file.seek(size, os.SEEK_CUR)
            else:
                start = 4096 * len(records) % BLOCK
                for done in range(0, size, BLOCK):
                    piece = (block[start:] + block[:start])[: size - done]
                    file.write(piece)
                    crc = zlib.crc32(piece, crc)
            file.write(struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\10", crc, size, size))
            told, place = min(size, FULL), min(at, FULL)
            entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, crc, told, told, len(name),
                                len(extra), 0, 0, 0, 0, place)  # fmt: skip
            records.append(entry + name.encode() + extra)

        member("m/data.pkl", len(pickle), pickle)
        member("m/byteorder", 6, b"little")
        for name, size in sizes.items():
            member(name, size, None)
        member("m/version", 2, b"3\n")
        start, body, count = file.tell(), b"".join(records), len(records)
        file.write(body)
        if start >= FULL:
            end = file.tell()
            file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0, 0, 0, 0, count, count, len(body), start))
            file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(body), min(start, FULL), 0))
        file.flush()
        os.fsync(file.fileno())


# Measuring


def resident(path: Path) -> np.ndarray:
    """Whether each page of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(whole) // mmap.PAGESIZE), np.uint8)
        address = ctypes.c_void_p(whole.ctypes.data)
        if libc.mincore(address, ctypes.c_size_t(len(whole)), pages.ctypes.data_as(ctypes.c_void_p)):
            raise OSError(ctypes.get_errno(), "mincore")
        del whole
    return pages & 1 == 1


class EnoughError(Exception):
    """The layers that were asked for are done."""


def two_layers(model: refimpl.Model, layers: int, tokens: int = 8) -> None:
    """The forward of the first layers, stopped by a tap."""

    def tap(name, x):
        if name == f"model.layers.{layers - 1}":
            raise EnoughError
        return x

    try:
        model.forward(list(range(100, 100 + tokens)), "float32", None, None, tap)
    except EnoughError:
        return


def measure(folder: Path, layers: int, rounds: int, skip_convert: bool) -> None:
    files = sorted(folder.glob("*.bin"))
    total = sum(path.stat().st_size for path in files)
    held = sum(path.stat().st_blocks for path in files) * 512
    print(f"{folder.name}: {total / 1e9:.2f} GB in {len(files)} files, {held / 1e9:.2f} on disk")
    for kind in ("cold", "warm", "warm"):
        if kind == "cold":
            cold(folder)
        began = time.perf_counter()
        model = refimpl.load(folder)
        print(f"open, {kind}: {time.perf_counter() - began:.3f} s")

    if len(files) == 1:
        cold(folder)
        began = time.perf_counter()
        two_layers(model, layers)
        took = time.perf_counter() - began
        pages = resident(files[0])
        used = [n for n in model.weights if n.startswith(tuple(f"model.layers.{i}." for i in range(layers)))]
        needed = sum(model.weights[name].array.nbytes for name in used)
        touched = int(pages.sum()) * mmap.PAGESIZE
        print(f"{layers} layers on 8 tokens: {took:.1f} s; their weights have {needed / 1e6:.1f} MB")
        print(f"{touched / 1e6:.1f} MB of the file are in the page cache then: {touched / needed:.3f} of that")
    if skip_convert:
        return
    ratios = []
    for turn in range(rounds):
        speeds = {}
        for kind in ("copy", "convert") if turn % 2 == 0 else ("convert", "copy"):
            out = folder.with_name(f"{folder.name}-{kind}")
            cold(folder)
            os.sync()
            with AnonymousMemory() as memory:
                began = time.perf_counter()
                if kind == "copy":
                    copy_folder(folder, out)
                else:
                    convert(folder, out)
                took = time.perf_counter() - began
            speeds[kind] = total / took / 1e9
            peak, before = memory.peak / 1e6, memory.first / 1e6
            print(f"{kind}: {took:.1f} s, {speeds[kind]:.2f} GB/s, {peak:.0f} MB of anonymous memory at most", end="")
            print(f", {before:.0f} of them before")
            shutil.rmtree(out)
        ratios.append(speeds["convert"] / speeds["copy"])
    print(f"convert reaches {', '.join(f'{ratio:.0%}' for ratio in ratios)} of a plain copy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    sub = verbs.add_parser("generate")
    sub.set_defaults(run=generate)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--family", choices=OFFICIAL, default="Baichuan2-7B")
    sub.add_argument("--layers", type=int, help="fewer than the official number, where the disk is short")
    sub.add_argument("--shards", type=int, default=1)
    sub.add_argument("--sparse", action="store_true", help="holes instead of numbers: no disk is used")
    sub = verbs.add_parser("measure")
    sub.set_defaults(run=measure)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--layers", type=int, default=2, help="how many layers are run (default: 2)")
    sub.add_argument("--rounds", type=int, default=2, help="turns of copy and convert (default: 2)")
    sub.add_argument("--skip-convert", action="store_true", help="do not write anything")
    arguments = vars(parser.parse_args())
    run = arguments.pop("run")
    run(**arguments)
    sys.exit(0)
