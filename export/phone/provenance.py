"""The compiler's own record, read by tap: which of Qualcomm's operations a tensor of ours became.

    operations = read_provenance("build/bin", "token_ar1_cl64_2_of_2")
    operations.of("model.layers.0.self_attn.scores")     # MatMul (scores.raw), Convert (scores.codes)

`refimpl compile` keeps that record beside the binaries (`trace/{graph}.json`). Operations in it under none of our names
are changes of layout that the compiler added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refimpl.errors import InputError, at_most
from refimpl.files import read_json

# What exports, ONNX Runtime and the compiler add to a tensor's name, in any number and order.
_ADDED = re.compile(
    r"(\.(raw|codes|on_grid|wide|floats|reader\d+)|_token_\d+|/duplicated|_out\d+|_(q|dq|quantized|dequantized)|_converted)$"
)

MOST = 4  # operations of a tensor that a sentence names


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


def told(folder: str | Path, graph: str, taps: Iterable[str]) -> str:
    """A sentence for a verdict: what the compiler made of some tensors of a graph, with the ONNX nodes of each.

    Raises InputError if the folder of binaries has no record of the graph.
    """
    record, said = read_provenance(folder, graph), []
    for tap in taps:
        found = record.of(tap) or record.of({"lm_head": "logits"}.get(tap, tap))  # as the end of a graph is called
        for one in found[:MOST]:
            nodes = [node for node in dict.fromkeys(map(plain, one.nodes)) if not node.endswith(".weight")]
            said.append(f"{one} of {at_most(nodes, 4)}")
        if len(found) > MOST:
            said.append(f"{len(found) - MOST} more like these for {tap}")
        if not found:
            said.append(f"{tap} is inside of another operation")
    return f"in {graph} Qualcomm's compiler made: {'; '.join(said)}"
