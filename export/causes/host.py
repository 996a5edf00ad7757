"""What the host did with right outputs: it took another one, of another call or part, or put the padding elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.causes.evidence import Evidence, Guess
from export.graphs.plan import unpadded


def never_written(e: Evidence) -> Iterator[Guess]:
    """All values are zero, or the same number."""
    if e.device.size > 1 and np.ptp(e.device) == 0 and np.ptp(e.expected) > 0:
        yield Guess(f"all values are {e.device.flat[0]:g}: the output was never written", e.expected, certain=True)


def padding_side(e: Evidence) -> Iterator[Guess]:
    """The tokens stand on the left of the window instead of on the right."""
    if e.spec.real < e.spec.tokens:
        axis = e.value.token_axis
        left = np.moveaxis(np.moveaxis(e.raw, axis, 0)[: e.spec.real], 0, axis)
        left = (left.transpose(e.value.tap_axes) if e.value.tap_axes else left).astype(np.float64)
        yield Guess("the tokens stand on the left of the window, with the padding behind them; expected it before them",
                    e.expected, left)  # fmt: skip


def swapped(e: Evidence) -> Iterator[Guess]:
    """It is another tensor of the same shape: of this graph, or of another part."""
    for value in e.spec.outputs:
        other = unpadded(value, e.outputs[value.name], e.spec).astype(np.float64)
        if value.name != e.value.name and other.shape == e.expected.shape:
            why = ("the graph computes one for the other" if e.handed_on else
                   "two outputs have each other's names, or their order is another")  # fmt: skip
            yield Guess(f"it is {value.name}: {why}", other)
    for spec in e.references.specs.values():
        if spec.name != e.spec.name and spec.tokens == e.spec.tokens:
            for value in spec.outputs:
                if value.shape == e.value.shape and value.tap_axes == e.value.tap_axes:
                    other = e.references.golden(spec)[value.name]
                    yield Guess(f"it is {value.name} of {spec.name}: the parts, or the files, are in another order",
                                e.shown(other))  # fmt: skip


def stale(e: Evidence) -> Iterator[Guess]:
    """The output of another token, or of another call."""
    axis, tokens = e.axes.token, e.spec.real
    for j in {0, tokens - 1} if tokens > 1 else ():
        one = np.take(e.expected, [j], axis)
        yield Guess(
            f"every token has the output of token {j}: the others are stale", np.broadcast_to(one, e.expected.shape)
        )
    for spec in e.references.specs.values():
        if spec.part == e.spec.part and spec.name != e.spec.name:
            value = next((value for value in spec.outputs if value.tap == e.tap), None)
            if value is None or spec.real < tokens:
                continue
            given = e.run(e.references.inputs(spec), spec)[value.name]
            other = np.moveaxis(unpadded(value, given, spec), axis, 0)[-tokens:]
            yield Guess(f"it is the output of {spec.name}: of an earlier call, or of the other graph of the binary",
                        np.moveaxis(other, 0, axis).astype(np.float64))  # fmt: skip


def parts_exchanged(e: Evidence) -> Iterator[Guess]:
    """Another part's weights behind this part's name."""
    for other in e.references.specs.values():
        same = other.tokens == e.spec.tokens and len(other.part.layers) == len(e.spec.part.layers)
        same &= len(other.inputs) == len(e.spec.inputs) and len(other.outputs) == len(e.spec.outputs)
        if not same or other.name == e.spec.name or other.part.heads != e.spec.part.heads or other.part.embeds:
            continue
        names = {theirs.name: ours.name for theirs, ours in zip(other.inputs, e.spec.inputs, strict=True)}
        inputs = {theirs: e.inputs[ours] for theirs, ours in names.items()}
        given = {ours.name: theirs.name for theirs, ours in zip(other.outputs, e.spec.outputs, strict=True)}
        if e.value.name in given:
            outputs = e.run(inputs, other)
            yield Guess(f"it is what {other.name} makes of these inputs: the parts are in the wrong order",
                        e.shown(outputs[given[e.value.name]]))  # fmt: skip
