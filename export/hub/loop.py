"""AI Hub in the loop: every graph of an export compiled, the graphs of a part linked, golden inputs run on a device.

    compile    each graph to a DLC, by its encodings where it has any
    link       the graphs of each part into one context binary, in which they share their weights
    infer      golden inputs through each graph: isolated, each graph from its golden; chained, each from what the graph
               before it gave. The outputs come to outputs/{device}/{isolated or chained}/{graph}.h5
    profile    how much time and memory each graph takes: outputs/{device}/profile/{graph}.json
    fetch      the outputs of all jobs that are finished; nothing is sent
    binaries   the linked binaries

A verb first does the verbs above it that it needs. What is in the ledger (`export.run.ledger`) is not done again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.plan import Arrays, GraphSpec, Way, carry
from export.hub.session import JOBS, Session, expect_export, failures
from export.phone.source import SAMPLE, Source
from export.preflight.check import check
from export.run.ledger import Entry, Ledger
from refimpl.errors import InputError
from refimpl.files import read_json

WAYS = get_args(Way)
VERBS = ("compile", "link", "infer", "profile", "fetch", "binaries")


@dataclass
class Outcome:
    """The result of a verb: a row for each thing that it needs, a line for each failed job, how much was sent now."""

    rows: list[dict[str, Any]]
    failures: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        lines = [table(self.rows), *self.failures]
        if self.sent:
            uploads, size, jobs = (self.sent[what] for what in ("uploads", "bytes", "jobs"))
            lines.insert(1, f"sent now: {uploads} uploads of {size / 1e6:.1f} MB, {jobs} jobs")
        return "\n".join(filter(None, lines)) or "nothing was sent yet"


class Loop:
    """An export at AI Hub. Raises InputError for a folder that is not an export, or not whole.

    `checked`: nothing is uploaded if `export.preflight.check` finds an error in it.
    """

    def __init__(self, session: Session, checked: bool = True):
        self.session, self.checked, folder = session, checked, session.folder
        self.plan, _ = read_manifest(folder, weights=False)
        self.specs = [spec for run in self.plan.runs for spec in run]
        files = read_json(folder / "manifest.json")["files"]
        data = {spec.name: files[f"{spec.name}/model.data"] for spec in self.specs}
        self.sources = {
            name: Source.read(folder / name, (file["bytes"], file["sha256"])) for name, file in data.items()
        }
        self.parts: dict[str, list[Source]] = {}
        for spec in self.specs:
            self.parts.setdefault(part_of(spec), []).append(self.sources[spec.name])
        self.keys: list[str] = []
        self.fetched: set[Path] = set()

    def do(self, verb: str) -> Outcome:
        """Does one of VERBS, and returns what came of it. Raises InputError when it cannot go on."""
        flow: Callable[[], object] = getattr(self, verb)

        def from_the_start() -> None:
            self.keys, self.fetched = [], set()
            flow()

        self.session.lasting(from_the_start)
        keys = list(dict.fromkeys(self.keys))
        entries = [self.session.ledger.get(key) for key in keys]
        return Outcome([row(entry) for entry in entries if entry], failures(self.session.ledger, keys),
                       self.session.sent)  # fmt: skip

    def compile(self) -> None:
        session = self.session
        keys = []
        if self.checked and not all(session.ledger.get(session.model_key(s)).get("id") for s in self.sources.values()):
            self._preflight()
        for source in self.sources.values():
            keys.append(session.compile(source))
            self.keys += [session.model_key(source), keys[-1]]
        session.wait(keys, "compiling")

    def _preflight(self) -> None:
        """Raises InputError if preflight knows that AI Hub will refuse a graph."""
        errors = [finding for finding in check(self.session.folder).findings if finding.severity == "error"]
        if errors:
            first = errors[0]
            raise InputError(
                f"AI Hub refuses such a graph as {first.graph} ({first.rule}: {str(first)[:200]}; {first.remedy}); "
                f"refimpl export --check says all there is ({len(errors)}), --unchecked sends it all the same"
            )

    def link(self) -> dict[str, str]:
        """part -> the key of its link job, for each part that was linked."""
        session = self.session
        self.compile()
        keys = {
            part: session.link(part, sources)
            for part, sources in self.parts.items()
            if all(self._done(session.compile_key(source)) for source in sources)
        }
        self.keys += keys.values()
        session.wait(keys.values(), "linking")
        return {part: key for part, key in keys.items() if self._done(key)}

    def profile(self) -> None:
        binaries = self.link()
        keys = {
            spec.name: self.session.profile(binaries[part_of(spec)], self.sources[spec.name])
            for spec in self.specs
            if part_of(spec) in binaries
        }
        self.keys += keys.values()
        self.session.wait(keys.values(), "profiling")
        for name, key in keys.items():
            if self._done(key):
                self.session.fetch_profile(key, self.session.outputs / "profile" / f"{name}.json")

    def infer(self) -> None:
        """All isolated runs are sent first; they run while the chain is followed."""
        session, binaries = self.session, self.link()
        isolated = {
            spec.name: session.infer(binaries[part_of(spec)], self.sources[spec.name], f"{spec.name}/isolated",
                                     [self._golden(spec)])
            for spec in self.specs if part_of(spec) in binaries
        }  # fmt: skip
        self.keys += isolated.values()

        def run(spec: GraphSpec, inputs: Arrays) -> str | None:
            if part_of(spec) not in binaries:
                return None
            key = session.infer(binaries[part_of(spec)], self.sources[spec.name], f"{spec.name}/chained", [inputs])
            self.keys.append(key)
            session.wait([key], f"running {spec.name}")
            return key

        self._chain(run)
        session.wait(isolated.values(), "running")
        for name, key in isolated.items():
            self._fetch(key, name, "isolated")
        self._sweep()

    def fetch(self) -> None:
        session, known = self.session, self.session.ledger.get
        for sources in self.parts.values():
            self.keys += [*map(session.compile_key, sources), session.link_key(sources)]

        def sent(spec: GraphSpec, inputs: Arrays) -> str | None:
            key = session.inference_key(self._binary(spec), spec.name, [inputs])
            if not known(key).get("id"):
                return None
            self.keys.append(key)
            if not self._done(key) and known(key).get("state") != "failed":
                session.look(key)
            return key

        for spec in self.specs:
            if key := sent(spec, self._golden(spec)):
                self._fetch(key, spec.name, "isolated")
        self._chain(sent)
        self._known()

    def binaries(self) -> None:
        """Downloads the linked binaries, which a phone runs, to outputs/{device}/binaries."""
        for part, sources in self.parts.items():
            key = self.session.link_key(sources)
            self.keys.append(key)
            if self._done(key):
                self.session.fetch_model(key, self.session.outputs / "binaries" / f"{part}.bin")
        self._known()

    def _known(self) -> None:
        """Raises InputError if nothing of this was ever sent."""
        if not any(self.session.ledger.get(key) for key in self.keys):
            raise InputError(
                f"nothing was sent to {self.session.url} for {self.session.device} with these options; "
                "give the options with which it was sent; refimpl hub status shows them"
            )

    def _sweep(self) -> None:
        """Removes the outputs of an earlier export, so that this one is not judged by them."""
        for way in WAYS:
            for spec in self.specs:
                path = self.session.outputs / way / f"{spec.name}.h5"
                if path not in self.fetched:
                    path.unlink(missing_ok=True)

    def _chain(self, run: Callable[[GraphSpec, Arrays], str | None]) -> None:
        """Runs each graph on what the graphs before it gave, until one gives nothing."""
        after_prompt = Arrays()
        for specs in self.plan.runs if self.plan.chained else ():
            flow = Arrays(after_prompt)
            for spec in specs:
                golden = self._golden(spec)
                linked = golden | {v.name: carry(spec, v, flow) for v in spec.inputs if v.source}
                key = run(spec, linked)
                if key is None or not self._done(key):
                    return
                flow |= self._fetch(key, spec.name, "chained")
            after_prompt = after_prompt or flow

    def _fetch(self, key: str, graph: str, way: str) -> Arrays:
        if not self._done(key):
            return {}
        path = self.session.outputs / way / f"{graph}.h5"
        self.fetched.add(path)
        return self.session.fetch(key, path, self.sources[graph])[0]

    def _done(self, key: str) -> bool:
        return self.session.ledger.get(key).get("state") == "done"

    def _binary(self, spec: GraphSpec) -> str:
        return self.session.link_key(self.parts[part_of(spec)])

    def _golden(self, spec: GraphSpec) -> Arrays:
        return read_arrays(self.session.folder, spec, "input", spec.inputs)

    def on_disk(self) -> int:
        """The bytes of the graphs' files on disk; several hard links to one file count once."""
        found = [(source.folder / name).stat() for source in self.sources.values() for name in source.files]
        return sum({(file.st_dev, file.st_ino): file.st_size for file in found}.values())

    def planned(self, verb: str) -> list[dict[str, Any]]:
        """What a verb would send at most: kind, label, bytes before and after zipping, options, whether it was sent.

        Chained inputs are known only when the graph before has run; where they equal the golden ones, they are not sent
        again. Nothing is sent here, and no token is needed.
        """
        session, rows = self.session, list[dict[str, Any]]()

        def add(kind: str, label: str, key: str, size: int = 0, zipped: int = 0, options: str = "") -> None:
            rows.append({"kind": kind, "label": label, "bytes": size, "zipped": zipped, "options": options,
                         "sent": bool(session.ledger.get(key).get("id"))})  # fmt: skip

        for source in self.sources.values():
            add("model", source.name, session.model_key(source), source.bytes, source.zipped())
        for source in self.sources.values():
            add("compile", source.name, session.compile_key(source), options=session.options.for_compile(source))
        if verb != "compile":
            for part, sources in self.parts.items():
                add("link", part, session.link_key(sources), options=session.options.for_link())
        for spec in self.specs if verb == "profile" else ():
            key = session.profile_key(self._binary(spec), spec.name)
            add("profile", spec.name, key, options=session.options.for_profile(spec.name))
        for spec in self.specs if verb == "infer" else ():
            golden, options = self._golden(spec), session.options.for_inference(spec.name)
            size, zipped = sum(a.nbytes for a in golden.values()), sum(map(deflated, golden.values()))
            key = session.inference_key(self._binary(spec), spec.name, [golden])
            data = session.data_key([golden], session.schema(self._binary(spec), self.sources[spec.name]))
            fed = (
                self.plan.chained
                and any(v.source for v in spec.inputs)
                and (spec.past or any(v.tap for v in spec.inputs))
            )
            for way in WAYS if fed else WAYS[:1]:  # a graph that takes nothing from another is the same both ways
                if way == "chained":  # its inputs are not known yet: its label finds it
                    sent = {
                        str(entry["kind"]): known
                        for known, entry in session.ledger.entries.items()
                        if (entry.get("label"), entry.get("device")) == (f"{spec.name}/chained", session.device)
                    }
                    key, data = sent.get("inference", ""), sent.get("dataset", "")
                add("dataset", f"{spec.name}/{way}", data, size, zipped)
                add("inference", f"{spec.name}/{way}", key, options=options)
        return rows


