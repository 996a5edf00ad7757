"""How far apart two runs are, tensor by tensor, worst first, and whether that is within what rounding explains.

>>> reference = {"x": np.array([1.0, 2.0, 4.0]), "y": np.zeros(2)}
>>> report = compare({"x": np.array([1.0, 2.5, 4.0])}, reference, Tolerance(0.2, "for the example"))
>>> bool(report)
False
>>> print(report)
differs: 1 of 2 tensors beyond tolerance or missing, first y in computing order; worst y, missing
      tensor   needed  allowed  of max   max_abs     rmse      SQNR     cosine  worst at
FAIL  y             –  2.0e-01        –        –        –         –          –  missing
ok    x       1.2e-01  2.0e-01  1.2e-01  5.0e-01  2.9e-01     19 dB  0.9956382  (1): 2.5, reference 2

**What an error is measured against.** The largest value of its row. In most tensors a row is one token, or one head of
one token. A few tokens of a language model have activations a thousand times larger than all others; measured against
those, an error in any other token would look like rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from golden.tolerance import LARGEST, Tolerance, stated
from refimpl.errors import InputError, at_most
from refimpl.trace import Trace, expect_same_prompt

CHUNK = 1 << 16  # elements that are widened to float64 at a time
ROW = 32  # elements of a row, at least: the largest of fewer may be small by chance
TINY = 2.0**-24  # relative to a value, what is smaller is lost in float32


@dataclass(frozen=True)
class Difference:
    """How far one tensor a is from its reference b. All figures are computed in float64.

    - `needed`: max|a - b| / max|b| in the row where it is largest; infinite if there is a `problem`. A row is the last
      axis, or as many of the last axes as have 32 elements together. A row whose largest value is below 2^-24 of the
      tensor's is measured against the tensor's.
    - `allowed`: how large `needed` may be, with its `reason`
    - `max_abs`: max|a - b|; `scale`: max|b|; `rel_to_max`: max_abs / scale; all of the whole tensor
    - `rmse`: sqrt(mean((a - b)^2)); `sqnr`: 10 log10(sum(b^2) / sum((a - b)^2)) in dB; `cosine`: of the angle between
      a and b as vectors
    - `index`: where |a - b| is largest in the row that needs most; `value`: a there; `reference`: b there; `ulp`: their
      distance in units of the last place of `reference`, in the coarser of both number formats
    - `problem`: "", or why the numbers cannot be compared: missing, other shape, NaN or infinity on one side

    Where both sides are NaN, or the same infinity, they agree; the figures leave such elements out.
    """

    name: str
    allowed: float
    reason: str
    problem: str = ""
    shape: tuple[int, ...] = ()
    needed: float = math.inf
    max_abs: float = math.nan
    scale: float = math.nan
    rmse: float = math.nan
    sqnr: float = math.nan
    cosine: float = math.nan
    ulp: float = math.nan
    index: tuple[int, ...] = ()
    value: float = math.nan
    reference: float = math.nan

    @property
    def rel_to_max(self) -> float:
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.scale if self.scale else math.inf

    @property
    def excess(self) -> float:
        """Needed over allowed: above 1 fails."""
        if self.needed == 0:
            return 0.0
        return self.needed / self.allowed if self.allowed else math.inf

    @property
    def judged(self) -> bool:
        """Whether there is a verdict. A tolerance of LARGEST or more allows none, unless there is a `problem`."""
        return bool(self.problem) or self.allowed < LARGEST

    @property
    def verdict(self) -> str:
        return "not judged" if not self.judged else "ok" if self else "FAIL"

    def __bool__(self) -> bool:
        return self.judged and self.excess <= 1


@dataclass(frozen=True)
class Report:
    """A verdict with its figures. It is true if every tensor of the reference is there and within tolerance.

    A tensor with a tolerance too wide to judge by neither agrees nor fails; if all tensors are like that, the report is
    false. `tensors`: a Difference for each tensor of the reference, in its order; `extra`: names that only the judged
    side has, which do not count; `note`: why there is nothing to compare; `remark`: another sentence for the summary.
    """

    tensors: tuple[Difference, ...]
    extra: tuple[str, ...] = ()
    note: str = ""
    remark: str = ""

    def __bool__(self) -> bool:
        return any(self.tensors) and not self.note and not self.failures

    @cached_property
    def worst(self) -> list[Difference]:
        """The tensors with the largest needed / allowed first; those that were not judged come last."""
        return sorted(self.tensors, key=lambda tensor: (not tensor.judged, -tensor.excess))

    @property
    def failures(self) -> list[Difference]:
        """The tensors beyond tolerance, in computing order: the run went wrong at the first one."""
        return [tensor for tensor in self.tensors if tensor.judged and not tensor]

    @property
    def missing(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.problem == "missing"]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        extra = f"; not in the reference: {at_most(self.extra, 3)}" if self.extra else ""
        extra += f"; {self.remark}" if self.remark else ""
        if self.note or not self.tensors:
            return f"differs: {self.note or 'nothing was compared'}{extra}"
        first, count = self.worst[0], len(self.tensors)
        if open_ := sum(not tensor.judged for tensor in self.tensors):
            extra = f"; {open_} not judged, since rounding may do {LARGEST} or more{extra}"
        if not first.judged:
            return f"differs: nothing was judged{extra}; feed the run with the reference's tensors"
        by = f"worst {first.name}, " + (first.problem or f"needs {first.needed:.1e} of {first.allowed:.1e} allowed")
        if self:
            return f"agrees: {count - open_} tensors within tolerance; {by}{extra}"
        begin = f"first {self.failures[0].name} in computing order"
        return f"differs: {len(self.failures)} of {count} tensors beyond tolerance or missing, {begin}; {by}{extra}"

    def table(self, limit: int = 20) -> str:
        """A line for each of the worst tensors."""
        shown = self.worst[:limit]
        width = max([len(tensor.name) for tensor in shown] + [6])
        mark = max([len(tensor.verdict) for tensor in shown] + [4])
        head = f"{'tensor':{width}}   needed  allowed  of max   max_abs     rmse      SQNR     cosine  worst at"
        lines = [f"{'':{mark}}  {head}"] + [f"{tensor.verdict:{mark}}  {_line(tensor, width)}" for tensor in shown]
        rest = self.worst[limit:]
        if rest:
            failing = len(self.failures) - sum(tensor.verdict == "FAIL" for tensor in shown)
            lines.append(f"{'':{mark}}  and {len(rest)} more, {failing or 'none'} of them beyond tolerance")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.summary}\n{self.table()}" if self.tensors else self.summary

    def to_json(self) -> str:
        """The whole report as JSON, worst first. NaN and infinity are null, such as what a missing tensor needs."""
        tensors = [{**asdict(t), "rel_to_max": t.rel_to_max, "judged": t.judged, "ok": bool(t)} for t in self.worst]
        content = {"agrees": bool(self), "summary": self.summary, "missing": self.missing, "extra": self.extra}
        return json.dumps(finite({**content, "tensors": tensors}), ensure_ascii=False, allow_nan=False)

    def within(self, prefix: str) -> Report:
        """The same report with `prefix` before every name, so that it can be added to others."""
        tensors = tuple(replace(tensor, name=prefix + tensor.name) for tensor in self.tensors)
        note = f"{prefix.rstrip('/')}: {self.note}" if self.note else ""
        return Report(tensors, tuple(prefix + name for name in self.extra), note, self.remark)

    def __add__(self, other: Report) -> Report:
        note, remark = (
            "; ".join(filter(None, both)) for both in ((self.note, other.note), (self.remark, other.remark))
        )
        return Report(self.tensors + other.tensors, self.extra + other.extra, note, remark)


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], tolerance: Tolerance | Mapping[str, Tolerance] | None = None
) -> Report:
    """Judges `a` by the reference `b`. Both map names to arrays of any number format, as a Trace does.

    `tolerance`: one for all tensors, or one for each; by default what the traces say about themselves
    (`golden.tolerance.stated`). A name that `a` lacks, another shape, no name in common, or NaN or infinity on one side
    make the report false; they raise nothing. Memory holds a piece of each tensor, and two numbers for each row.

    Raises InputError for traces of different prompts, for arrays that do not hold real numbers, and for a name without
    a tolerance.
    """
    a, b = _trace(a), _trace(b)
    expect_same_prompt(a, b)
    allowed = stated(a, b) if tolerance is None else tolerance
    tensors = []
    for name, reference in b.items():
        if isinstance(allowed, Mapping) and name not in allowed:
            raise InputError(f"there is no tolerance for {name}; expected one for each tensor of the reference")
        limit = allowed[name] if isinstance(allowed, Mapping) else allowed
        tensors.append(_difference(Difference(name, limit.relative, limit.reason), a.get(name), reference))
    note = ""
    if not b:
        note = "the reference is empty"
    elif not a.keys() & b.keys():
        note = f"nothing in common: the reference has {at_most(b, 3)}, what is judged has {at_most(a, 3) or 'nothing'}"
    return Report(tuple(tensors), tuple(name for name in a if name not in b), note)


def _trace(side: Mapping[str, Any]) -> Trace:
    """`side` with its values as arrays of numbers, mapped ones still mapped."""
    trace = Trace(((name, np.asarray(x)) for name, x in side.items()), getattr(side, "meta", None))
    for name, array in trace.items():
        # NumPy sees the formats of ml_dtypes as plain bytes, kind "V"
        if array.dtype.kind not in "fiub" and not hasattr(ml_dtypes, array.dtype.name):
            raise InputError(f"{name} is an array of {array.dtype}, expected real numbers")
    return trace


@np.errstate(over="ignore", invalid="ignore")  # squares of huge values may be infinite
def _difference(of: Difference, a: np.ndarray | None, b: np.ndarray) -> Difference:
    """`of` with its figures filled in: one pass over both arrays, and one over the row that needs most."""
    if a is None:
        return replace(of, problem="missing", shape=b.shape)
    if a.shape != b.shape:
        return replace(of, problem=f"shape {a.shape}, reference {b.shape}", shape=b.shape)
    if not b.size:
        return replace(of, shape=b.shape, needed=0.0, max_abs=0.0, scale=0.0)
    sums = _Sums(a, b)
    row, needed = sums.worst_row()
    at = sums.clash if sums.clash >= 0 else _place(a, b, row * sums.length, sums.length)
    index = tuple(int(i) for i in np.unravel_index(at, b.shape))
    value, reference = float(a[index]), float(b[index])
    return replace(
        of, shape=b.shape, max_abs=float(sums.largest.max()), scale=float(sums.scales.max()), index=index, value=value,
        reference=reference, needed=math.inf if sums.clash >= 0 else needed,
        problem="NaN or infinity on one side" if sums.clash >= 0 else "",
        rmse=sums.rmse(), sqnr=sums.sqnr(), cosine=sums.cosine(),
        ulp=abs(value - reference) / max(_last_place(reference, side.dtype) for side in (a, b)),
    )  # fmt: skip


class _Sums:
    """What one pass over both arrays collects.

    `largest`, `scales`: max|a - b| and max|b| of each row, (rows,) float64; `clash`: the first place where one side is
    not finite and the sides do not agree, or -1.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray):
        self.length = row_length(b.shape)
        self.largest, self.scales = np.zeros((2, b.size // self.length))
        self.clash, self.counted = -1, b.size
        self.errors = self.squares_a = self.squares_b = self.products = 0.0
        for start, x, y, error, odd, differs in _chunks(a, b, 0, b.size):
            first, last = start // self.length, (start + len(x) - 1) // self.length + 1
            cuts = np.maximum(np.arange(first, last) * self.length - start, 0)  # where rows begin in this chunk
            for most, values in ((self.largest, error), (self.scales, np.abs(y))):
                np.maximum(most[first:last], np.maximum.reduceat(values, cuts), out=most[first:last])
            self.counted -= odd
            self.clash = differs if self.clash < 0 else self.clash
            self.errors += float(error @ error)
            self.products += float(x @ y)
            self.squares_a += float(x @ x)
            self.squares_b += float(y @ y)

    def worst_row(self) -> tuple[int, float]:
        """The row with the largest max|a - b| / max|b|, and that ratio."""
        scale = self.scales.max()
        against = np.where(self.scales > TINY * scale, self.scales, scale)
        ratio = np.divide(self.largest, against, out=np.where(self.largest > 0, np.inf, 0.0), where=against > 0)
        row = int(ratio.argmax())
        return row, float(ratio[row])

    def rmse(self) -> float:
        return math.sqrt(self.errors / max(self.counted, 1))

    def sqnr(self) -> float:
        if not self.errors:
            return math.inf
        return 10 * math.log10(self.squares_b / self.errors) if self.squares_b else -math.inf

    def cosine(self) -> float:
        if not (self.squares_a and self.squares_b):
            return math.nan
        return self.products / math.sqrt(self.squares_a) / math.sqrt(self.squares_b)


def row_length(shape: tuple[int, ...]) -> int:
    """The elements of a row: the last axis, together with axes before it until there are at least ROW elements."""
    length = 1
    for axis in reversed(shape):
        length *= axis
        if length >= ROW:
            break
    return length


def _place(a: np.ndarray, b: np.ndarray, start: int, length: int) -> int:
    """Where in a row |a - b| is largest."""
    most, place = -1.0, start
    for begin, _, _, error, _, _ in _chunks(a, b, start, start + length):
        at = int(error.argmax())
        if error[at] > most:
            most, place = float(error[at]), begin + at
    return place


def _chunks(a: np.ndarray, b: np.ndarray, start: int, stop: int) -> Iterator[tuple]:
    """(start, x, y, |x - y|, odd, differs) for the elements from start to stop in C order, in float64, chunk by chunk.

    x, y and the error are 0 where a or b is not finite; `odd` counts these places. `differs` is the first of them where
    a and b do not agree, or -1.
    """
    pieces = np.nditer(
        [a, b], flags=["external_loop", "buffered", "ranged"], op_flags=[["readonly"], ["readonly"]], order="C",
        op_dtypes=[np.float64, np.float64], casting="unsafe", buffersize=CHUNK,
    )  # fmt: skip
    pieces.iterrange = start, stop  # type: ignore[misc]  # NumPy's stubs call it read-only
    for x, y in pieces:
        error, odd, differs = np.abs(x - y), 0, -1
        if not math.isfinite(error.max()):
            finite = np.isfinite(x) & np.isfinite(y)
            wrong = ~finite & (x != y) & ~(np.isnan(x) & np.isnan(y))
            differs = start + int(wrong.argmax()) if wrong.any() else -1
            x, y, odd = np.where(finite, x, 0.0), np.where(finite, y, 0.0), int((~finite).sum())
            error = np.abs(x - y)
        yield start, x, y, error, odd, differs
        start += len(x)


def _last_place(value: float, dtype: np.dtype) -> float:
    """The distance from |value| to the next larger number of the format; 1 for whole numbers."""
    if dtype.kind in "iub" or not math.isfinite(value):
        return 1.0
    info = ml_dtypes.finfo(dtype)
    smallest = float(info.smallest_subnormal)
    return max(math.ldexp(1.0, math.frexp(value)[1] - 1 - info.nmant), smallest) if value else smallest


def _line(tensor: Difference, width: int) -> str:
    start = f"{tensor.name:{width}}"
    if not math.isfinite(tensor.max_abs):
        return (
            f"{start}        –  {tensor.allowed:7.1e}        –        –        –         –          –  {tensor.problem}"
        )
    where = f"{tensor.index}: {tensor.value:.6g}, reference {tensor.reference:.6g}".replace(",)", ")")
    figures = f"{tensor.needed:7.1e}  {tensor.allowed:7.1e}  {tensor.rel_to_max:7.1e}  {tensor.max_abs:7.1e}"
    return f"{start}  {figures}  {tensor.rmse:7.1e}  {tensor.sqnr:5.0f} dB  {tensor.cosine:9.7f}  {where}"


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
