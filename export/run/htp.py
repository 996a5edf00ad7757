"""`Htp`: Qualcomm's NPU as an executor, its emulation on a desk or the real one of Windows on ARM.

    with Htp(soc="8-elite") as device:
        outputs = device.run(Path("parts/token_ar1_cl64_2_of_3"), [inputs])
        print(device.placements["token_ar1_cl64_2_of_3"])

The package onnxruntime-qnn (extra: htp) has Qualcomm's compiler and, on x86_64, an emulation of the NPU. It works in
a process of its own. When a graph does not compile, that process is thrown away with all its graphs, because its other
sessions would go on with wrong numbers and without an error.

The session says which nodes run on the NPU. QuantizeLinear and DequantizeLinear at the graph's ends belong to the host,
and run on the CPU everywhere. Any other node on the CPU is a remark, or with `strict` an error.

On Windows on ARM the package finds a real NPU; that could not be tried here. The SoC is not stated there, and the
device of kind NPU is taken.

**Source**: onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from export.graphs.borders import across
from export.graphs.plan import Arrays
from export.run.process import EndedError, Process, read_arrays, write_arrays
from export.run.qnn import PROVIDER
from export.run.socs import soc_called
from refimpl.errors import InputError, Remark, at_most

SECONDS = 3600.0  # that one compilation, or one run, may take
_MADE_BY_ORT = re.compile(r"(/duplicated)?(_token_\d+)?$")  # what ONNX Runtime adds to the name of a copied node
_PART = re.compile(r"\.(raw|codes|on_grid|float16|wide|scales?|zero_points?|floats)$")
_UNNAMED = re.compile(r"(/|[A-Z])\w*_\d+")  # such as Mul_3: a value without a tap


@dataclass(frozen=True)
class Elsewhere:
    """A node that the NPU does not compute: its operator and name, the tensor that it is part of, and why."""

    op: str
    name: str
    tap: str
    reason: str = ""

    def __str__(self) -> str:
        of = f" of {self.tap}" if self.tap != self.name else ""
        return f"{self.op} {self.name}{of}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run: how many on the NPU, how many at its ends, and which others on the CPU.

    `seconds`: how long it took to compile.
    """

    graph: str
    on_npu: int
    ends: int
    elsewhere: tuple[Elsewhere, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.graph}: {self.on_npu} nodes on the NPU, {self.ends} at its ends on the CPU"
        return f"{text}; on the CPU besides: {at_most(self.elsewhere, 3)}" if self.elsewhere else text


