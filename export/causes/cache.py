"""The past: keys and values that stand in other slots than mask and positions say, or are read in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from export.causes.evidence import Evidence, Guess
from export.causes.whatif import reads_past

Change = Callable[[np.ndarray, int], np.ndarray]  # of a tensor of the past, and its axis of slots
SLOTS = 16  # of the past, at either end, that are tried each alone


def past(e: Evidence) -> Iterator[Guess]:
    """Keys and values of the past in other slots than the mask and the positions say."""
    names = [value.name for value in e.spec.inputs if value.name.startswith("past_")]
    if not reads_past(e) or not e.spec.past or not names:
        return
    axes = {value.name: value.token_axis for value in e.spec.inputs}

    def changed(function: Change, which: str = "") -> np.ndarray:
        return e.with_inputs(**{n: function(e.inputs[n], axes[n]) for n in names if n.startswith(f"past_{which}")})

    for by in (1, -1):
        where = f"one slot {'late' if by > 0 else 'early'}"
        yield Guess(f"the past keys and values stand {where}", changed(_moved(by)))
        yield Guess(f"the past keys stand {where}", changed(_moved(by), "key"))
        yield Guess(f"the past values stand {where}", changed(_moved(by), "value"))
    yield Guess("the past stands on the left of the cache, expected it on the right", changed(_moved(e.spec.past)))
    yield Guess("the past is zeros: it was not handed on", changed(lambda x, axis: np.zeros_like(x)))
    for which in ("key", "value"):
        yield Guess(f"the past {which}s are read transposed: features for slots", changed(_reread, which))
        for text, other in _other_codes(e, which):
            yield Guess(f"the past {which}s are {text}", changed(other, which))
    exchanged = {n: e.inputs[f"past_{'value' if 'key' in n else 'key'}_{n.split('_')[2]}_in"] for n in names}
    yield Guess("keys and values of the past are exchanged", e.with_inputs(
        **{n: np.ascontiguousarray(x.swapaxes(2, 3)) for n, x in exchanged.items()}))  # fmt: skip
    for slot in sorted({*range(min(SLOTS, e.spec.past)), *range(max(0, e.spec.past - SLOTS), e.spec.past)}):
        at = slot - e.spec.past
        which = "last slot" if at == -1 else "first slot" if slot == 0 else f"slot {slot}"
        yield Guess(f"the {which} of the past is stale: zeros", changed(_with_slot(at)))
        for other in (at - 1, at + 1):
            if -e.spec.past <= other < 0:
                yield Guess(f"the {which} of the past is stale: it holds slot {other + e.spec.past}",
                            changed(_with_slot(at, other)))  # fmt: skip


def _moved(by: int) -> Change:
    return lambda x, axis: np.roll(x, by, axis)


def _reread(x: np.ndarray, axis: int) -> np.ndarray:
    """The past, with features taken for slots."""
    return np.ascontiguousarray(x.swapaxes(2, 3)).reshape(x.shape)


def _with_slot(slot: int, source: int | None = None) -> Change:
    """A slot holds another one's numbers, or zeros."""

    def change(x: np.ndarray, axis: int) -> np.ndarray:
        slots = np.moveaxis(x.copy(), axis, 0)
        slots[slot] = 0 if source is None else slots[source]
        return np.moveaxis(slots, 0, axis)

    return change


def _other_codes(e: Evidence, which: str) -> Iterator[tuple[str, Change]]:
    """Codes of the past read about another zero, where the past is on a grid."""
    grid = e.references.grids.get(f"model.layers.{e.spec.part.layers.start}.self_attn.{which}")
    if grid is None or not e.kind.coded:
        return
    step, half = float(grid.scale), 2 ** (grid.bits - 1)
    for by in (half, -half, 1, -1):
        how = f"{abs(by)} code{'s' * (abs(by) > 1)} too {'high' if by > 0 else 'low'}: the zero point is off by that"
        yield how, lambda x, axis, by=by: (x + by * step).astype(np.float32)  # type: ignore[misc]

    def other_sign(x: np.ndarray, axis: int) -> np.ndarray:
        return (((np.rint(x / step) + 2 * half) % (2 * half) - half) * step).astype(np.float32)

    yield "of the other signedness", other_sign
