"""Compares what Genie fed its graphs, and what it got, with what its host should feed, call by call.

    host = Host(model, "build/b2-7b")
    with Genie("genie", capture=True) as genie:
        text = "".join(genie.say("白日依山尽，", 20))
        print(judge_calls(host, genie.calls(), model.tokenizer.encode("白日依山尽，")))

`Host` says what every input should be, in codes. So each input is equal, or a line says where it differs: in which id,
at which position, in which token's mask, in which slot of the cache. With an executor, each output is compared with
what the same graph gives there for Genie's inputs; on the emulation the codes are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from export.files.graph_folder import CACHE
from export.graphs.plan import Arrays
from export.phone.host import CodedGraph, Host, in_codes
from export.run.executor import Executor
from export.run.genie import Call
from refimpl.errors import InputError, at_most


@dataclass(frozen=True)
class Fed:
    """The verdict on captured calls. `lines` are what was not as it should be; `tokens`: what Genie chose, in order.

    `logits`: of each choice, as floats. `inputs`, `outputs`: how many tensors were compared.
    """

    lines: tuple[str, ...]
    calls: int
    inputs: int
    outputs: int
    tokens: tuple[int, ...]
    logits: tuple[np.ndarray, ...]

    def __bool__(self) -> bool:
        return not self.lines

    def __str__(self) -> str:
        checked = f"{self.inputs} inputs" + (f" and {self.outputs} outputs" if self.outputs else "")
        if not self.lines:
            return f"Genie fed what its host should: {checked} of {self.calls} calls, equal in every code"
        return "\n".join(
            [*self.lines, f"{len(self.lines)} of {checked} of {self.calls} calls are not as they should be"]
        )


def judge_calls(host: Host, calls: Iterable[Call], ids: Sequence[int], executor: Executor | None = None) -> Fed:
    """Compares the calls of one query, whose prompt is `ids`, with `host`, which may have had other queries before.

    Each token after the prompt has to be the likeliest by the logits before it, so the query has to be greedy.
    `executor`: what runs the same graphs, to compare outputs with; None leaves those out.

    Raises InputError for calls of graphs that are not the host's.
    """
    lines: list[str] = []
    todo, count, inputs, outputs = list(ids), 0, 0, 0
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    known = {graph.name: graph for graphs in host.graphs.values() for graph in graphs}
    for number, group in groupby(calls, key=lambda call: call.number):
        before, new = Arrays(), list[int]()
        for call in group:
            graph = known.get(call.graph)
            if graph is None:
                raise InputError(
                    f"Genie ran {call.graph}, the export has {at_most(known)}; give the bundle's own export"
                )
            given, got = _shaped(call.inputs, graph.shapes), _shaped(call.outputs, graph.outputs)
            if "input_ids" in given:
                new, todo, more = _new_ids(given["input_ids"].ravel().tolist(), todo, graph, number)
                lines += more
            expected = host.inputs(graph, new, before)
            for name, array in expected.items():
                inputs += 1
                if not np.array_equal(given[name], array):
                    lines.append(f"call {number}, {graph.name}: {_difference(host, graph, name, given[name], array)}")
            if executor is not None:
                answer = in_codes(executor, graph, given)
                for name, array in got.items():
                    outputs += 1
                    lines += _off(graph, name, array, answer[name], len(new), number)
            host.take(got, len(new))
            before |= got
            count += 1
        host.advance(len(new))
        if not todo and graph is not None:
            row = graph.borders["logits"].floats(got["logits"].reshape(graph.tokens, -1)[len(new) - 1])
            logits.append(row)
            tokens.append(int(row.argmax()))
            todo = [tokens[-1]]
    return Fed(tuple(lines), count, inputs, outputs, tuple(tokens), tuple(logits))


def _new_ids(
    given: list[int], todo: list[int], graph: CodedGraph, number: int
) -> tuple[list[int], list[int], list[str]]:
    """The ids of a call that are not padding, those that are still to come, and what is wrong."""
    wanted, where = todo[: graph.tokens], f"call {number}, {graph.name}: input_ids"
    if given[: len(wanted)] == wanted:
        return wanted, todo[graph.tokens :], []
    behind = wanted[: graph.tokens - 1]
    if given[1 : len(behind) + 1] == behind:
        line = f"{where} begins with {given[0]}, which nobody asked for: set bos-token of genie_config.json to -1"
        return given[: len(behind) + 1], todo[len(behind) :], [line]
    line = f"{where} has {given[: len(wanted)]!s:.60}, expected {wanted!s:.60}"
    return given[: len(wanted)], todo[graph.tokens :], [line]


def _difference(host: Host, graph: CodedGraph, name: str, given: np.ndarray, expected: np.ndarray) -> str:
    """How one input differs from what the host should feed."""
    if name == "input_ids":
        return f"input_ids is padded with {given.ravel()[-1]}, expected {host.pad}"
    if name == "attention_mask":
        rows, wanted = given.reshape(graph.tokens, -1), expected.reshape(graph.tokens, -1)
        row = int(np.argmax((rows != wanted).any(1)))
        seen = [np.flatnonzero(one).tolist() for one in (rows[row], wanted[row])]
        if seen[0] != seen[1]:
            return f"attention_mask: token {row} looks at slots {_spans(seen[0])}, expected {_spans(seen[1])}"
        return f"attention_mask has the code {rows[row].max()} where token {row} looks, expected {wanted[row].max()}"
    if name.startswith("position_ids"):
        return f"{name}: {_positions(host, graph, name, given, expected)}"
    if found := CACHE.fullmatch(name):
        axis = -1 if found[1] == "key" else -2
        moved = np.moveaxis((given != expected), axis, 0).reshape(graph.past, -1)
        slots = np.flatnonzero(moved.any(1)).tolist()
        off = int(np.abs(given.astype(int) - expected).max())
        return f"{name}: slots {_spans(slots)} are not what came out before, by up to {off} codes"
    off = int(np.abs(given.astype(int) - expected).max())
    return f"{name} is not what the part before gave, by up to {off} codes"


def _positions(host: Host, graph: CodedGraph, name: str, given: np.ndarray, expected: np.ndarray) -> str:
    """At which position a token stands by its row of a rotary table, and at which it should."""
    rows, wanted = (x.reshape(graph.tokens, -1).astype(int) for x in (given, expected))
    off = np.abs(rows - wanted).max(1)
    row = int(off.argmax())
    if off.max() <= 1:
        return f"codes are rounded in another way: up to 1 code off in {int((off > 0).sum())} rows"
    tables = host.model.position_tables(np.arange(graph.context)[None], np.float64)
    border = graph.borders[name]
    table = np.floor(np.asarray(tables[0 if name.endswith("cos") else 1]).reshape(graph.context, -1) / border.scale
                     + border.zero_point)  # fmt: skip
    near = np.abs(table - rows[row]).max(1)
    if near.min() <= 2:
        position = int(np.argmin(np.abs(table - wanted[row]).max(1)))
        return f"token {row} stands at position {int(near.argmin())}, expected {position}"
    return f"token {row} stands at no position of this model (rope-theta?), {int(off.max())} codes off"


def _off(graph: CodedGraph, name: str, got: np.ndarray, wanted: np.ndarray, count: int, number: int) -> list[str]:
    """What is wrong with an output, at the tokens that are not padding."""
    found = CACHE.fullmatch(name)
    axis = -1 if found and found[1] == "key" else -2
    got, wanted = (np.moveaxis(x, axis, 0)[:count].astype(int) for x in (got, wanted))
    off = int(np.abs(got - wanted).max())
    return [f"call {number}, {graph.name}: {name} is up to {off} codes from what the graph gives"] if off else []


def _shaped(arrays: Arrays, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Genie's arrays in the shapes of the graph: it writes axes of size 1 elsewhere."""
    if missing := [name for name in shapes if name not in arrays]:
        raise InputError(f"Genie's dump has no {at_most(missing)}; give the bundle's own export")
    return {name: arrays[name].reshape(shape) for name, shape in shapes.items()}


def _spans(slots: Sequence[int]) -> str:
    """0-3, 48, 50-52 of a list of numbers."""
    return at_most(_runs(slots), 6) or "none"


def _runs(slots: Sequence[int]) -> Iterator[str]:
    for _, group in groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0]):
        run = [slot for _, slot in group]
        yield f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])
