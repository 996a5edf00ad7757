"""The compiler's own record, read by tap: which of Qualcomm's operations a tensor of ours became.

    operations = read_provenance("build/bin", "token_ar1_cl64_2_of_2")
    operations.of("model.layers.0.self_attn.scores")     # MatMul (scores.raw), Convert (scores.codes)

`refimpl compile` keeps that record beside the binaries (`trace/{graph}.json`). Operations in it under none of our names
are changes of layout that the compiler added.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refimpl.errors import InputError, at_most
from refimpl.files import read_json

# What exports, ONNX Runtime and the compiler add to a tensor's name, in any number and order.
_ADDED = re.compile(
    r"(\.(raw|codes|on_grid|wide|floats|reader\d+)|_token_\d+|/duplicated|_out\d+|_(q|dq|quantized|dequantized)|_converted)$"
)

MOST = 3  # tensors that a sentence tells of


@dataclass(frozen=True)
class Operation:
    """One operation of the compiled graph: its name and type there, and the ONNX nodes that became it."""

    name: str
    type: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.type} ({self.name})"

    @cached_property
    def names(self) -> set[str]:
        """All that it is called, without additions."""
        return {plain(self.name), *map(plain, self.nodes)}


@dataclass(frozen=True)
class Provenance:
    """The operations of one compiled graph, in its order."""

    graph: str
    operations: tuple[Operation, ...]

    def of(self, tap: str) -> tuple[Operation, ...]:
        """The operations that compute a tensor, by its tap: for all heads, where those are apart.

        Empty if it is inside of another operation. `of_nodes` asks by the nodes that lie between two taps.
        """
        wanted = re.compile(re.escape(tap) + r"(\.\d+)*(\.(raw|codes).*)?")
        made = re.compile(re.escape(tap) + r"(\.\d+)*\.(raw|codes)\b.*")  # without one: read, not computed
        return tuple(
            one for one in self.operations
            if wanted.fullmatch(plain(one.name)) or any(made.fullmatch(node) for node in one.nodes)
        )  # fmt: skip

    def of_nodes(self, nodes: Iterable[str]) -> tuple[Operation, ...]:
        """The operations that some ONNX nodes became, by the names of the nodes or of their outputs."""
        wanted = set(map(plain, nodes))
        return tuple(one for one in self.operations if wanted & one.names)

    def unknown(self, names: set[str]) -> tuple[Operation, ...]:
        """Operations that come from none of these names."""
        known = set(map(plain, names))
        return tuple(one for one in self.operations if not known & one.names)


def plain(name: str) -> str:
    """A name without what was added to it on the way.

    >>> plain("model.layers.0.self_attn.scores.raw_token_12")
    'model.layers.0.self_attn.scores'
    """
    while (short := _ADDED.sub("", name)) != name:
        name = short
    return name


def read_provenance(folder: str | Path, graph: str) -> Provenance:
    """The record of one graph in a folder of binaries. Raises InputError if it is not there, or damaged."""
    path = Path(folder) / "trace" / f"{graph}.json"
    return Provenance(graph, tuple(_operations(path)))


def _operations(path: Path) -> Iterator[Operation]:
    for name, entry in read_json(path).items():
        try:
            (kind,), nodes = entry
            yield Operation(name, str(kind), tuple(str(node) for node in nodes))
        except (TypeError, ValueError):
            raise InputError(f"{path} is damaged at {name!a:.60}; compile again") from None


@dataclass(frozen=True)
class Made:
    """What the compiler made of one tensor: operations, none if the tensor is inside of another's operation."""

    tap: str
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        if not self.operations:
            return f"{self.tap} is inside of another operation"
        kinds = Counter(one.type for one in self.operations)
        said = " and ".join(f"{count} {kind}" if count > 1 else kind for kind, count in kinds.items())
        return f"{self.tap} became {said}{', such as' if len(self.operations) > 1 else ':'} {next(self.lines())}"

    def lines(self) -> Iterator[str]:
        """Each operation with the ONNX nodes that became it."""
        for one in self.operations:
            nodes = [node for node in dict.fromkeys(map(plain, one.nodes)) if not node.endswith(".weight")]
            yield f"{one} of {at_most(nodes, 4)}"


def made_of(folder: str | Path, graph: str, taps: Iterable[str]) -> list[Made]:
    """What became of some tensors of a graph, in their order.

    Raises InputError if the folder of binaries has no record of the graph.
    """
    record = read_provenance(folder, graph)
    return [Made(tap, record.of(tap) or record.of({"lm_head": "logits"}.get(tap, tap))) for tap in taps]


def told(graph: str, made: Sequence[Made]) -> str:
    """A sentence for a verdict about the first few tensors; the page of `verify --html` has all of them."""
    more = f"; and {len(made) - MOST} more tensors, which --html lists" if len(made) > MOST else ""
    return f"in {graph}, by the record of Qualcomm's compiler: {'; '.join(map(str, made[:MOST]))}{more}"