@dataclass
class Htp:
    """Qualcomm's NPU as an `Executor`, used as a context.

    `soc`: one of `socs.SOCS`, whose NPU is emulated. `strict`: a node on the CPU, but for those at the graph's ends and
    the table of token embeddings, is an error. `seconds`, `memory`: how long the compiler may work on a graph, or a run
    may take, and how many bytes its process may hold. `options`: further options of the provider, such as `vtcm_mb`.

    `placements`: where the nodes of each graph ran. `peak`: the most bytes that the process held.
    Raises InputError if the package is not installed, or not made for this machine, and for an unknown SoC.
    """

    soc: str = "8-elite"
    strict: bool = False
    seconds: float | None = SECONDS
    memory: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict, init=False)
    peak: int = field(default=0, init=False)
    _child: Process | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._soc = soc_called(self.soc)
        expect_installed()

    def __enter__(self) -> Htp:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __str__(self) -> str:
        """Where the nodes ran, over all graphs so far."""
        places = self.placements.values()
        elsewhere = [str(one) for place in places for one in place.elsewhere]
        there, ends = (sum(getattr(place, what) for place in places) for what in ("on_npu", "ends"))
        text = f"{there} nodes on the NPU, {ends} at the ends of graphs on the CPU"
        return f"{text}, {len(elsewhere)} besides: {at_most(elsewhere, 3)}" if elsewhere else text

    @property
    def emulated(self) -> bool:
        """Whether the NPU is emulated, as on any x86_64: then an SoC must be stated."""
        return platform.machine().lower() in ("x86_64", "amd64")

    def about(self) -> str:
        """The names and versions of what runs here: results hold only for these versions."""
        found = self._process().ask("about")
        what = f"emulation of {self.soc} ({self._soc.architecture})" if self.emulated else f"device {found['device']}"
        return f"onnxruntime-qnn {found['package']}, QNN {found['qnn']}, {what}"

    def run(self, graph: Path, inputs: Sequence[Arrays]) -> list[Arrays]:
        """The outputs for each of the inputs.

        Raises InputError with the compiler's reason, and the tensor that it belongs to, if the graph does not compile
        or run; with `strict`, also if the NPU does not take all of it.
        """
        graph = Path(graph)
        key = self.compile(graph)
        return across(graph / "model.onnx", inputs, lambda given: self._run(graph, key, given))

    def _run(self, graph: Path, key: str, inputs: Sequence[Arrays]) -> list[Arrays]:
        child = self._process()
        given = [write_arrays(child.folder / f"in{i}", fed) for i, fed in enumerate(inputs)]
        try:
            answer = child.ask("run", key=key, runs=given)
        except InputError as error:
            raise self._failed(f"the NPU cannot run {graph.name}", error, graph) from None
        finally:
            self.peak = max(self.peak, child.peak)
        return [read_arrays(child.folder / f"out{i}", files) for i, files in enumerate(answer["runs"])]

    def compile(self, graph: Path) -> str:
        """Compiles a graph's folder, unless that is done, and looks at where its nodes run. Returns its key."""
        path = Path(graph) / "model.onnx"
        key = _key(path)
        child = self._process()
        known = path.parent.name in self.placements
        try:
            answer = child.ask("open", graph=str(path.resolve()), key=key, options=self._stated, entries={})
        except InputError as error:
            what = f"{self.soc}'s compiler does not take {path.parent.name}"
            raise self._failed(what, error, path.parent, search=True) from None
        finally:
            self.peak = max(self.peak, child.peak)
        placement = placed(path.parent, answer)
        self.placements[placement.graph] = placement
        if placement.elsewhere:
            rest = [one for one in placement.elsewhere if one.op != "Gather" and not _of_gather(one, placement)]
            text = f"{placement.graph}: the NPU does not take {at_most(placement.elsewhere, 3)}"
            if self.strict and rest:
                raise InputError(f"{placement.graph}: the NPU does not take {at_most(rest, 3)}")
            if not known and rest:
                warnings.warn(f"{text}; the CPU computes that", Remark, stacklevel=2)
        return key

    @property
    def _stated(self) -> dict[str, str]:
        """The provider's options: an emulated SoC must be stated, a real one is there."""
        soc = {"soc_model": str(self._soc.model), "htp_arch": self._soc.arch} if self.emulated else {}
        return {**soc, **self.options}

    def _process(self) -> Process:
        if self._child is None or not self._child.alive:
            self._end()
            self._child = Process("export.run.qnn", self.seconds, self.memory).__enter__()
        return self._child

    def _failed(self, what: str, error: InputError, graph: Path, search: bool = False) -> InputError:
        """The error in one line. Ends the process, because its other sessions can no longer be trusted."""
        self._end()
        if isinstance(error, EndedError):
            return InputError(f"{what}: {error.reason}{f' ({error.said})' if error.said else ''}")
        text = reason(str(error))
        tap = next((tap for tap in mentioned(graph, str(error))), "")
        if not tap and search and "finalize" in text:
            tap = self._first_uncompiled(graph)
        return InputError(f"{what}: {text}{f'; it is about {tap}' if tap and tap not in text else ''}")

    def _first_uncompiled(self, graph: Path) -> str:
        """The first tensor up to which a graph does not compile; "" if none was found.

        The compiler does not name the operation. The nodes that compute a tensor are also part of what computes those
        behind it, so bisection finds the first that fails.
        """
        names = tensors(proto := onnx.load(graph / "model.onnx", load_external_data=False))
        low, high = 0, len(names)
        try:
            while low < high:
                middle = (low + high) // 2
                child = self._process()
                (child.folder / "cut.onnx").write_bytes(up_to(proto, names[middle]).SerializeToString())
                found = child.ask("compiles", weights=str(graph.resolve()), options=self._stated)["compiles"]
                low, high = (middle + 1, high) if found else (low, middle)
        except InputError:
            return ""
        finally:
            self._end()
        return Taps(proto.graph).of(names[low]) if low < len(names) else ""

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def expect_installed() -> None:
    """Raises InputError, saying what to do, if onnxruntime-qnn is not installed, or cannot be on this machine."""
    if find_spec("onnxruntime") is not None and find_spec("onnxruntime_qnn") is not None:
        return
    here, python = f"{platform.system()} on {platform.machine()}", ".".join(map(str, sys.version_info[:2]))
    machines = {"Linux": ("x86_64", "aarch64"), "Windows": ("AMD64", "ARM64")}
    if platform.machine() not in machines.get(platform.system(), ()):
        raise InputError(
            f"Qualcomm's onnxruntime-qnn is made for Linux and Windows on x86_64 and ARM64, not for {here}; use an "
            "engine here, or a device of AI Hub"
        )
    if sys.version_info < (3, 11):
        raise InputError(f"Qualcomm's onnxruntime-qnn needs Python 3.11 or newer, and this is {python}; make an "
                         "environment of a newer one, and install refimpl[htp] there")  # fmt: skip
    raise InputError("onnxruntime-qnn is not installed; install refimpl[htp]")


