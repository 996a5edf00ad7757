"""Context binaries of an export, made on this desk: Qualcomm's compiler, without network, account or phone.

    build/bin/
      part_1_of_2.bin              for a phone: the graphs of a part in one binary, which share its weights
      prompt_ar16_cl64_1_of_2.bin  or for this desk: each graph alone, because the emulation loads no shared weights
      trace/{graph}.json           Qualcomm's operations, and the ONNX nodes that each comes from
      compile.json                 what all of it is, and what it was made from

Binaries are compiled one after the other, each in a process of its own. Only a finished one gets its name and an entry
in `compile.json`, so the next run goes on where an earlier one was interrupted. The compiler gives other bytes each
time (some hundred of two million differ, and the graphs' names have a hash of the path), so a digest identifies a
binary, and says nothing about its graphs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.files.graph_folder import GraphFolder, read_parts
from export.run.ledger import lock
from export.run.library import library
from export.run.process import Process
from export.run.socs import Soc, soc_called
from refimpl.errors import InputError, at_most
from refimpl.files import read_json, sha256, write_whole

FORMAT = "refimpl compile 1"
MANIFEST = "compile.json"


@dataclass(frozen=True)
class Compiled:
    """The folder that `compile_graphs` filled: each binary's file, and the graphs in it."""

    folder: Path
    binaries: dict[str, tuple[str, ...]]
    soc: str
    shared: bool

    def __str__(self) -> str:
        size = sum((self.folder / name).stat().st_size for name in self.binaries)
        kind = "which share a part's weights" if self.shared else "one a graph"
        return f"{len(self.binaries)} context binaries for {self.soc}, {kind}, {size / 1e6:.2f} MB in {self.folder}"


def compile_graphs(
    folder: str | Path, out: str | Path, soc: str = "8-elite", shared: bool = True, part: int | None = None
) -> Compiled:
    """Compiles the graphs of an export into context binaries in the folder `out`, and returns what is there then.

    `shared`: one binary for each part, for phones; otherwise one for each graph, which runs here, too. `part`: only the
    part of that number. Binaries of the same graphs for the same SoC that are already in `out` are kept.

    Raises InputError, with the compiler's reason, for a graph that it does not take; for a folder that is not an
    export, or cannot be written; and if the package is missing.
    """
    folder, out, chosen = Path(folder), Path(out), soc_called(soc)
    library("QnnHtp")
    found = _in_order(read_parts(folder))
    graphs = [one for one in found if part is None or one.part.number == part]
    if not graphs:
        raise InputError(f"{folder} has no part {part}; it has {at_most(sorted({one.part.number for one in found}))}")
    groups = _groups(graphs, shared)
    with _opened(out) as done:
        made: dict[str, Any] = done.get("binaries", {})
        head = {"format": FORMAT, "soc": chosen.name, "soc_model": chosen.model, "htp_arch": chosen.architecture,
                "shared": shared, "onnxruntime_qnn": metadata.version("onnxruntime-qnn"),
                "onnxruntime": metadata.version("onnxruntime")}  # fmt: skip
        if made and (other := [key for key in head if done.get(key) != head[key]]):
            if other[0] == "shared":
                has, asked = ("part" if one else "graph" for one in (done.get("shared"), shared))
                raise InputError(f"{out} holds a binary for each {has}, not for each {asked}; choose another folder")
            raise InputError(
                f"{out} holds binaries with another {other[0]}: {done.get(other[0])}, not {head[other[0]]}; choose "
                "another folder"
            )
        with tqdm(desc="compiling", total=len(graphs), unit="graph", disable=None, leave=False) as progress:
            for name, group in groups.items():
                sources = {one.name: _digest(one) for one in group}
                entry = made.get(name, {})
                if entry.get("sources") == sources and _whole(out / name, entry):
                    progress.update(len(group))
                    continue
                progress.set_postfix_str(name)
                made[name] = _compiled(name, group, out, chosen, shared, progress) | {"sources": sources}
                write_whole(out / MANIFEST, json.dumps({**head, "binaries": made}, indent=1))
    return Compiled(out, {name: tuple(one.name for one in group) for name, group in groups.items()}, soc, shared)


