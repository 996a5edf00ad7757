"""The inputs that Genie, as the host of a coded export, feeds its graphs: ids, positions, mask and cache, in codes.

    host = Host(model, "build/b2-7b")
    for token, logits in host.generate([639, 1179, 843], 20, Engine()):  ...

Its layout is not that of the goldens, which have their padding on the left:

    input_ids        new tokens first, behind them padding with the id that ends a text
    positions        of the new tokens, and 0 for padding; code = floor(x / scale + zero_point) of cos and sin
    attention_mask   a row for each new token: code 65535 (0) where it looks, 0 elsewhere; rows of padding are all 0
    past_*_in        slots 0 to n - 1 hold the n tokens before, as the very codes that came out; the others hold 128
    new tokens       are the last AR slots of the mask: those from CL - AR on, with a context of CL

`fed.py` compares what Genie fed with this. The layout was read from Genie's own debug dump (QNN 2.51).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from export.files.graph_folder import CACHE, GraphFolder, read_folders
from export.graphs.borders import Border, read_borders
from export.graphs.plan import Arrays
from export.run.executor import Executor
from refimpl.errors import InputError
from refimpl.model import Model


@dataclass(frozen=True)
class CodedGraph:
    """One graph of a coded export: its ends, with the grids of those that have one."""

    folder: Path
    name: str
    tokens: int
    context: int
    part: int
    shapes: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    borders: dict[str, Border]

    @classmethod
    def read(cls, graph: GraphFolder) -> CodedGraph:
        """Raises InputError for a graph whose name does not say its part, or whose cache is floats."""
        if graph.damage or not graph.called:
            raise InputError(f"{graph.folder}: {graph.damage[0] if graph.damage else 'its name does not say its part'}")
        _, tokens, context, part, _ = graph.called
        borders = read_borders(graph.of_kind(".onnx")[0])
        floats = [value.name for value in graph.ends if value.dtype == 1]
        if floats:
            raise InputError(f"{graph.name} takes {floats[0]} as floats; export it with --border codes")
        shapes, outputs = (
            {value.name: tuple(int(d or 0) for d in value.shape or ()) for value in values}
            for values in (graph.graph.inputs, graph.graph.outputs)
        )
        return cls(graph.folder, graph.name, tokens, context, part, shapes, outputs, borders)

    @cached_property
    def past(self) -> int:
        """Slots of its cache."""
        return self.context - self.tokens


class Host:
    """A conversation with the graphs of a coded export: the cache, and how long it is.

    Raises InputError for a folder that is not a coded export, or one of another model.
    """

    def __init__(self, model: Model, folder: str | Path):
        if model.config.alibi:
            raise InputError(
                f"{model.config.family} has ALiBi, whose mask differs from head to head: see refimpl bundle"
            )
        self.model = model
        self.graphs: dict[int, list[CodedGraph]] = {}
        for graph in map(CodedGraph.read, read_folders(folder)):
            self.graphs.setdefault(graph.tokens, []).append(graph)
        for parts in self.graphs.values():
            parts.sort(key=lambda graph: graph.part)
        self.pad = _end_of_text(model)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.length, self.cache = 0, Arrays()

    @property
    def context(self) -> int:
        return next(iter(self.graphs.values()))[0].context

    def inputs(self, graph: CodedGraph, ids: Sequence[int], before: Arrays) -> Arrays:
        """The inputs of a graph for new ids. `before`: what the parts before it gave."""
        fed = Arrays()
        for name, shape in graph.shapes.items():
            if name == "input_ids":
                fed[name] = np.array([[*ids, *[self.pad] * (graph.tokens - len(ids))]], np.int32)
            elif name == "attention_mask":
                fed[name] = self.mask(graph, len(ids))
            elif name in ("position_ids_cos", "position_ids_sin"):
                fed[name] = self.rotary(graph, name, len(ids))
            elif found := CACHE.fullmatch(name):
                fed[name] = self.past(graph, name, found[1])
            elif name in before:
                fed[name] = before[name]
            else:
                raise InputError(f"{graph.name} reads {name}, which no part before it gives; export all parts")
            fed[name] = fed[name].reshape(shape)
        return fed

    def mask(self, graph: CodedGraph, count: int) -> np.ndarray:
        """(tokens, context): the code of 0 where a new token looks, and 0 elsewhere."""
        border, mask = graph.borders["attention_mask"], np.zeros((graph.tokens, graph.context), np.uint16)
        for row in range(count):
            mask[row, : self.length] = border.zero_point
            mask[row, graph.past : graph.past + row + 1] = border.zero_point
        return mask

    def rotary(self, graph: CodedGraph, name: str, count: int) -> np.ndarray:
        """(tokens, D/2): codes of cos or sin at the positions of the new tokens; padding stands at position 0."""
        border = graph.borders[name]
        positions = np.zeros((1, graph.tokens), np.int64)
        positions[0, :count] = self.length + np.arange(count)
        table = self.model.position_tables(positions, np.float64)[0 if name.endswith("cos") else 1]
        codes = np.floor(np.asarray(table, np.float64) / border.scale + border.zero_point)
        return np.clip(codes, 0, 2**border.bits - 1).astype(np.uint16)

    def past(self, graph: CodedGraph, name: str, kind: str) -> np.ndarray:
        """The cache of a layer, in the layout of the graph's input."""
        shape = graph.shapes[name]
        held = np.full(shape, graph.borders[name].zero_point, np.uint8)
        known = self.cache.get(name)
        if known is not None:
            if kind == "key":
                held[..., : self.length] = known
            else:
                held[..., : self.length, :] = known
        return held

    def take(self, outputs: Arrays, count: int) -> None:
        """Keeps the keys and values of the new tokens among a graph's outputs; `advance` counts them."""
        for name, array in outputs.items():
            if found := CACHE.fullmatch(name):
                key, into = found[1] == "key", name.replace("_out", "_in")
                new = array[..., :count] if key else array[..., :count, :]
                old = self.cache.get(into)
                self.cache[into] = new if old is None else np.concatenate([old, new], -1 if key else -2)

    def advance(self, count: int) -> None:
        """Counts so many more tokens in the cache."""
        self.length += count

    def run(self, ids: Sequence[int], executor: Executor) -> np.ndarray:
        """Logits (ids, vocabulary) of some new ids, as floats, by the graphs of the size that Genie takes."""
        tokens = min(self.graphs) if len(ids) == 1 else max(self.graphs)
        before, outputs = Arrays(), Arrays()
        for graph in self.graphs[tokens]:
            outputs = in_codes(executor, graph, self.inputs(graph, ids, before))
            self.take(outputs, len(ids))
            before |= outputs
        self.advance(len(ids))
        return graph.borders["logits"].floats(outputs["logits"].reshape(tokens, -1)[: len(ids)])

    def generate(self, ids: Sequence[int], limit: int, executor: Executor) -> Iterator[tuple[int, np.ndarray]]:
        """The likeliest next token and all logits, one after the other, until the text ends or the context is full."""
        todo, size = list(ids), max(self.graphs)
        if not todo or self.length + len(todo) > self.context - 1:
            raise InputError(
                f"there are {len(todo)} ids for a context of {self.context} tokens; give fewer, at least one"
            )
        logits = np.empty(0)
        while todo:
            logits, todo = self.run(todo[:size], executor)[-1], todo[size:]
        for _ in range(limit):
            token = int(logits.argmax())
            yield token, logits
            if token == self.pad or self.length >= self.context - 1:
                return
            logits = self.run([token], executor)[-1]


def in_codes(executor: Executor, graph: CodedGraph, fed: Arrays) -> Arrays:
    """The outputs of a graph as codes. Given ids alone, an executor answers in floats, which are on the grids."""
    (outputs,) = executor.run(graph.folder, [fed])
    return {name: graph.borders[name].codes(x) if x.dtype.kind == "f" else x for name, x in outputs.items()}


def _end_of_text(model: Model) -> int:
    """The id that ends a text, by the generation config or else the model's; 2 if neither says one."""
    end = model.generation_config.get("eos_token_id", model.config.eos_token_id)
    ends = end if isinstance(end, list) else [end]
    return next((id for id in ends if type(id) is int), 2)
