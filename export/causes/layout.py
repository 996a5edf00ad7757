"""The right numbers in other places: tokens shifted, axes exchanged, heads or channels in another order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.causes.evidence import Evidence, Guess
from refimpl.errors import at_most

LARGEST_ORDER = 8192  # channels whose order is looked for
SHIFTS = (1, -1, 2, -2)  # slots


def shifted(e: Evidence) -> Iterator[Guess]:
    """Each token has its neighbour's output."""
    for by in SHIFTS:
        if abs(by) < e.spec.real - 1 and by != e.spec.real - e.spec.tokens:  # that is padding on the other side
            tokens = (by, None) if by > 0 else (None, by)
            where = f"{abs(by)} {'slot' if abs(by) == 1 else 'slots'} {'late' if by > 0 else 'early'}"
            yield Guess(f"every token's values stand {where}", np.roll(e.expected, by, e.axes.token), tokens=tokens)


def transposed(e: Evidence) -> Iterator[Guess]:
    """The right numbers, read in another order of axes."""
    right = e.outputs[e.value.name]
    full = [i for i, size in enumerate(right.shape) if size > 1]
    for one in range(len(full)):
        for other in range(one + 1, len(full)):
            order = list(range(right.ndim))
            order[full[one]], order[full[other]] = order[full[other]], order[full[one]]
            moved = right.transpose(order)
            said = f"its axes {full[one]} and {full[other]} are exchanged: the layout is another than {e.value.shape}"
            # padding decides which values go where, so that a device that leaves other numbers there is not recognised
            yield Guess(said, e.shown(np.ascontiguousarray(moved).reshape(right.shape)))
            yield Guess(said, e.shown(right.reshape(moved.shape).transpose(order)))


def heads_permuted(e: Evidence) -> Iterator[Guess]:
    """The heads are in another order."""
    axis = e.axes.head
    if axis is None or e.expected.shape[axis] < 2:
        return
    a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (e.device, e.expected))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    order = np.argmax(a @ b.T / np.maximum(lengths, 1e-300), axis=1)
    if not np.array_equal(order, np.arange(len(order))):
        kind = "in another order" if len(set(order.tolist())) == len(order) else "mapped to others"
        yield Guess(f"the heads are {kind}: {at_most(order.tolist(), 8)}", np.take(e.expected, order, axis))


def channels_permuted(e: Evidence) -> Iterator[Guess]:
    """The channels are in another order, as if the rows of a matrix were."""
    size = e.expected.shape[-1]
    if size < 3:
        return
    for by in (1, -1):
        yield Guess(f"channel i has what belongs to {'i - 1' if by > 0 else 'i + 1'}: all rows are one "
                    f"{'further' if by > 0 else 'earlier'}", np.roll(e.expected, by, -1))  # fmt: skip
    if size > LARGEST_ORDER or e.spec.real < 3 or not np.isfinite(e.device).all():
        return
    a, b = (np.moveaxis(x, -1, 0).reshape(size, -1) for x in (e.device, e.expected))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (a, b))
    order = np.argmax(a @ b.T, axis=1)
    if not np.array_equal(order, np.arange(size)) and len(set(order.tolist())) > size // 2:
        yield Guess(f"the channels are in another order: {at_most(order.tolist(), 8)}", e.expected[..., order])