def read_compiled(folder: str | Path) -> Compiled:
    """The binaries in a folder, by its manifest. Raises InputError for another folder, or if a binary is missing."""
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    binaries = manifest.get("binaries")
    if manifest.get("format") != FORMAT or not isinstance(binaries, dict):
        raise InputError(f"{folder / MANIFEST} has the format {manifest.get('format')!r}, expected {FORMAT!r}")
    for name, entry in binaries.items():
        if not _whole(folder / name, entry):
            raise InputError(f"{folder / name} is not the binary that was compiled; compile again")
    named = {name: tuple(entry["sources"]) for name, entry in binaries.items()}
    return Compiled(folder, named, str(manifest.get("soc")), bool(manifest.get("shared")))


def _in_order(graphs: list[GraphFolder]) -> list[GraphFolder]:
    """Part after part, those of prompts before those of single tokens."""
    return sorted(graphs, key=lambda one: (one.part.number, -one.part.tokens))


def _groups(graphs: Sequence[GraphFolder], shared: bool) -> dict[str, list[GraphFolder]]:
    """The name of a binary -> the graphs in it, prompt first."""
    found: dict[str, list[GraphFolder]] = {}
    for one in graphs:
        binary = f"part_{one.part.number}_of_{one.part.total}" if shared else one.name
        found.setdefault(f"{binary}.bin", []).append(one)
    return found


def _compiled(
    name: str, group: Sequence[GraphFolder], out: Path, soc: Soc, shared: bool, progress: tqdm
) -> dict[str, Any]:
    """Compiles one binary, and puts it into `out` once it is whole."""
    partial, started = out / f".{name}.partial", time.perf_counter()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with Process("export.phone.qnn_compiler") as child:
            for message in child.hear(
                "compile", graphs=[str(one.folder.resolve()) for one in group], out=str(partial.resolve()),
                soc_model=soc.model, arch=soc.arch, shared=shared and len(group) > 1,
            ):  # fmt: skip
                if "graph" in message:
                    write_whole(partial / f"{message['graph']}.json", json.dumps(message["trace"], ensure_ascii=False))
                    progress.update()
        found = list(partial.glob("*.bin"))
        if len(found) != 1:
            raise InputError(f"the compiler wrote {len(found)} files, expected one binary")
        (out / "trace").mkdir(exist_ok=True)
        for one in group:
            (partial / f"{one.name}.json").replace(out / "trace" / f"{one.name}.json")
        size, digest = found[0].stat().st_size, sha256(found[0])
        found[0].replace(out / name)
    except InputError as error:
        raise InputError(f"{name} for {soc.name}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot write {out / name}: {error.strerror}; make room, and compile again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"bytes": size, "sha256": digest, "seconds": round(time.perf_counter() - started, 2)}


@contextmanager
def _opened(out: Path) -> Iterator[dict[str, Any]]:
    """Locks a folder for binaries against other processes, and gives its manifest, {} if it has none.

    A folder that was made here and stays empty is removed.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in out.iterdir()}
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another place") from None
    if there and MANIFEST not in there and (others := sorted(n for n in there if not n.startswith("."))):
        raise InputError(f"{out} holds {others[0]}, and no {MANIFEST}; choose a folder of its own for the binaries")
    done = read_json(out / MANIFEST) if MANIFEST in there else {}
    if done and (done.get("format") != FORMAT or not isinstance(done.get("binaries"), dict)):
        raise InputError(f"{out / MANIFEST} has the format {done.get('format')!r}, expected {FORMAT!r}")
    guard = out / ".lock"
    try:
        with open(guard, "wb") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise InputError(f"another process compiles into {out}; wait until it is done") from None
            yield done
    finally:
        guard.unlink(missing_ok=True)
        if new and not any(out.iterdir()):
            out.rmdir()


def _digest(one: GraphFolder) -> str:
    """The sha256 of a graph and its weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in one.files if path.is_file()):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry.get("bytes") and sha256(path) == entry.get("sha256")
