"""AI Hub in the loop: every graph of an export compiled, the graphs of a part linked, golden inputs run on a device.

    compile    each graph to a DLC, by its encodings where it has any
    link       the graphs of each part into one context binary, in which they share their weights
    infer      the golden inputs through each graph: isolated, each from its golden; chained, each from what the one
               before gave. The outputs come to outputs/{device}/{isolated or chained}/{graph}.h5
    profile    what each graph takes of time and memory: outputs/{device}/profile/{graph}.json
    fetch      what has been sent by now and is finished, without sending anything; binaries, what was linked

Each does what it needs of those before it. What was done is in the ledger (`export.run.ledger`), and is not done again.
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
from export.hub.jobs import SAMPLE, Source
from export.hub.session import JOBS, Session, expect_export, failures
from export.preflight.check import check
from export.run.ledger import Entry, Ledger
from refimpl.errors import InputError
from refimpl.files import read_json

WAYS = get_args(Way)
VERBS = ("compile", "link", "infer", "profile", "fetch", "binaries")


@dataclass
class Outcome:
    """What became of what a verb sent: a row for each thing, a line for each that failed, what was sent now."""

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
    """An export at AI Hub. Raises InputError for a folder that is none, or not whole.

    `checked`: nothing is uploaded of which `export.preflight.check` knows that AI Hub refuses it.
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
        """Does one of VERBS; what became of it. Raises InputError for what cannot go on."""
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
        """Raises InputError if an upload would be in vain."""
        errors = [finding for finding in check(self.session.folder).findings if finding.severity == "error"]
        if errors:
            first = errors[0]
            raise InputError(
                f"AI Hub refuses such a graph as {first.graph} ({first.rule}: {str(first)[:200]}; {first.remedy}); "
                f"refimpl export --check says all there is ({len(errors)}), --unchecked sends it all the same"
            )

    def link(self) -> dict[str, str]:
        """The key of each part's link job, of the parts whose graphs were all compiled and linked."""
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
        """All isolated runs are sent first, the chain is followed meanwhile."""
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
        """The linked binaries, which a phone takes, to outputs/{device}/binaries."""
        for part, sources in self.parts.items():
            key = self.session.link_key(sources)
            self.keys.append(key)
            if self._done(key):
                self.session.fetch_model(key, self.session.outputs / "binaries" / f"{part}.bin")
        self._known()

    def _known(self) -> None:
        """Raises InputError if nothing of what was asked for was ever sent."""
        if not any(self.session.ledger.get(key) for key in self.keys):
            raise InputError(
                f"nothing was sent to {self.session.url} for {self.session.device} with these options; "
                "give those with which it was sent, which refimpl hub status shows"
            )

    def _sweep(self) -> None:
        """Removes outputs that are of an earlier export: nobody shall judge this one by them."""
        for way in WAYS:
            for spec in self.specs:
                path = self.session.outputs / way / f"{spec.name}.h5"
                if path not in self.fetched:
                    path.unlink(missing_ok=True)

    def _chain(self, run: Callable[[GraphSpec, Arrays], str | None]) -> None:
        """Runs each graph on what those before it gave, as far as they gave anything."""
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

    def planned(self, verb: str) -> list[dict[str, Any]]:
        """What a verb would send at most: kind, label, bytes as they are and about as they travel, options, and whether
        the ledger has it. Chained inputs may turn out to be the golden ones, and are not sent again then.

        Nothing is sent, no token is needed.
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
            for way in WAYS if fed else WAYS[:1]:  # what takes nothing from before is the same both ways
                if way == "chained":  # what its inputs are is known when it is their turn: its label finds it
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
    """What the graphs of all sizes are linked as: their part, or the module that they are."""
    return spec.module or f"part_{spec.part.number}_of_{spec.part.total}"


def deflated(array: np.ndarray) -> int:
    """About how many bytes of an array travel: what its beginning compresses to."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    piece = data[:SAMPLE].tobytes()
    return int(len(zlib.compress(piece, 1)) * data.size / max(len(piece), 1))


def row(entry: Entry) -> dict[str, Any]:
    """An entry of the ledger, as a person reads it."""
    state = entry.get("state") or ("sent" if entry.get("id") else "lost" if entry.get("name") else "to be sent")
    if entry.get("kind") in ("model", "dataset"):
        state = "uploaded" if entry.get("id") else "not uploaded"
    kept = {name: entry[name] for name in ("device", "options", "reason", "bytes", "file") if entry.get(name)}
    return {"kind": entry.get("kind"), "label": entry.get("label"), "state": state, "id": entry.get("id"), **kept}


def status(folder: Path, session: Session | None = None) -> Outcome:
    """All that the ledger knows; with a session, after another look at the jobs that had not ended.

    Raises InputError for a folder that is no export.
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
