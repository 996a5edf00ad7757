"""The tensors that a saved graph can show, which follow from which, and the graph with some of them as outputs.

All of it is read from `model.onnx` as it was sent to the device. So no model is needed, and nothing is built again.

A `Place` is a tensor that a run can show: a tap, in one value or in one for each head, or an output that has another
layout than its tap. `flow.py` reasons by which place follows from which.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper

from export.graphs.data import assign_offsets
from export.graphs.grids import MOVES
from export.graphs.plan import GraphSpec, Value, unpadded
from export.measure.flow import Flow
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.names import NORMS

PICKS = {"Split", "Slice", "Gather"}  # these hand on a part of a tensor
CARRIES = (MOVES - PICKS) | {"QuantizeLinear", "DequantizeLinear", "Concat"}  # these hand on all of a tensor, unchanged
CHUNK = 16 << 20  # bytes of weights that are copied at a time


@dataclass(frozen=True)
class Place:
    """A tensor that a run can show: `values` are its names in the graph, head by head where it is in pieces.

    `value` is its layout: that of an output, or, without one, the tap's own.
    """

    name: str
    tap: str
    values: tuple[str, ...]
    value: Value
    is_output: bool

    def array(self, given: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What a run gave for it, in the layout of `value`; None if a piece of it is missing."""
        if any(name not in given for name in self.values):
            return None
        pieces = [given[name] for name in self.values]
        if len(pieces) == 1 and (self.is_output or pieces[0].shape == self.value.shape):
            return pieces[0]
        pieces = [_as_linear(piece) if len(self.value.shape) == 3 else piece for piece in pieces]
        return np.concatenate(pieces, self.axis)

    @property
    def axis(self) -> int:
        """Where its pieces lie side by side in the tap: heads are an axis of their own, or features."""
        return 1 if len(self.value.shape) == 4 else -1

    def unpadded(self, array: np.ndarray, spec: GraphSpec) -> np.ndarray:
        """An array in the layout of `value` as the tap, without padding; one of another shape unchanged."""
        return unpadded(self.value, array, spec) if array.shape == self.value.shape else array


def _as_linear(x: np.ndarray) -> np.ndarray:
    """The result of a Gemm (T, F) or of a 1x1 convolution (1, F, 1, T) in the layout of a linear: (1, T, F)."""
    return x[:, :, 0].swapaxes(1, 2) if x.ndim == 4 else x.reshape(1, *x.shape[-2:])


