"""What a folder sends to AI Hub and gets from it: each thing is sent once, however often a session is interrupted.

Each thing that is sent has a key, the sha256 of its bytes, its options and its device, and an entry of that key in the
folder's ledger. A thing whose entry has an id is not sent again, in this session or any later one. If a kill came
between sending it and the answer, the server is first asked for it by its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.folder.manifest import BESIDE
from export.graphs.naming import sanitised
from export.graphs.plan import Arrays
from export.hub.client import PUBLIC, configured, likely, one_line, scratch, version
from export.hub.connection import Connection, GoneError, T
from export.hub.outputs import io_spec, named_outputs, of_graph
from export.phone.options import Options
from export.phone.source import Source
from export.run.ledger import Ledger, arrays_digest, digest
from refimpl.errors import InputError, at_most
from refimpl.files import settle, sha256

POLL = 10.0  # seconds between two looks at a job, as the client has it
JOBS = ("compile", "link", "inference", "profile")


class Session(Connection):
    """A connection with a folder's ledger, which is locked while the session is entered.

    `url`: a server, if not that of client.ini. `retry`: whether what failed is sent once more. Every method raises
    InputError, in one line, when it cannot go on; what was done until then is in the ledger.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str,
        url: str | None = None,
        options: Options | None = None,
        retry: bool = False,
        locked: bool = True,
    ):
        self.folder, self.options = Path(folder), options or Options()
        super().__init__((url or configured().get("api_url", PUBLIC)).rstrip("/"), device, Ledger(self.folder))
        self.retry, self.locked = retry, locked
        self.sent = {"bytes": 0, "uploads": 0, "jobs": 0}
        self._jobs: dict[str, Any] = {}
        self._fetched: dict[str, Path] = {}

    def __enter__(self) -> Session:
        expect_export(self.folder)
        if self.locked:
            self.ledger.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.__exit__()

    # Keys

    def key(self, kind: str, *what: object, device: bool = True) -> str:
        """The key of something that is sent: the same for the same bytes and options to the same server and device."""
        return digest([kind, self.url, self.device if device else None, *what])[:32]

    def model_key(self, source: Source) -> str:
        return self.key("model", source.digest, device=False)

    def compile_key(self, source: Source) -> str:
        return self.key("compile", source.digest, self.options.for_compile(source))

    def link_key(self, sources: Iterable[Source]) -> str:
        return self.key("link", [self.compile_key(source) for source in sources], self.options.for_link())

    def data_key(self, inputs: Sequence[Arrays], schema: Mapping[str, str]) -> str:
        return self.key("dataset", arrays_digest(inputs), list(schema.items()), device=False)

    def inference_key(self, target: str, graph: str, inputs: Sequence[Arrays]) -> str:
        return self.key("inference", target, arrays_digest(inputs), self.options.for_inference(graph))

    def profile_key(self, target: str, graph: str) -> str:
        return self.key("profile", target, self.options.for_profile(graph))

    # Sending. Each method returns the key of its entry, which then has an id.

    def upload(self, source: Source) -> str:
        """Uploads a graph's folder, which the client zips."""
        key = self.model_key(source)

        def make(name: str) -> Any:
            if Source.read(source.folder).files != source.files:
                raise InputError(f"{source.folder} was changed after its export; export again")
            with scratch() as place:
                return self.client.upload_model(str(source.called(place)), name=name)

        self._obtain(key, "model", source.name, make, self._find_model, bytes=source.bytes, files=len(source.files))
        return key

    def compile(self, source: Source) -> str:
        """Submits a compile job of a graph, which is uploaded first."""
        key, options = self.compile_key(source), self.options.for_compile(source)
        if self._has(key):
            return key
        model = self.upload(source)

        def make(name: str) -> Any:
            return self.client.submit_compile_job(
                self._model(model), self._device(), name, options=options, retry=False
            )

        self._obtain(key, "compile", source.name, make, self._find_job, uses=[model], options=options)
        return key

    def link(self, label: str, sources: Sequence[Source]) -> str:
        """Submits a link job: a part's compiled graphs become one context binary, which has their weights once."""
        key, compiled = self.link_key(sources), [self.compile_key(source) for source in sources]

        def make(name: str) -> Any:
            models = [self._target(one) for one in compiled]
            return self.client.submit_link_job(models, self._device(), name, self.options.for_link())

        self._obtain(key, "link", label, make, self._find_job, uses=compiled, options=self.options.for_link())
        return key

    def upload_data(self, label: str, inputs: Sequence[Arrays], schema: Mapping[str, str]) -> str:
        """Uploads a dataset in the order of `schema`: the names that AI Hub's model has -> ours."""
        key = self.data_key(inputs, schema)
        expires = self.ledger.get(key).get("expires")
        if expires and expires < datetime.now(timezone.utc).isoformat():
            self.forget(key)
        columns = {name: [sample[mine] for sample in inputs] for name, mine in schema.items()}

        def make(name: str) -> Any:
            with scratch():
                return self.client.upload_dataset(columns, name)

        size = sum(array.nbytes for sample in inputs for array in sample.values())
        self._obtain(key, "dataset", label, make, self._find_dataset, bytes=size)
        return key

    def infer(self, target: str, source: Source, label: str, inputs: Sequence[Arrays]) -> str:
        """Submits an inference job of a graph in the model that the job `target` made."""
        key, options = self.inference_key(target, source.name, inputs), self.options.for_inference(source.name)
        if self._has(key):
            return key
        data = self.upload_data(label, inputs, self.schema(target, source))

        def make(name: str) -> Any:
            return self.client.submit_inference_job(
                self._target(target), self._device(), self._dataset(data), name, options, retry=False, profile=False
            )

        self._obtain(key, "inference", label, make, self._find_job, uses=[target, data], options=options,
                     target_key=target, data=data, samples=len(inputs))  # fmt: skip
        return key

    def profile(self, target: str, source: Source) -> str:
        """Submits a job that measures a graph's time and memory, on inputs of the server's own."""
        key, options = self.profile_key(target, source.name), self.options.for_profile(source.name)

        def make(name: str) -> Any:
            return self.client.submit_inference_job(
                self._target(target), self._device(), None, name, options, retry=False, profile=True
            )

        self._obtain(key, "profile", source.name, make, self._find_job, uses=[target], options=options)
        return key

    def _has(self, key: str) -> bool:
        """Whether the thing with this key was sent, and need not be sent again."""
        entry = self.ledger.get(key)
        again = self.retry and entry.get("state") == "failed" and key not in self.new
        return bool(entry.get("id")) and not again

    def _obtain(self, key: str, kind: str, label: str, make: Callable[[str], Any], find: Callable[[str], str],
                uses: Sequence[str] = (), **facts: Any) -> None:  # fmt: skip
        """Gives the entry an id: it has one, or the server knows the name that was sent before, or it is sent now."""
        if self._has(key):
            return
        entry = self.ledger.get(key)
        found = ""
        if entry.get("name") and not entry.get("id"):
            found = self.call(f"look for {label}", lambda: find(entry["name"]))
        if not found:
            self._check_device()
            self.new.add(key)
            name = f"{label.replace('/', '-')}-{key[:12]}-{secrets.token_hex(4)}"
            entry = self.ledger.write(
                key, kind=kind, label=label, name=name, id=None, state=None, reason=None, sha256=None,
                server=self.url, device=self.device, client=version(), **facts
            )  # fmt: skip
            tried = False

            def send() -> str:
                nonlocal tried
                if tried and (there := find(name)):  # the answer was lost, not the request
                    return there
                tried = True
                made = make(name)
                number = str(getattr(made, "job_id", None) or getattr(made, "model_id", None) or made.dataset_id)
                if hasattr(made, "job_id"):
                    self._jobs[number] = made
                if until := getattr(made, "expiration_time", None):
                    self.ledger.write(key, expires=until.astimezone(timezone.utc).isoformat())
                return number

            found = self.call(f"send {kind} {label}", send, uses)
            self.sent["jobs" if kind in JOBS else "uploads"] += 1
            self.sent["bytes"] += facts.get("bytes", 0)
        self.ledger.write(key, id=found)

    # Waiting and fetching

    def wait(self, keys: Iterable[str], doing: str) -> bool:
        """Waits until all jobs have ended; returns whether all succeeded. Their entries then say what they made.

        Raises GoneError if the server does not know one of them.
        """
        keys = list(dict.fromkeys(keys))
        waiting = [key for key in keys if self.ledger.get(key).get("state") not in ("done", "failed")]
        with tqdm(desc=doing, total=len(keys), initial=len(keys) - len(waiting), unit="job", disable=None,
                  leave=False) as progress:  # fmt: skip
            while waiting:
                for key in list(waiting):
                    if self.look(key):
                        waiting.remove(key)
                        progress.update()
                if waiting:
                    time.sleep(POLL)
        return all(self.ledger.get(key).get("state") == "done" for key in keys)

    def look(self, key: str) -> bool:
        """Whether a job has ended. If so, its entry now says how, and what it made."""
        entry = self.ledger.get(key)
        job = self._job(key)
        status = self.call(f"look at {entry['label']}", job.get_status, [key])
        if status.failure:
            self.ledger.write(key, state="failed", reason=one_line(status.message or "no reason is given"))
        elif status.success:
            facts: dict[str, Any] = {}
            if entry["kind"] in ("compile", "link"):
                target = self.call("name the compiled model", job.get_target_model, [key])
                if target is None:
                    raise InputError(
                        f"job {entry['id']} of {entry['label']} is done, but made no model; send it again with --retry"
                    )
                model = self.call("show the compiled model", lambda: self.client.get_model(target.model_id), [key])
                facts = {"target": target.model_id, "inputs": io_spec(model.input_spec),
                         "outputs": io_spec(model.output_spec)}  # fmt: skip
            self.ledger.write(key, state="done", **facts)
        return status.finished

    def run(self, graph: Path, inputs: Sequence[Arrays]) -> list[Arrays]:
        """A graph's outputs for each of the inputs, from the device: an executor (`export.run.executor`)."""
        source = Source.read(graph)

        def flow() -> list[Arrays]:
            compiled = self.compile(source)
            if self.wait([compiled], "compiling"):
                job = self.infer(compiled, source, source.name, inputs)
                if self.wait([job], "running"):
                    return self.fetch(job, self.outputs / "runs" / f"{job}.h5", source)
                raise InputError(failures(self.ledger, [job])[0])
            raise InputError(failures(self.ledger, [compiled])[0])

        return self.lasting(flow)

    @property
    def outputs(self) -> Path:
        """The folder for what the device gives."""
        return self.folder / "outputs" / (re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") or "device")

    def lasting(self, flow: Callable[[], T]) -> T:
        """The result of `flow`, which begins again whenever AI Hub no longer has something that the ledger knew."""
        while True:  # it ends, because only what earlier sessions sent can be gone
            with contextlib.suppress(GoneError):
                return flow()

    def fetch(self, key: str, path: Path, source: Source) -> list[Arrays]:
        """The outputs of a finished inference job, from `path` if they are there, else downloaded to it.

        The file is the client's own HDF5. Raises GoneError if the server no longer has them, InputError if they are not
        the graph's outputs.
        """
        entry = self.ledger.get(key)
        samples, grids = entry["samples"], of_graph(self.ledger.get(entry["target_key"]).get("outputs"), source.name)

        def bring(place: Path) -> None:
            if key in self._fetched:
                shutil.copyfile(self._fetched[key], place)
            else:
                self._job(key).download_output_data(str(place))
            named_outputs(place, source, samples, grids)

        self._deliver(key, path, bring)
        self._fetched[key] = path
        return named_outputs(path, source, samples, grids)

    def fetch_model(self, key: str, path: Path) -> None:
        """The model that a finished job made, downloaded to `path` unless it is there."""
        self._deliver(key, path, lambda place: self._target(key).download(str(place)))

    def fetch_profile(self, key: str, path: Path) -> None:
        """The profile of a finished job as JSON, downloaded to `path` unless it is there."""
        self._deliver(key, path, lambda place: self._job(key).download_profile(str(place)))

    def _deliver(self, key: str, path: Path, bring: Callable[[Path], object]) -> None:
        """Downloads a file, whole or not at all, unless a file with the sha256 of the entry is there."""
        entry = self.ledger.get(key)
        if path.is_file() and entry.get("sha256") == sha256(path):
            return
        partial = path.with_name(f".partial-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch():
                self.call(f"fetch {entry['label']}", lambda: bring(partial), [key])
            self.ledger.write(key, file=os.path.relpath(path, self.folder), sha256=sha256(partial))
            partial.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; make room and go on") from None
        finally:
            partial.unlink(missing_ok=True)

    def schema(self, target: str, source: Source) -> dict[str, str]:
        """AI Hub's names of a model's inputs -> ours, in the model's order, because a dataset is matched by order.

        If the server does not tell the order, it is the graph's. Raises InputError if the inputs are not the graph's.
        """
        told = of_graph(self.ledger.get(target).get("inputs"), source.name)
        if not told:
            return {name: name for name in source.inputs}
        mine = {sanitised(name): name for name in source.inputs}
        theirs = {name: (mine.get(sanitised(name)), tuple(shape or ())) for name, _, shape, *_ in told}
        if len(theirs) != len(mine) or any(
            name is None or (shape and shape != source.inputs[name]) for name, shape in theirs.values()
        ):
            raise InputError(
                f"AI Hub's model of {source.name} takes {at_most(f'{n} {s}' for n, (_, s) in theirs.items())}, the "
                f"graph {at_most(f'{n} {s}' for n, s in source.inputs.items())}; they must be the same"
            )
        return {name: str(own) for name, (own, _) in theirs.items()}

    # The client's objects for what has an id

    def _model(self, key: str) -> Any:
        return self.client.get_model(self.ledger.get(key)["id"])

    def _target(self, key: str) -> Any:
        return self.client.get_model(self.ledger.get(key)["target"])

    def _dataset(self, key: str) -> Any:
        return self.client.get_dataset(self.ledger.get(key)["id"])

    def _job(self, key: str) -> Any:
        number = self.ledger.get(key)["id"]
        if number not in self._jobs:
            self._jobs[number] = self.call("ask for a job", lambda: self.client.get_job(number), [key])
        return self._jobs[number]


def expect_export(folder: Path) -> None:
    """Raises InputError for a folder that is not an export, before anything is written into it."""
    settle(folder, BESIDE)
    if not (folder / "manifest.json").is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder} {what}; expected an export, as refimpl export writes it")


def failures(ledger: Ledger, keys: Iterable[str]) -> list[str]:
    """A line for each job that failed: the reason, and the likely cause where it is known."""
    lines = []
    for key in dict.fromkeys(keys):
        entry = ledger.get(key)
        if entry.get("state") == "failed":
            cause = likely(entry["reason"])
            lines.append(f"{entry['kind']} of {entry['label']} failed (job {entry['id']}): {entry['reason'][:300]}"
                         + (f"; likely {cause}" if cause else ""))  # fmt: skip
    return lines
