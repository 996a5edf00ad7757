"""A comparison as one flat JSON object, as saved runs and bisect's journal hold it, and back.

A new figure is a row of KEYS: its key, where it is in a `Comparison`, and what may stand there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from export.graphs.plan import Way
from export.measure.figures import BINS, Birth, Codes, Comparison, Logits
from export.measure.kinds import KINDS
from refimpl.errors import InputError

LOWEST_SQNR = -1e3  # what stands for minus infinity in a file


class Key(NamedTuple):
    """Where a figure is, `group.name` or a field of the comparison itself; its type; whether it is a list of them."""

    path: str
    type: type
    many: bool = False
    lowest: float = -math.inf  # no smaller number may stand there
    allowed: tuple[str, ...] = ()  # no other text may


KEYS = {
    "graph": Key("graph", str),
    "way": Key("way", str, allowed=get_args(Way)),
    "tap": Key("tap", str),
    "kind": Key("kind", str, allowed=tuple(KINDS)),
    "problem": Key("problem", str),
    "output": Key("output", str),
    "shape": Key("shape", int, many=True),
    "rows": Key("needs.rows", float, lowest=0),
    "typical": Key("needs.typical", float, lowest=0),
    "reason": Key("needs.reason", str),
    "tokens": Key("needs.tokens", float, many=True, lowest=0),
    "heads": Key("needs.heads", float, many=True, lowest=0),
    "position": Key("position", int),
    "histogram": Key("needs.histogram", int, many=True),
    "sqnr": Key("device.sqnr", float),
    "cosine": Key("device.cosine", float),
    "max_abs": Key("device.max_abs", float, lowest=0),
    "index": Key("device.index", int, many=True),
    "value": Key("device.value", float),
    "reference": Key("device.reference", float),
    "cost_sqnr": Key("cost.sqnr", float),
    "cost_cosine": Key("cost.cosine", float),
    "total_sqnr": Key("total.sqnr", float),
    "total_cosine": Key("total.cosine", float),
    "token_sqnr": Key("device.token_sqnr", float, many=True),
    "head_sqnr": Key("device.head_sqnr", float, many=True),
    "token_cosine": Key("device.token_cosine", float, many=True),
    "head_cosine": Key("device.head_cosine", float, many=True),
    "token_lsb": Key("codes.tokens", float, many=True, lowest=0),
    "head_lsb": Key("codes.heads", float, many=True, lowest=0),
    "token_kl": Key("logits.tokens", float, many=True),
    "bits": Key("codes.bits", int),
    "step": Key("codes.step", float),
    "lsb_max": Key("codes.largest", float, lowest=0),
    "lsb_over": Key("codes.over", float, lowest=0),
    "kl": Key("logits.kl", float),
    "top1": Key("logits.top1", float),
    "cost_kl": Key("logits.cost_kl", float),
    "cost_top1": Key("logits.cost_top1", float),
    "born": Key("born", str, allowed=tuple(birth.value for birth in Birth)),
}
TOGETHER = (("lsb_max", "lsb_over"), ("kl", "top1", "cost_kl", "cost_top1"))  # figures that come with each other


def to_flat(one: Comparison) -> dict[str, Any]:
    """A comparison as a JSON object: five digits, without figures that are absent or infinite."""
    found: dict[str, Any] = {}
    for key, row in KEYS.items():
        value: Any = one
        for step in row.path.split("."):
            value = getattr(value, step, None)
        value = {"kind": one.kind.name, "born": one.born.value}.get(key, value)
        value = (
            [_short(x) for x in value] if row.many and value else LOWEST_SQNR if value == -math.inf else _short(value)
        )
        if value not in (None, "", (), []):
            found[key] = value
    return found


def _short(x: Any) -> Any:
    if not isinstance(x, float):
        return x
    return float(f"{x:.5g}") if math.isfinite(x) else None


def from_flat(stored: Any) -> Comparison:
    """The comparison that `to_flat` wrote. Raises InputError for anything else."""
    if not isinstance(stored, dict) or set(stored) - set(KEYS) or not {"graph", "way", "tap", "kind"} <= set(stored):
        raise InputError("a tensor of the run has other keys than expected")
    values = {key: _checked(key, value) for key, value in stored.items()}
    for keys in TOGETHER:
        if len({key in values for key in keys}) > 1:
            raise InputError(f"a tensor of the run has some of {', '.join(keys)}, expected all or none")
    if len(values.get("histogram", ())) not in (0, BINS):
        raise InputError(f"the histogram of a tensor has {len(values['histogram'])} numbers, expected {BINS}")
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = KEYS[key].path.rpartition(".")
        groups.setdefault(group, {})[name] = value
    own = groups.pop("")
    own |= {"kind": KINDS[own["kind"]], "born": Birth(own.get("born", ""))}
    logits = groups.pop("logits", {})
    one = Comparison(**own, codes=Codes(**groups.pop("codes", {})), logits=Logits(**logits) if "kl" in logits else None)
    return replace(one, **{group: replace(getattr(one, group), **found) for group, found in groups.items()})


def _checked(key: str, value: Any) -> Any:
    """A stored value of a key. Raises InputError if it cannot be one."""
    row, many = KEYS[key], isinstance(value, list)
    numbers = [math.inf if many and x is None and row.type is float else x for x in (value if many else [value])]
    sound = all(_is(x, row.type) and (not row.allowed or x in row.allowed) for x in numbers)
    if many != row.many or not sound or any(x < row.lowest for x in numbers if row.type is not str):
        raise InputError(f"{key} of a tensor of the run is {_start(value)}, which is not what it should be")
    return tuple(numbers) if many else value


def _is(x: Any, kind: type) -> bool:
    """Whether a stored number or text is of a type; whole numbers fit 64 bits, so that floats hold them.

    A text holds no character that a terminal would obey.
    """
    if kind is str:
        return isinstance(x, str) and x.isprintable()
    if type(x) is int:
        return abs(x) < 2**63 and (x >= 0 or kind is float)
    return type(x) is float and kind is float


def _start(value: Any) -> str:
    """The beginning of a value, without formatting all of it."""
    return f"a {type(value).__name__}" if isinstance(value, int | list | dict) else f"{value!a:.40}"
