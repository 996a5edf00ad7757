"""`Genie`: Qualcomm's own runner of language models, over a bundle, in a process of its own.

    with Genie("genie", capture=True) as genie:
        for text in genie.say("白日依山尽，", 20):
            print(text, end="")
        calls = genie.calls()          # what it fed each graph and what it got, as codes

It is the library that an application links on a phone; here its NPU is the emulation of onnxruntime-qnn (extra: htp,
Linux x86_64), so the bundle needs a binary for each graph: shared weights do not load here.

Two settings of `genie_config.json` are overridden here, and the file is not changed: the cores, because a phone's mask
names cores that a desk may lack, and the sampler, so that it takes the likeliest token. That is `top-k: 1`. The
documented `greedy: true` is accepted, but still draws at random (QNN 2.51).

**Source**: Genie documentation, "Genie Dialog JSON configuration string" (docs.qualcomm.com, 80-63442-100). The debug
dump is named in the library's own messages; its files were read against ONNX Runtime's, bit for bit.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.graphs.plan import Arrays
from export.run.library import library, search_path
from export.run.process import EndedError, Process
from refimpl.errors import InputError
from refimpl.files import read_json

CONFIG = "genie_config.json"
SECONDS = 3600.0  # for one answer: a token of 7B takes a minute here
GREEDY = {"version": 1, "seed": 42, "temp": 1.0, "top-k": 1, "top-p": 1.0}
LARGEST = 1 << 30  # bytes of one tensor that was captured
_DTYPES = {
    "UFIXED_POINT_8": np.uint8, "UFIXED_POINT_16": np.uint16, "SFIXED_POINT_8": np.int8, "SFIXED_POINT_16": np.int16,
    "UINT_8": np.uint8, "UINT_16": np.uint16, "INT_32": np.int32, "UINT_32": np.uint32, "FLOAT_16": np.float16,
    "FLOAT_32": np.float32,
}  # fmt: skip
_GRAPH = re.compile(r"(?P<name>.+?)_(?P=name)_\d+(_\d+)*")


@dataclass(frozen=True)
class Call:
    """One run of one graph: what was fed and what came out, by the names in the graph, as codes where it has those."""

    graph: str
    number: int
    inputs: Arrays
    outputs: Arrays


class Genie:
    """Genie over a bundle's folder, as a context.

    `greedy`: take the likeliest token, not what the bundle's sampler draws. `capture`: keep what each graph is fed and
    gives, for `calls`; that is the whole cache for each token. `changes`: other values in the configuration, by dotted
    name under `dialog`, as `{"context.bos-token": 1}`; None removes a key. `seconds`: how long one answer may take.

    Raises InputError if the package is missing, for a folder that is not a bundle, and with Genie's own words for a
    bundle that it refuses.
    """

    def __init__(
        self, bundle: str | Path, greedy: bool = True, capture: bool = False, changes: Mapping[str, Any] | None = None,
        seconds: float | None = SECONDS,
    ):  # fmt: skip
        self.bundle, self.greedy, self.capture, self.seconds = Path(bundle), greedy, capture, seconds
        library("Genie")
        self.config = configured(self.bundle, changes or {}, greedy)
        self.version, self.opened = "", 0.0
        self._process: Process | None = None

    def __enter__(self) -> Genie:
        environment = {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [search_path(), os.environ.get("LD_LIBRARY_PATH")]))
        }
        self._process = Process("export.run.genie_library", self.seconds, environment=environment).__enter__()
        if self.capture:
            debug = {"path": str(self._captured), "dump-tensors": True, "dump-specs": True, "dump-outputs": True}
            self.config["dialog"]["debug"] = debug
        try:
            answer = self._ask("open", bundle=str(self.bundle.resolve()), config=json.dumps(self.config))
        except BaseException:
            self._process.end()
            raise
        self.version, self.opened = answer["version"], answer["seconds"]
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.end()

    def say(self, text: str, limit: int) -> Iterator[str]:
        """The answer to a text, piece by piece, of at most `limit` tokens; what was said before is remembered.

        Raises InputError with Genie's words if it fails.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for message in self._hear("query", text=text, limit=limit):
            if piece := decoder.decode(bytes(message.get("text", ()))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, by Genie's tokenizer, without the id that it puts before a prompt."""
        return self._ask("encode", texts=list(texts))["ids"]

    def reset(self) -> None:
        """Forgets what was said."""
        self._ask("reset")

    def perplexity(self, text: str) -> float:
        """GenieAccuracy's perplexity of a text; `export/phone/accuracy.py` says which of its tokens count."""
        assert self._process
        path = self._process.folder / "dataset.txt"
        path.write_text(text, encoding="utf-8")
        answer = self._ask("accuracy", config=json.dumps({"dataset": str(path), "type": "perplexity"}))
        found = re.search(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", answer["json"].rsplit(":", 1)[-1])
        if not found:
            raise InputError(f"GenieAccuracy said no number: {answer['json']!a:.200}")
        return float(found[0])

    @property
    def _captured(self) -> Path:
        assert self._process
        return self._process.folder / "captured"

    def calls(self) -> Iterator[Call]:
        """All runs of graphs since it was opened, in the order in which Genie made them.

        Raises InputError if nothing was captured, or a captured tensor does not match Genie's description of it.
        """
        if not self.capture:
            raise InputError("nothing was captured; open Genie with capture=True")
        yield from read_calls(self._captured)

    def _ask(self, job: str, **words: Any) -> dict[str, Any]:
        *_, answer = self._hear(job, **words)
        return answer

    def _hear(self, job: str, **words: Any) -> Iterator[dict[str, Any]]:
        assert self._process, "Genie is used as a context"
        try:
            yield from self._process.hear(job, **words)
        except EndedError as error:
            hint = ""
            if "Fail to create context from binary" in self._process.said() or "SIGSEGV" in error.reason:
                hint = "; binaries that share their weights do not load on this machine: refimpl compile --desk"
            raise InputError(f"Genie over {self.bundle}: {error}{hint}") from None
        except InputError as error:
            raise InputError(f"Genie over {self.bundle}: {error}") from None


def configured(bundle: Path, changes: Mapping[str, Any], greedy: bool = True) -> dict[str, Any]:
    """A bundle's configuration with changes, after a check that its files are there.

    Raises InputError for a folder that is not a bundle, or lacks a file.
    """
    if not bundle.is_dir():
        raise InputError(f"{bundle} is not a folder; expected a bundle with {CONFIG}")
    config = read_json(bundle / CONFIG)
    try:
        dialog = config["dialog"]
        backend = dialog["engine"]["backend"]
        names = [*dialog["engine"]["model"]["binary"]["ctx-bins"], dialog["tokenizer"]["path"]]
        names += [backend["extensions"]] if backend.get("extensions") else []
        cores = backend["QnnHtp"]
    except (KeyError, TypeError):
        why = f"{bundle / CONFIG} is not a configuration of a dialog on QnnHtp; see refimpl bundle"
        raise InputError(why) from None
    for name in names:
        if not isinstance(name, str) or not (bundle / name).is_file():
            raise InputError(f"{bundle} has no {name}, which its {CONFIG} names; put it there")
    if greedy:
        dialog["sampler"] = dict(GREEDY)
    cores["cpu-mask"] = f"{2 ** min(os.cpu_count() or 1, 3) - 1:#x}"
    for name, value in changes.items():
        *path, last = name.split(".")
        inner = dialog
        for part in path:
            inner = inner.setdefault(part, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return config


def read_calls(folder: Path) -> Iterator[Call]:
    """The calls in a debug dump of Genie: `text_primary/{graph}/{number}_{in|out}_{tensor}`, raw codes.

    Raises InputError if there are none, or a file has another size than Genie's description of the tensor says.
    """
    specs = {}
    for path in sorted(folder.glob("*/spec.*.json")):
        spec = read_json(path)
        specs[path.parent / str(spec.get("graph_name"))] = spec
    found: list[tuple[int, int, Path]] = []
    for rank, graph in enumerate(sorted(specs, key=lambda path: _order(path.name))):
        numbers = {int(path.name[:3]) for path in graph.glob("[0-9][0-9][0-9]*_in_*")} if graph.is_dir() else set()
        found += [(number, rank, graph) for number in numbers]
    if not found:
        raise InputError(f"{folder} has no captured calls; was anything asked?")
    for number, _, graph in sorted(found, key=lambda item: item[:2]):
        spec = specs[graph]
        yield Call(
            called(graph.name), number, _tensors(graph, number, "in", spec["inputs"]),
            _tensors(graph, number, "out", spec["outputs"]),
        )  # fmt: skip


def called(name: str) -> str:
    """A graph's name as it was exported: the compiler adds a part to it."""
    found = _GRAPH.fullmatch(name)
    return found["name"] if found else name


def _order(name: str) -> int:
    """The number of a graph's part: Genie runs the parts in this order."""
    found = re.search(r"_(\d+)_of_\d+$", called(name))
    return int(found[1]) if found else 0


def _tensors(graph: Path, number: int, way: str, specs: Sequence[Mapping[str, Any]]) -> Arrays:
    found = Arrays()
    for spec in specs:
        path = graph / f"{number:03d}_{way}_{spec['name']}"
        dtype = _DTYPES.get(str(spec["dtype"]).removeprefix("QNN_DATATYPE_"))
        if dtype is None or not path.is_file() or path.stat().st_size > LARGEST:
            raise InputError(f"{path.name} of {graph.name} was not captured, or has a type that is not known")
        array = np.fromfile(path, dtype)
        if array.size != np.prod(spec["dims"]):
            raise InputError(f"{path.name} of {graph.name} has {array.size} codes, Genie says {spec['dims']}")
        found[spec["name"]] = array.reshape(spec["dims"])
    return found
