"""A graph on grids whose inputs and outputs are codes, as an NPU's runtime feeds and takes them.

    float border   x (float32) -> QuantizeLinear -> codes -> DequantizeLinear -> ...      any engine, any host
    coded border   x (uint16)                             -> DequantizeLinear -> ...      Genie, a context binary

Names stay. `coded` makes the second from the first, `read_borders` reads the grids back out of either, and `Border`
takes floats to codes and back, so that whoever has floats can run both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from refimpl.errors import InputError

CODES = {TensorProto.UINT8: np.uint8, TensorProto.UINT16: np.uint16}
LARGEST = 1 << 30  # bytes of a model.onnx without its weights


class Border:
    """The grid of one input or output: real = (code - zero_point) * scale, in float32."""

    def __init__(self, scale: float, zero_point: int, bits: int):
        self.scale, self.zero_point, self.bits = float(scale), int(zero_point), int(bits)

    def __repr__(self) -> str:
        return f"Border({self.scale:.6g}, {self.zero_point}, {self.bits})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Border) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def codes(self, x: np.ndarray) -> np.ndarray:
        """The codes of floats, as ONNX's QuantizeLinear rounds: halves to even."""
        scaled = np.rint(np.asarray(x, np.float32) / np.float32(self.scale)) + self.zero_point
        return np.clip(scaled, 0, 2**self.bits - 1).astype(np.uint8 if self.bits == 8 else np.uint16)

    def floats(self, codes: np.ndarray) -> np.ndarray:
        """The floats that codes stand for."""
        return (codes.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


def coded(proto: ModelProto) -> ModelProto:
    """The graph with codes at its border, in the form that Qualcomm's compiler takes as a whole.

    Beside the border this takes two changes: the embedding gathers floats, and each reader has a DequantizeLinear of
    its own. Without them, changes of layout would move in between the two nodes of a pair.

    Raises InputError for an input or output that is a float without a grid.
    """
    made = ModelProto()
    made.CopyFrom(proto)
    edit = _Edit(made)
    edit.gather_floats()
    edit.open_inputs()
    edit.open_outputs()
    edit.split_readers()
    edit.finish()
    return made


class _Edit:
    """A graph that is being changed. `put` keeps the nodes in computing order."""

    def __init__(self, proto: ModelProto):
        self.graph = proto.graph
        self.nodes: list[NodeProto] = list(proto.graph.node)
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}

    def users(self) -> dict[str, list[NodeProto]]:
        """Name -> the nodes that read it."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def makers(self) -> dict[str, NodeProto]:
        """Name -> the node that gives it."""
        return {name: node for node in self.nodes for name in node.output}

    def put(self, after: NodeProto, *nodes: NodeProto) -> None:
        """Inserts nodes behind another one."""
        at = next(i for i, node in enumerate(self.nodes) if node is after) + 1
        self.nodes[at:at] = nodes

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Removes nodes."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]

    def gather_floats(self) -> None:
        """Turns codes -> Gather -> DequantizeLinear into DequantizeLinear -> Gather -> a pair."""
        users = self.users()
        for gather in [node for node in self.nodes if node.op_type == "Gather" and node.input[0] in self.initializers]:
            readers = users.get(gather.output[0], [])
            if len(readers) != 1 or readers[0].op_type != "DequantizeLinear":
                continue
            table, raw, step = gather.input[0], gather.output[0], list(readers[0].input[1:])
            gather.input[0], gather.output[0] = f"{table}.floats", f"{raw}.floats"
            whole = helper.make_node("DequantizeLinear", [table, *step], [gather.input[0]], gather.input[0])
            self.nodes.insert(0, whole)
            self.put(gather, helper.make_node("QuantizeLinear", [gather.output[0], *step], [raw], f"{raw}.codes"))

    def replace(self, old: str, new: str) -> None:
        """Makes every reader of the value `old` read `new` instead."""
        for node in self.nodes:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new

    def open_inputs(self) -> None:
        """Removes the QuantizeLinear of each input, because the host quantizes."""
        users = self.users()
        for value in self.graph.input:
            if value.type.tensor_type.elem_type != TensorProto.FLOAT:
                continue
            quantizers = [node for node in users.get(value.name, []) if node.op_type == "QuantizeLinear"]
            if len(quantizers) != 1 or len(users[value.name]) != 1:
                raise InputError(f"{value.name} is a float without a grid of its own; export with encodings")
            self.replace(quantizers[0].output[0], value.name)
            value.type.tensor_type.elem_type = self.initializers[quantizers[0].input[2]].data_type
            self.remove(quantizers)

    def open_outputs(self) -> None:
        """Removes the DequantizeLinear of each output; it stays inside if a node there reads its floats, too."""
        for value in self.graph.output:
            if value.type.tensor_type.elem_type != TensorProto.FLOAT:
                continue
            last = self.makers()[value.name]
            if last.op_type != "DequantizeLinear" or last.input[0] in self.initializers:
                raise InputError(f"{value.name} is a float without a grid of its own; export with encodings")
            codes, inside = last.input[0], f"{value.name}.floats"
            value.type.tensor_type.elem_type = self.initializers[last.input[2]].data_type
            if value.name in self.users():
                self.replace(value.name, inside)
                last.output[0] = inside
            else:
                self.remove([last])
            maker = self.makers()[codes]
            maker.output[list(maker.output).index(codes)] = value.name
            self.replace(codes, value.name)

    def split_readers(self) -> None:
        """Gives each reader of a value a DequantizeLinear of its own."""
        places: dict[str, list[tuple[NodeProto, int]]] = {}
        for reader in self.nodes:
            for i, name in enumerate(reader.input):
                places.setdefault(name, []).append((reader, i))
        nodes: list[NodeProto] = []
        for node in self.nodes:
            nodes.append(node)
            if node.op_type != "DequantizeLinear":
                continue
            for number, (reader, i) in enumerate(places.get(node.output[0], [])[1:], 1):
                twin = NodeProto()
                twin.CopyFrom(node)
                twin.name = twin.output[0] = f"{node.output[0]}.reader{number}"
                reader.input[i] = twin.name
                nodes.append(twin)
        self.nodes = nodes

    def finish(self) -> None:
        """Puts the nodes back, and the initializers that they read."""
        used = {name for node in self.nodes for name in node.input}
        ends = {value.name for value in (*self.graph.input, *self.graph.output)}
        made = {name for node in self.nodes for name in node.output}
        floats = {node.output[0] for node in self.nodes if node.op_type == "QuantizeLinear"}
        kept = [v for v in self.graph.value_info if v.name in made - ends - floats]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(t for name, t in self.initializers.items() if name in used)
        self.graph.value_info.extend(kept)


def read_borders(path: Path) -> dict[str, Border]:
    """The grids of a graph's inputs and outputs, for either border. An end without a grid is left out.

    Raises InputError for a file that is not an ONNX model.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is larger than any graph without its weights; put them into model.data")
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX model: {error}; export it again") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return borders_of(graph, str(path.parent))


