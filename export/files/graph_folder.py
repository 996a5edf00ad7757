"""A graph's folder, whoever made it: `model.onnx`, weights and encodings beside it, and what its name says.

Weights are never read. A damaged file is a fact about the folder; the rest of the folder is read all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from export.files.skeleton import GraphInfo, GridInfo, ModelInfo, TensorInfo, ValueInfo, read_grids, read_onnx
from export.graphs.grids import MOVES
from refimpl.errors import InputError

NAME = re.compile(r"(?:(prompt|token)_)?ar(\d{1,6})_cl(\d{1,7})_(\d{1,4})_of_(\d{1,4})")
ALONE = re.compile(r"(?:prompt|token)_ar\d{1,6}_cl\d{1,7}_(?:model|lm_head)\b[\w.]*")  # a module, not a part
CACHE = re.compile(r"past_(key|value)_(\d{1,6})_(in|out)")
HOST = ("attention_mask", "position_ids_cos", "position_ids_sin")


class Called(NamedTuple):
    """What a folder's name says: prompt or token, tokens at a time, context, and which part of how many."""

    phase: str | None
    tokens: int
    context: int
    number: int
    total: int


@dataclass
class GraphFolder:
    """A graph's folder and what is known of it. `damage` tells why files of it cannot be read."""

    folder: Path
    damage: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.folder.resolve().name
        self.files = sorted(self.folder.iterdir())
        self.model: ModelInfo = ModelInfo(GraphInfo())
        self.grids: dict[str, GridInfo] | None = None
        try:
            self.model = read_onnx(self.of_kind(".onnx")[0])
            if listed := self.of_kind(".encodings"):
                self.grids = read_grids(listed[0])
        except InputError as error:
            self.damage.append(str(error))

    def of_kind(self, suffix: str) -> list[Path]:
        return [path for path in self.files if path.suffix == suffix and path.is_file()]

    @property
    def graph(self) -> GraphInfo:
        return self.model.graph

    @cached_property
    def rounds(self) -> bool:
        """Whether the graph rounds its activations by itself, so that no encodings are needed."""
        return any(node.op == "QuantizeLinear" for node in self.graph.nodes)

    @cached_property
    def called(self) -> Called | None:
        """What the name says, if it is that of a part."""
        found = NAME.fullmatch(self.name.removesuffix(".aimet").removesuffix(".onnx"))
        return Called(found[1], *(int(found[i]) for i in (2, 3, 4, 5))) if found else None

    @property
    def part(self) -> Called:
        """What the name says, for a folder of `read_parts`, which is always named like a part."""
        assert self.called is not None, self.name
        return self.called

    @cached_property
    def is_language_model(self) -> bool:
        if ALONE.fullmatch(self.name):
            return False
        return bool(self.called) or any(CACHE.fullmatch(value.name) for value in self.graph.inputs)

    @cached_property
    def window(self) -> tuple[int, int] | None:
        """Tokens at a time and context, by the mask's shape or else the name."""
        for value in self.graph.inputs:
            if value.name == "attention_mask" and value.shape and len(value.shape) == 4:
                tokens, context = value.shape[2:]
                if isinstance(tokens, int) and isinstance(context, int):
                    return tokens, context
        return (self.called.tokens, self.called.context) if self.called else None

    @cached_property
    def ends(self) -> list[ValueInfo]:
        return [*self.graph.inputs, *self.graph.outputs]

    @cached_property
    def types(self) -> dict[str, int]:
        """Name -> ONNX's number of the type, of every tensor that has one."""
        found = {value.name: value.dtype for value in [*self.graph.values, *self.ends] if value.dtype}
        found |= {tensor.name: tensor.dtype for tensor in self.graph.initializers}
        for node in self.graph.nodes:
            if node.op == "Constant" and node.tensors and node.outputs:
                found[node.outputs[0]] = node.tensors[0].dtype
            elif node.op == "Cast" and node.outputs:
                found.setdefault(node.outputs[0], node.ints.get("to", 0))
        return found

    @cached_property
    def constants(self) -> dict[str, TensorInfo]:
        """The tensors that are known before the graph runs: initializers, and the values of Constants."""
        made = {node.outputs[0]: node.tensors[0] for node in self.graph.nodes
                if node.op == "Constant" and node.tensors and node.outputs}  # fmt: skip
        return {**{tensor.name: tensor for tensor in self.graph.initializers}, **made}

    @cached_property
    def standing(self) -> dict[str, GridInfo]:
        """Name -> the grid of a tensor: its own, or that of the tensor which was moved there."""
        found = dict(self.grids or {})
        for node in self.graph.nodes:
            sources = [found.get(name) for name in node.inputs]
            if node.op in MOVES and sources:
                grid = sources[0]
            elif node.op == "Concat" and sources:
                grid = sources[0] if all(source == sources[0] for source in sources) else None
            elif node.op == "Gather" and node.inputs and node.inputs[0] in self.constants:
                grid = sources[0]
            else:
                continue
            for name in node.outputs:
                if grid:
                    found.setdefault(name, grid)
        return found

    def cache(self, values: list[ValueInfo]) -> dict[tuple[int, str], ValueInfo]:
        """The keys and values among a graph's inputs or outputs, by layer and kind."""
        return {(int(found[2]), found[1]): value for value in values if (found := CACHE.fullmatch(value.name))}

    @property
    def reads(self) -> ValueInfo | None:
        """The hidden state or the ids that come in."""
        inputs = [v for v in self.graph.inputs if v.name not in HOST and not CACHE.fullmatch(v.name)]
        return inputs[0] if inputs else None

    @property
    def gives(self) -> ValueInfo | None:
        """The hidden state or the logits that go out."""
        outputs = [value for value in self.graph.outputs if not CACHE.fullmatch(value.name)]
        return outputs[0] if outputs else None


def read_folders(folder: str | Path) -> list[GraphFolder]:
    """The graph in a folder; or the graphs in the folders inside it, by name.

    Raises InputError if it is not a folder, or has no ONNX file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with model.onnx, or with a folder for each graph")
    try:
        here = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        found = [path for path in here if any(_is_onnx(inside) for inside in path.iterdir())]
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}; mend its permissions") from None
    if not found:
        raise InputError(f"{folder} has no .onnx in it, and no folder with one; give the folder of an export")
    return [GraphFolder(path) for path in (found[:1] if folder in found else found)]


def read_parts(folder: str | Path) -> list[GraphFolder]:
    """The graphs in a folder. Raises InputError unless each of them is undamaged and named like a part."""
    graphs = read_folders(folder)
    for graph in graphs:
        if graph.damage:
            raise InputError(f"{graph.folder}: {graph.damage[0]}")
        if not graph.called:
            raise InputError(
                f"{graph.folder} is not called {{prompt|token}}_ar{{S}}_cl{{C}}_{{i}}_of_{{N}}, so its part is not "
                "known; export again"
            )
    return graphs


def _is_onnx(path: Path) -> bool:
    return path.suffix == ".onnx" and path.is_file()
