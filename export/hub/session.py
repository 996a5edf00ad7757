"""A folder's dealings with AI Hub through the `qai-hub` client: each thing is sent once, whatever happens between.

Each thing that is sent has a key, the sha256 of its bytes, its options and its device, and an entry of that key in the
folder's ledger. What has an id there is not sent again, in this session or any later one. What was about to be sent
when a kill came is looked for at the server by its name first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from export.graphs.naming import sanitised
from export.graphs.plan import Arrays
from export.hub.client import (
    PUBLIC,
    advice,
    configured,
    connect,
    expect_answer,
    likely,
    one_line,
    scratch,
    transient,
    version,
)
from export.hub.jobs import Options, Source, arrays_digest, digest, io_spec, named_outputs, of_graph
from export.run.ledger import Entry, Ledger
from golden.bundle import sha256
from refimpl.errors import InputError, at_most

POLL = 10.0  # seconds between two looks at a job, as the client has it
FIRST = 20.0  # seconds in which a server must answer at all
PATIENCE = 600.0  # seconds without an answer, from then on, before a session gives up; the client tries for some 30
PAGES = 20  # of 50 jobs, models or datasets, that are searched for a name
T = TypeVar("T")


class GoneError(Exception):
    """AI Hub no longer has something that the ledger knows; it is forgotten now, and may be sent again."""


class Session:
    """One folder's dealings with AI Hub: a context, in which the folder's ledger is locked.

    `url` is another server than that of client.ini. `retry` sends once more what failed. Every method raises
    InputError, in one line, for what cannot go on; what was done until then is in the ledger.
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
        self.folder, self.device, self.options = Path(folder), device, options or Options()
        self.retry, self.locked = retry, locked
        self.new = set[str]()  # keys of what this session has sent
        self.ledger = Ledger(self.folder)
        self.url = (url or configured().get("api_url", PUBLIC)).rstrip("/")
        self.sent = {"bytes": 0, "uploads": 0, "jobs": 0}
        if not device.strip():
            raise InputError("the device has no name; give one of AI Hub's, such as 'Samsung Galaxy S25'")
        self._client: Any = None
        self._jobs: dict[str, Any] = {}
        self._fetched: dict[str, Path] = {}
        self._device_found = False

    def __enter__(self) -> Session:
        expect_export(self.folder)
        if self.locked:
            self.ledger.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.__exit__()

    # Keys

    def key(self, kind: str, *what: object, device: bool = True) -> str:
        """The key of what is sent: the same bytes with the same options to the same place have the same."""
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

    # What is sent. Each returns the key of its entry, which then has an id.

    def upload(self, source: Source) -> str:
        """A graph's folder, zipped by the client."""
        key = self.model_key(source)

        def make(name: str) -> Any:
            if Source.read(source.folder).files != source.files:
                raise InputError(f"{source.folder} is not as it was exported; export again")
            with scratch() as place:
                return self.client.upload_model(str(source.called(place)), name=name)

        self._obtain(key, "model", source.name, make, self._find_model, bytes=source.bytes, files=len(source.files))
        return key

    def compile(self, source: Source) -> str:
        """A compile job of an uploaded graph."""
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
        """A link job: the graphs of a part, compiled before, into one context binary with their weights once."""
        key, compiled = self.link_key(sources), [self.compile_key(source) for source in sources]

        def make(name: str) -> Any:
            models = [self._target(one) for one in compiled]
            return self.client.submit_link_job(models, self._device(), name, self.options.for_link())

        self._obtain(key, "link", label, make, self._find_job, uses=compiled, options=self.options.for_link())
        return key

    def upload_data(self, label: str, inputs: Sequence[Arrays], schema: Mapping[str, str]) -> str:
        """A dataset; `schema` is its order, the names that AI Hub's model has -> ours."""
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
        """An inference job of a graph in the model that the job `target` made."""
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
        """A job that measures a graph's time and memory, on inputs of the server's own."""
        key, options = self.profile_key(target, source.name), self.options.for_profile(source.name)

        def make(name: str) -> Any:
            return self.client.submit_inference_job(
                self._target(target), self._device(), None, name, options, retry=False, profile=True
            )

        self._obtain(key, "profile", source.name, make, self._find_job, uses=[target], options=options)
        return key

    def _has(self, key: str) -> bool:
        """Whether it was sent, and is not to be sent again."""
        entry = self.ledger.get(key)
        again = self.retry and entry.get("state") == "failed" and key not in self.new
        return bool(entry.get("id")) and not again

    def _obtain(self, key: str, kind: str, label: str, make: Callable[[str], Any], find: Callable[[str, Entry], str],
                uses: Sequence[str] = (), **facts: Any) -> None:  # fmt: skip
        """Sees to it that the entry has an id: it has one, or the server has what was sent, or it is sent."""
        if self._has(key):
            return
        entry = self.ledger.get(key)
        found = ""
        if entry.get("name") and not entry.get("id"):
            found = self.call(f"look for {label}", lambda: find(entry["name"], entry))
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
                if tried and (there := find(name, entry)):  # the answer was lost, not the request
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

    def forget(self, key: str) -> None:
        """What the entry had an id of is there no more."""
        if self.ledger.get(key):
            self.ledger.write(key, id=None, name=None, state=None, target=None, expires=None)

    # What is found

    def _find_job(self, name: str, entry: Entry) -> str:
        return self._find(lambda o: self.client.get_job_summaries(offset=o), name, lambda job: job.job_id)

    def _find_dataset(self, name: str, entry: Entry) -> str:
        return self._find(lambda o: self.client.get_datasets(offset=o), name, lambda data: data.dataset_id,
                          lambda data: self._rest().get_dataset(self.client.config, data.dataset_id))  # fmt: skip

    def _find_model(self, name: str, entry: Entry) -> str:
        return self._find(lambda o: self.client.get_models(offset=o), name, lambda model: model.model_id,
                          lambda model: self._rest().get_model(self.client.config, model.model_id))  # fmt: skip

    def _find(self, page: Callable[[int], list], name: str, number: Callable[[Any], str],
              detail: Callable[[Any], Any] | None = None) -> str:  # fmt: skip
        """The id of what has a name, newest first; of uploads, if they came to their end."""
        for i in range(PAGES):
            some = page(50 * i)
            for one in some:
                if one.name == name and (detail is None or detail(one).file_upload_complete):
                    return number(one)
            if not some:
                break
        return ""

    # What becomes of jobs

    def wait(self, keys: Iterable[str], doing: str) -> bool:
        """Looks at jobs until all have ended; whether all succeeded. What they made is in their entries then.

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
        """Whether a job has ended; if so, its entry says how, and what it made."""
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
                    raise InputError(f"job {entry['id']} of {entry['label']} is done, but made no model; --retry it")
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
        """The folder of what the device gave."""
        return self.folder / "outputs" / (re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") or "device")

    def lasting(self, flow: Callable[[], T]) -> T:
        """What a flow gives, begun again where AI Hub had forgotten what the ledger knew."""
        while True:  # each time something from an earlier session is forgotten, of which there is an end
            with contextlib.suppress(GoneError):
                return flow()

    def fetch(self, key: str, path: Path, source: Source) -> list[Arrays]:
        """The outputs of a finished inference job, from `path` if they are there, else downloaded to it.

        The file is the client's own HDF5. Raises GoneError if the server has them no more, InputError if they are not
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
        """Sees to it that a file is there: it has the sha256 in the entry, or is brought, whole or not at all."""
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
        """The order in which AI Hub's model takes its inputs: its names -> the graph's, which it must match.

        Where the server does not tell, the graph's own. A dataset's order counts, not its names alone.
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

    # The client

    @property
    def client(self) -> Any:
        """The `qai-hub` client, connected by client.ini."""
        if self._client is None:
            client = connect(self.url)
            expect_answer(self.url, FIRST)
            self._client = client
        return self._client

    @staticmethod
    def _rest() -> Any:
        from qai_hub import public_rest_api

        return public_rest_api

    def _device(self) -> Any:
        from qai_hub import Device

        return Device(self.device)

    def _check_device(self) -> None:
        """Before anything is sent: the device exists, and runs what is compiled for it."""
        if self._device_found:
            return
        found = self.call("ask for the device", lambda: self.client.get_devices(self.device))
        if not found:
            import difflib

            names = sorted({device.name for device in self.call("ask for devices", self.client.get_devices)})
            close = difflib.get_close_matches(self.device, names, 3, 0.3) or names
            raise InputError(f"AI Hub has no device {self.device!r}; it has {at_most(close, 3)}")
        if not any("framework:qnn" in device.attributes for device in found):
            raise InputError(f"{self.device} does not run QNN models; choose a device with framework:qnn")
        self._device_found = True

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

    def _lacks(self, number: str) -> bool:
        """Whether AI Hub itself says that it has no such job, model or dataset, or that the dataset has expired.

        The client takes every 404 for that, a proxy's page too. So it is asked again, and for what it must know.
        """
        from qai_hub.public_rest_api import APIException

        rest, config = self._rest(), self.client.config
        try:
            rest.get_device_list(config, self.device)
            for ask in (rest.get_job, rest.get_model, rest.get_dataset):
                try:
                    found = ask(config, number)
                except APIException as error:
                    if error.status_code != 404:
                        return False
                    continue
                if ask is not rest.get_dataset or not found.HasField("expiration_time"):
                    return False
                return found.expiration_time.seconds < time.time()
        except Exception:  # no answer is no word of it
            return False
        return True

    def call(self, what: str, action: Callable[[], T], uses: Sequence[str] = ()) -> T:
        """What the client's `action` gives, tried again while the network or the server fails.

        Raises GoneError, and forgets it, if the server has no more what it `uses`; InputError for everything else.
        """
        until, pause = time.monotonic() + PATIENCE, 1.0
        while True:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the client talks
                    return action()
            except (InputError, GoneError):
                raise
            except Exception as error:  # the client raises its own, and those of what it stands on
                reason = one_line(str(error)) or type(error).__name__
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise InputError(
                        f"cannot {what}: {tempfile.gettempdir()} is full; make room, or set TMPDIR"
                    ) from None
                doubtful = False
                if uses and (number := missing(reason)):
                    entries = {key: self.ledger.get(key) for key in uses}
                    named = [k for k, e in entries.items() if number in (e.get("id"), e.get("target"))] or uses
                    if not self.new.intersection(named):
                        doubtful = not self._lacks(number)
                        if not doubtful:
                            for key in named:
                                self.forget(key)
                            raise GoneError(reason) from None
                if not doubtful and not transient(error):
                    raise InputError(f"AI Hub did not {what}: {advice(reason, self.url)}") from None
                if time.monotonic() + pause > until:
                    lacking = "sure answer from" if doubtful else "connection to"
                    raise InputError(
                        f"no {lacking} {self.url} while trying to {what}: {reason[:200]}; "
                        "run the same command again, it goes on where it stopped"
                    ) from None
            left = (until - time.monotonic()) / 60
            tqdm.write(f"no answer from {self.url} to {what}; trying for {left:.0f} minutes more", file=sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, 60.0)


def expect_export(folder: Path) -> None:
    """Raises InputError for a folder that is no export, before anything is written into it."""
    if not (folder / "manifest.json").is_file():
        what = "has no manifest.json" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {what}; expected an export, as refimpl export writes it")


def missing(reason: str) -> str:
    """The id of what is not there by the client's message, or nothing."""
    if not re.search(r"could not be found|expired", reason, re.I):
        return ""
    number = re.search(r"\bid ?='?([A-Za-z0-9_-]+)'|\bID '([A-Za-z0-9_-]+)'", reason)
    return (number[1] or number[2]) if number else ""


JOBS = ("compile", "link", "inference", "profile")


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