def borders_of(graph: onnx.GraphProto, folder: str = "") -> dict[str, Border]:
    """The same for a graph in memory, whose weights are in `folder`."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, Border] = {}

    def learn(name: str, node: NodeProto) -> None:
        step = [tensors[part] for part in node.input[1:3] if part in tensors]
        if len(step) == 2 and step[1].data_type in CODES and all(math.prod(part.dims) == 1 for part in step):
            scale, zero_point = (numpy_helper.to_array(part, folder) for part in step)
            found[name] = Border(scale.item(), zero_point.item(), zero_point.dtype.itemsize * 8)

    reads = {value.name for value in graph.input} - tensors.keys()
    gives = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if node.input[0] in reads:
                learn(node.input[0], node)
            if node.output[0] in gives:
                learn(node.output[0], node)
    return found


def encoded(arrays: Mapping[str, np.ndarray], borders: Mapping[str, Border]) -> dict[str, np.ndarray]:
    """Inputs as a coded border takes them: floats become codes; codes and ids stay."""
    return {
        name: borders[name].codes(x) if name in borders and x.dtype.kind == "f" else x for name, x in arrays.items()
    }


def decoded(arrays: Mapping[str, np.ndarray], borders: Mapping[str, Border]) -> dict[str, np.ndarray]:
    """Outputs of a coded border as floats."""
    return {
        name: borders[name].floats(x) if name in borders and x.dtype.kind == "u" else x for name, x in arrays.items()
    }


def across(
    path: Path, inputs: Sequence[dict[str, np.ndarray]], run: Callable[[list[dict[str, np.ndarray]]], list]
) -> list[dict[str, np.ndarray]]:
    """Runs the graph in a file on floats, whatever its border: where it has codes, they are converted both ways.

    If the inputs hold codes, nothing is converted, and the outputs of a coded border are codes, too.
    """
    given = any(x.dtype.kind == "u" for fed in inputs for x in fed.values())
    if given or not _is_coded(path):
        return run(list(inputs))
    borders = read_borders(path)
    return [decoded(outputs, borders) for outputs in run([encoded(fed, borders) for fed in inputs])]


def _is_coded(path: Path) -> bool:
    values = onnx.load(path, load_external_data=False).graph
    return any(v.type.tensor_type.elem_type in CODES for v in (*values.input, *values.output))