def part_of(spec: GraphSpec) -> str:
    """The name under which graphs of all lengths are linked: their part, or their module."""
    return spec.module or f"part_{spec.part.number}_of_{spec.part.total}"


def deflated(array: np.ndarray) -> int:
    """About how many bytes an array has once zipped, judged by its beginning."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    piece = data[:SAMPLE].tobytes()
    return int(len(zlib.compress(piece, 1)) * data.size / max(len(piece), 1))


def row(entry: Entry) -> dict[str, Any]:
    """An entry of the ledger for a person to read."""
    state = entry.get("state") or ("sent" if entry.get("id") else "lost" if entry.get("name") else "to be sent")
    if entry.get("kind") in ("model", "dataset"):
        state = "uploaded" if entry.get("id") else "not uploaded"
    kept = {name: entry[name] for name in ("device", "options", "reason", "bytes", "file") if entry.get(name)}
    return {"kind": entry.get("kind"), "label": entry.get("label"), "state": state, "id": entry.get("id"), **kept}


def status(folder: Path, session: Session | None = None) -> Outcome:
    """All that the ledger knows. With a session, the server is asked first about the jobs that had not ended.

    Raises InputError for a folder that is not an export.
    """
    expect_export(folder)
    if session:
        for key, entry in list(session.ledger.entries.items()):
            pending = entry.get("id") and entry.get("state") not in ("done", "failed")
            here = entry.get("server") == session.url and entry.get("device") == session.device
            if pending and here and entry.get("kind") in JOBS:
                session.look(key)
    ledger = session.ledger if session else Ledger(folder)
    keys = list(ledger.entries)
    return Outcome([row(ledger.get(key)) for key in keys], failures(ledger, keys))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as lines in columns."""
    lines = [(str(r["kind"]), str(r["label"]), str(r["state"]), str(r["id"] or "")) for r in rows]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(4)]
    return "\n".join("  ".join(f"{x:{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)