@dataclass(frozen=True, eq=False)
class Dataflow(Flow):
    """The places of one graph of an export. Raises InputError for a file that is not a graph."""

    folder: Path
    spec: GraphSpec

    @cached_property
    def proto(self) -> ModelProto:
        """The graph without its weights."""
        path = self.folder / "model.onnx"
        try:
            return onnx.load(path, load_external_data=False)
        except (OSError, DecodeError) as error:
            raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200]}; export again") from None

    @cached_property
    def places(self) -> dict[str, Place]:
        """Name -> place, in computing order."""
        order = {name: i for i, node in enumerate(self.proto.graph.node) for name in node.output}
        pieces: dict[str, list[str]] = {}
        known = set(self.spec.taps)
        for name in order:
            tap = _tap_of_piece(name, known)
            if tap:
                pieces.setdefault(tap, []).append(name)
        outputs = {value.name: value for value in self.spec.outputs if value.name in order}
        found = [
            Place(name if name in known or str(value.tap) in pieces else str(value.tap or name), str(value.tap or name),
                  (name,), value, True)
            for name, value in outputs.items()
        ]  # fmt: skip
        found += [
            Place(tap, tap, tuple(sorted(names, key=_number)), self.spec.value(tap), False)
            for tap, names in pieces.items()
            if tap not in outputs
        ]
        computed = {tap: i for i, tap in enumerate(self.spec.taps)}  # a tap, and then the others that show it
        found.sort(key=lambda one: (computed.get(one.tap, len(computed)), one.name != one.tap))
        return {one.name: one for one in found}

    @cached_property
    def _steps(self) -> tuple[dict[str, dict[str, bool]], dict[str, dict[str, list[NodeProto]]]]:
        """Place -> the places that it follows from directly, and whether that step is partial; place -> the nodes of
        each of its values.
        """
        owner = {name: one.name for one in self.places.values() for name in one.values}
        whose: dict[str, dict[tuple[str, bool, bool], None]] = {}  # value -> (value of a place, unchanged, partial)
        nodes: dict[str, list[NodeProto]] = {}  # value -> the nodes since the last places
        behind: dict[str, dict[str, dict[str, bool]]] = {name: {} for name in self.places}
        own: dict[str, dict[str, list[NodeProto]]] = {name: {} for name in self.places}
        for node in self.proto.graph.node:
            found: dict[tuple[str, bool, bool], None] = {}
            since: dict[str, NodeProto] = {}
            for name in node.input:
                came = {(name, True, False): None} if name in owner else whose.get(name, {})
                since |= {} if name in owner else {each.name: each for each in nodes.get(name, [])}
                for source, as_it_is, partial in came:
                    carried = as_it_is and node.op_type in CARRIES | PICKS
                    found[source, carried, partial or (as_it_is and node.op_type in PICKS)] = None
            since[node.name] = node
            for name in node.output:
                whose[name], nodes[name] = found, list(since.values())
                if name in owner:
                    own[owner[name]][name] = list(since.values())
                    for source, _, partial in found:
                        seen = behind[owner[name]].setdefault(owner[source], {})
                        seen[source] = seen.get(source, True) and partial
        loses = {name: one.tap.endswith(NORMS) for name, one in self.places.items()}
        steps = {
            name: {
                source: loses[name] or len(seen) < len(self.places[source].values) or any(seen.values())
                for source, seen in sources.items()
            }
            for name, sources in behind.items()
        }
        return steps, own

    @property
    def behind(self) -> dict[str, dict[str, bool]]:
        """Place -> the places that it follows from directly -> whether it may be right although they are wrong."""
        return self._steps[0]

    @cached_property
    def nodes(self) -> dict[str, list[NodeProto]]:
        """Place -> the nodes that compute it from the places before it, in the order of the graph."""
        return {name: self.computing(name) for name in self.places}

    def computing(self, name: str, pieces: Collection[str] = ()) -> list[NodeProto]:
        """The nodes that compute a place, or some pieces of it, from the places before it, in the graph's order."""
        own = self._steps[1][name]
        found = {node.name: node for piece, nodes in own.items() if not pieces or piece in pieces for node in nodes}
        return list(found.values())

    def save(self, folder: Path, shown: Collection[str], until: bool = False) -> Path:
        """Writes the graph's folder again, with places as outputs after its own; returns its path.

        `until`: they are its only outputs, and nodes that they do not need are left out. The folder has the graph's
        name, because a device asks for it by that name.
        """
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        graph = proto.graph
        values = [name for one in self.places if one in shown for name in self.places[one].values]
        infos = {info.name: info for info in [*graph.value_info, *graph.output]}
        outputs = [info.name for info in graph.output] * (not until)
        outputs += [name for name in values if name not in outputs]
        if unknown := [name for name in outputs if name not in infos]:
            raise InputError(f"the graph does not say what shape {unknown[0]} has; export again")
        if until:
            _prune(graph, outputs)
        inner = [info for info in graph.value_info if info.name not in outputs]
        _replace(graph.output, [infos[name] for name in outputs])
        _replace(graph.value_info, inner)
        target = folder / self.spec.name
        target.mkdir(parents=True)
        with open(target / "model.data", "wb") as file:
            for piece in self._weights(graph):
                file.write(piece)
        (target / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        if (self.folder / "model.encodings").is_file():
            content = read_json(self.folder / "model.encodings", 1 << 30)
            names = _names(graph)
            text = json.dumps({key: _of(names, part) for key, part in content.items()})
            (target / "model.encodings").write_text(text, encoding="utf-8")
        return target

    def _weights(self, graph: Any) -> Iterator[bytes]:
        """The bytes of `model.data` for the weights that a graph still has; the graph gets their new places."""
        stored = [one for one in graph.initializer if one.data_location == TensorProto.EXTERNAL]
        old = {one.name: external_data_helper.ExternalDataInfo(one) for one in stored}
        for one in stored:
            del one.external_data[:]
        layout, end = assign_offsets(stored), 0
        with open(self.folder / "model.data", "rb") as file:
            for name, (offset, length) in layout.items():
                yield bytes(offset - end)
                file.seek(old[name].offset or 0)
                for start in range(0, length, CHUNK):
                    piece = file.read(min(CHUNK, length - start))
                    if not piece:
                        raise InputError(f"{self.folder / 'model.data'} ends before {name} does; export again")
                    yield piece
                end = offset + length


def _tap_of_piece(name: str, known: Collection[str]) -> str | None:
    """The tap that a value is, or is a piece of: `…W_pack.0.7` is a piece of W_pack."""
    while name not in known:
        name, _, last = name.rpartition(".")
        if not last.isdecimal():
            return None
    return name


def _number(name: str) -> list[int]:
    """Where a piece stands among the others: its numbers at the end."""
    numbers: list[int] = []
    for word in reversed(name.split(".")):
        if not word.isdecimal():
            break
        numbers.insert(0, int(word))
    return numbers


def _prune(graph: Any, outputs: Iterable[str]) -> None:
    """Removes everything that the outputs do not need."""
    needed, nodes = set(outputs), []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    gives = {name for node in nodes for name in node.output}
    _replace(graph.node, nodes[::-1])
    _replace(graph.input, [info for info in graph.input if info.name in needed])
    _replace(graph.initializer, [one for one in graph.initializer if one.name in needed])
    _replace(graph.value_info, [info for info in graph.value_info if info.name in gives])


def _replace(field: Any, messages: Sequence[Any]) -> None:
    kept = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(kept)


def _names(graph: Any) -> set[str]:
    """All that has a name in a graph, and so may have an encoding."""
    infos = [*graph.input, *graph.value_info, *graph.output, *graph.initializer]
    return {info.name for info in infos}


def _of(names: set[str], part: Any) -> Any:
    """A section of an encodings file, reduced to the names that a graph has."""
    if isinstance(part, list):
        return [entry for entry in part if not isinstance(entry, dict) or entry.get("name") in names]
    return part