def placed(graph: Path, answer: Mapping[str, Any]) -> Placement:
    """Where the nodes of a graph's folder run, by the session's answer."""
    proto = onnx.load(graph / "model.onnx", load_external_data=False).graph
    reads, gives = {value.name for value in proto.input}, {value.name for value in proto.output}
    nodes = {node.name: node for node in proto.node}
    taps = Taps(proto)
    elsewhere, ends = [], 0
    for op, name, why in answer["elsewhere"]:
        node = nodes.get(_MADE_BY_ORT.sub("", name), nodes.get(name))
        at_end = node is not None and (
            (op == "QuantizeLinear" and node.input[0] in reads)
            or (op == "DequantizeLinear" and node.output[0] in gives)
        )
        if at_end:
            ends += 1
        else:
            elsewhere.append(Elsewhere(op, name, taps.of(name), why))
    on_npu = sum(answer["counts"].get(PROVIDER, {}).values())
    return Placement(graph.name, on_npu, ends, tuple(elsewhere), answer["seconds"])


def _of_gather(one: Elsewhere, placement: Placement) -> bool:
    """Whether a node belongs to the table of embeddings, whose rows the CPU looks up."""
    return any(other.op == "Gather" and other.tap == one.tap for other in placement.elsewhere)


class Taps:
    """The tensor that each node of a graph helps to compute: its output, or the next one behind it that has a name."""

    def __init__(self, graph: onnx.GraphProto):
        self._nodes = {node.name: node for node in graph.node}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def of(self, node: str) -> str:
        """The name of a node's tensor; or the node's own name, if nothing behind it has one."""
        name = _MADE_BY_ORT.sub("", node)
        todo, seen = [self._nodes[name].output[0] if name in self._nodes else name], set()
        while todo:
            value = todo.pop(0)
            shown = value
            while _PART.search(shown):
                shown = _PART.sub("", shown)
            if not _UNNAMED.fullmatch(shown):
                return shown.removesuffix(".weight")
            seen.add(value)
            todo += [out for reader in self._readers.get(value, ()) for out in reader.output if out not in seen]
        return node


def mentioned(graph: Path, text: str) -> list[str]:
    """The tensors of a graph's folder whose nodes a text names, the longest name first."""
    try:
        proto = onnx.load(graph / "model.onnx", load_external_data=False).graph
    except Exception:  # what cannot be read names nothing
        return []
    words = set(re.split(r"[\s'\"\[\](),:;|]+", text))
    found = [node.name for node in proto.node if node.name and _MADE_BY_ORT.sub("", node.name) in
             {_MADE_BY_ORT.sub("", word) for word in words}]  # fmt: skip
    taps = Taps(proto)
    return [taps.of(name) for name in sorted(found, key=len, reverse=True)]


def tensors(proto: onnx.ModelProto) -> list[str]:
    """The values of a graph that have a name of their own and are floats, in computing order."""
    floats = {v.name for v in (*proto.graph.value_info, *proto.graph.output)
              if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}  # fmt: skip
    constants = {tensor.name for tensor in proto.graph.initializer}
    named = []
    for node in proto.graph.node:
        if all(name in constants for name in node.input):
            constants.update(node.output)
            continue
        shown = [name for name in node.output if not _PART.search(name) and not _UNNAMED.fullmatch(name)]
        named += [name for name in shown if name in floats]
    return named


def up_to(proto: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """The graph of all that a value needs, with the value as its output."""
    needed, nodes = {value}, list[onnx.NodeProto]()
    for node in reversed(proto.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    kept = {
        "node": nodes,
        "initializer": [tensor for tensor in proto.graph.initializer if tensor.name in needed],
        "input": [given for given in proto.graph.input if given.name in needed],
        "output": [given for given in (*proto.graph.output, *proto.graph.value_info) if given.name == value],
        "value_info": [given for given in proto.graph.value_info if given.name in needed and given.name != value],
    }
    for part, those in kept.items():
        cut.graph.ClearField(part)
        getattr(cut.graph, part).extend(those)
    return cut


def reason(text: str) -> str:
    """A compiler's error in short: without code, source lines and repetitions."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"(RuntimeError|Fail|NotImplemented|InvalidArgument|EPFail): ", "", text)
    parts = list(dict.fromkeys(" ".join(part.split()) for part in text.split(" | ")))
    kept = [part for part in parts if part and not any(part != other and part in other for other in parts)]
    return "; ".join(kept)[:600]


def _key(path: Path) -> str:
    """A key by the path, and by name, size and time of each file: it changes with the graph, and no weight is read."""
    try:
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.parent.iterdir())]
        return hashlib.sha256(repr((str(path.resolve()), facts)).encode()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected the folder of a graph") from None
