"""Why a tensor may be wrong: the known faults of a deployment, each as a hypothesis that predicts the wrong tensor.

A detector looks at a failing tensor and proposes what a device with its fault would have given: `scale` multiplies the
right tensor by a factor, `mask` computes the graph again with another mask. The proposal that comes nearest to the
device's tensor is the likely cause, if it comes much nearer than the right tensor does; of equals, the first in the
table. So a detector needs no threshold of its own, and a healthy tensor has no cause, because nothing is nearer to it
than what is right.

`CAUSES` is the table; a new fault is a function and a line in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from export.causes.hypotheses import SLOTS, Hypothesis, Operation, hypotheses, last_name
from export.graphs.cut import stage
from export.graphs.naming import boundary
from export.graphs.plan import Arrays, GraphSpec, Value, unpadded
from export.measure.figures import unused_bits
from refimpl.checkpoint.weights import NormHead
from refimpl.config import Config
from refimpl.errors import at_most
from refimpl.names import taps
from refimpl.positions import alibi_slopes, rope_tables
from refimpl_kernels.affine import Encoding, fake_quantize, quantize

if TYPE_CHECKING:
    from export.measure.device import Answer
    from export.measure.references import Kind, References

ROWS_TO_FIT = 8  # tokens, for a factor each of whose channels is fitted to them
LARGEST_ORDER = 8192  # channels whose order is looked for
GAIN, ENOUGH, EQUAL = 6.0, 10.0, 3.0  # dB: nearer than the right tensor; near at all; no nearer than another
MOST = 4.0  # times what rounding explains: a cause that leaves more than that is not all of it
THETAS = (1e4, 1e5, 5e5, 1e6)  # that a Baichuan, a Llama or a Qwen has
SHIFTS = (1, -1, 2, -2)


@dataclass(frozen=True)
class Cause:
    """A likely cause: its `name` in the table, what was found, in a sentence, and whether that is only a part."""

    name: str
    text: str
    partial: bool = False

    def __str__(self) -> str:
        return f"{self.text} (the nearest of the known faults; it explains only a part)" if self.partial else self.text


@dataclass(frozen=True, eq=False)
class Guess:
    """What a fault would have given: `predicted`, in the tap's layout without padding.

    `device`: what of the device's output is held against it, if not the tensor as it is. `tokens`: of which it speaks.
    `certain`: it was seen in the tensor itself, and needs no prediction.
    """

    text: str
    predicted: np.ndarray
    device: np.ndarray | None = None
    tokens: tuple[int | None, int | None] = (None, None)
    certain: bool = False


@dataclass(frozen=True, eq=False)
class Evidence:
    """A failing tensor, and all that can be asked about it. Arrays without padding have the layout of the tap.

    `suspects`: the operations of which one is wrong, the tensor's own the last.
    `needs`: what a device needs over what rounding explains, of its tensor, of what that should be, and of the tokens
    that these have; above 1 it is not explained. nan: that is not known.
    `handed_on`: other tensors inherited its error, so inside of its graph it is wrong, too.
    """

    references: References
    kind: Kind
    answer: Answer
    value: Value
    inputs: Mapping[str, np.ndarray]
    suspects: tuple[str, ...]
    needs: Callable[[np.ndarray, np.ndarray, tuple[slice, ...]], float] = lambda device, right, tokens: math.nan
    handed_on: bool = False

    @property
    def spec(self) -> GraphSpec:
        return self.answer.spec

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def tap(self) -> str:
        return self.value.tap or self.value.name

    @property
    def what(self) -> str:
        """The last part of its name, such as "key"."""
        return self.tap.rpartition(".")[2]

    @property
    def letters(self) -> list[str]:
        """Of its axes."""
        return taps(self.config)[self.tap].shape.split()

    @property
    def token_axis(self) -> int:
        return self.letters.index("T")

    @property
    def head_axis(self) -> int | None:
        return next((i for i, letter in enumerate(self.letters) if letter in "HK"), None)

    @property
    def raw(self) -> np.ndarray:
        """What the device gave, in the graph's layout, with padding."""
        return self.answer.arrays[self.value.name]

    @cached_property
    def device(self) -> np.ndarray:
        return self.shown(self.raw)

    @cached_property
    def outputs(self) -> Arrays:
        """What is right, for the inputs that the device had: every output in the graph's layout."""
        if self.kind == "simulation" and self.references.model is None:
            return self.references.stored(self.spec, self.answer.way)
        return self.run(self.inputs)

    @property
    def expected(self) -> np.ndarray:
        return self.shown(self.outputs[self.value.name])

    @property
    def grid(self) -> Encoding | None:
        return self.references.grids.get(self.tap) if self.kind != "float" else None

    @property
    def attends(self) -> bool:
        """Whether the mask has been added before it in its graph."""
        return self.reads_past and not (self._first and self.what == "scores")

    @property
    def reads_past(self) -> bool:
        """Whether keys of the past come before it in its graph."""
        before = ("input_layernorm", "W_pack", "q_proj", "k_proj", "v_proj", "query", "key", "value")
        return bool(self.spec.part.layers) and not (self._first and self.what in before)

    @property
    def _first(self) -> bool:
        """Whether it is in the first layer of its graph."""
        return self.tap.startswith(f"model.layers.{self.spec.part.layers.start}.")

    def shown(self, array: np.ndarray) -> np.ndarray:
        """An array in the graph's layout as this tap in float64, without padding."""
        return unpadded(self.value, array, self.spec).astype(np.float64)

    def run(self, inputs: Mapping[str, np.ndarray], spec: GraphSpec | None = None) -> Arrays:
        """The graph's right answer to other inputs, or that of another graph."""
        names = {value.name for value in self.spec.outputs}
        wanted = [] if self.value.name in names else [self.tap]
        known = self.kind != "simulation" or self.references.model is not None
        return self.references.run(self.kind if known else "ends", spec or self.spec, inputs, wanted=wanted)

    def if_true(self, hypothesis: Hypothesis) -> np.ndarray:
        """This tensor, were a hypothesis true."""
        spec, inputs, before = self._from_suspects
        seen = dict(before)

        def change(name: str, x: Any) -> Any:
            if name in self.suspects and last_name(name) in hypothesis.at:
                other = hypothesis.change(Operation(self, name, x, seen))
                grid = self.references.grids.get(name) if self.kind in ("simulation", "even") else None
                if other is not None and grid is not None:  # where it ends, it ends for what is wrong, too
                    other = fake_quantize(np.asarray(other, np.float32), grid)
                x = x if other is None else np.asarray(other, x.dtype)
            seen[name] = x
            if name == self.tap:
                raise _ReachedError
            return x

        with contextlib.suppress(_ReachedError):
            self.references.run(self.kind, spec, inputs, change=change)
        x = seen[self.tap]
        return self.shown(x.transpose(np.argsort(self.value.tap_axes)) if self.value.tap_axes else x)

    @cached_property
    def _from_suspects(self) -> tuple[GraphSpec, Mapping[str, np.ndarray], Arrays]:
        """The graph from the first layer under suspicion on, its inputs, and the stream before; what is right is given.

        A hypothesis is tried hundreds of times, and parts have many layers.
        """
        spec, part = self.spec, self.spec.part
        first = min((stage(tap, self.config.num_hidden_layers) for tap in self.suspects), default=-1)
        if spec.cut or first <= part.layers.start or first >= part.layers.stop:
            return spec, self.inputs, Arrays()
        stream, before = boundary(first), Arrays()

        def record(name: str, x: Any) -> Any:
            before.update({name: x} if name == stream else {})
            return x

        self.references.run(self.kind, spec, self.inputs, change=record)
        later = replace(spec, part=replace(part, layers=range(first, part.layers.stop), embeds=False))
        given = {v.name: self.inputs[v.name] for v in later.inputs if v.name in self.inputs}
        return later, given | {later.part.reads: before[stream]}, before

    def with_inputs(self, **changed: np.ndarray) -> np.ndarray:
        """This tensor, had the graph been given these instead."""
        return self.shown(self.run({**self.inputs, **changed})[self.value.name])


class _ReachedError(Exception):
    """A run has come as far as it needs to."""


def likely_causes(evidence: Evidence, table: Mapping[str, Callable[[Evidence], Iterator[Guess]]]) -> Cause | None:
    """The cause that explains a tensor best, or None if nothing known does."""
    healthy = nearness(evidence.device, evidence.expected)
    best, most, needed = None, -math.inf, 0.0
    for name, detector in tqdm(table.items(), "explaining", unit="cause", disable=None, leave=False):
        for guess in detector(evidence):
            if guess.certain:
                return Cause(name, guess.text)
            device = evidence.device if guess.device is None else guess.device
            at = (slice(None),) * evidence.token_axis + (slice(*guess.tokens),)
            near = nearness(device[at], guess.predicted[at])
            if near >= max(healthy + GAIN, ENOUGH) and near > most + (EQUAL if best else 0):
                best, most = Cause(name, guess.text), near
                needed = evidence.needs(device[at], guess.predicted[at], at)
                if needed <= 1:  # nothing is left to explain
                    return best
    return replace(best, partial=needed > MOST) if best else None


def nearness(a: np.ndarray, b: np.ndarray) -> float:
    """-10 log10 of the mean over rows of |a - b|^2 / |b - mean|^2, in dB: each row counts alike, however large it is.

    `mean` is that of all of b: what a shift puts into a prediction is no sign that the prediction is right.
    """
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return -math.inf
    error, size = np.square(a - b).sum(-1), np.square(b - b.mean() if b.size else b).sum(-1)
    size = np.maximum(size, 2.0**-48 * size.max(initial=0.0))
    if not size.any():
        return math.inf if not error.any() else -math.inf
    ratio = float(np.mean(np.minimum(error / size, 1e6)))
    return -10 * math.log10(ratio) if ratio else 400.0


# What is seen in the tensor itself


def not_finite(e: Evidence) -> Iterator[Guess]:
    """NaN or infinity."""
    wrong = ~np.isfinite(e.device)
    if wrong.any() and np.isfinite(e.expected).all():
        what = "NaN" if np.isnan(e.device).any() else "infinite"
        text = (
            f"{wrong.sum()} of {wrong.size} values are {what}: an overflow (the right ones reach "
            f"{np.abs(e.expected).max():.3g}; float16 ends at 65504), or an output that was never written"
        )
        yield Guess(text, e.expected, certain=True)


def never_written(e: Evidence) -> Iterator[Guess]:
    """All zeros, or one and the same number."""
    if e.device.size > 1 and np.ptp(e.device) == 0 and np.ptp(e.expected) > 0:
        yield Guess(f"all values are {e.device.flat[0]:g}: the output was never written", e.expected, certain=True)


def zeros(e: Evidence) -> Iterator[Guess]:
    """A head, a token or a channel is zeros."""
    heads = e.config.num_attention_heads
    for what, axis in (("head", e.head_axis), ("token", e.token_axis), ("channel", e.device.ndim - 1)):
        a, b = e.device, e.expected
        if what == "head" and axis is None and e.letters[-1] == "H*D":
            a, b = (x.reshape(*x.shape[:-1], heads, -1) for x in (a, b))
            axis = a.ndim - 2
        if axis is None or a.shape[axis] < 2 or (what == "channel" and e.letters[-1] == "S"):
            continue
        others = tuple(i for i in range(a.ndim) if i != axis)
        lost = np.flatnonzero(~np.any(a, others) & np.any(b, others)).tolist()
        if 0 < len(lost) < a.shape[axis]:
            kept = ~np.isin(np.arange(a.shape[axis]), lost)
            shape = [a.shape[axis] if i == axis else 1 for i in range(a.ndim)]
            yield Guess(f"{what}{'s' if len(lost) > 1 else ''} {at_most(lost, 8)} of {a.shape[axis]}: zeros",
                        (b * kept.reshape(shape)).reshape(e.expected.shape))  # fmt: skip


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
    axis, tokens = e.token_axis, e.spec.real
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


def shifted(e: Evidence) -> Iterator[Guess]:
    """Each token has its neighbour's output."""
    for by in SHIFTS:
        if abs(by) < e.spec.real - 1 and by != e.spec.real - e.spec.tokens:  # which would be the other side's padding
            tokens = (by, None) if by > 0 else (None, by)
            where = f"{abs(by)} {'slot' if abs(by) == 1 else 'slots'} {'late' if by > 0 else 'early'}"
            yield Guess(f"every token's values stand {where}", np.roll(e.expected, by, e.token_axis), tokens=tokens)


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
    axis = e.head_axis
    if axis is None or e.expected.shape[axis] < 2:
        return
    a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (e.device, e.expected))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    order = np.argmax(a @ b.T / np.maximum(lengths, 1e-300), axis=1)
    if not np.array_equal(order, np.arange(len(order))):
        kind = "in another order" if len(set(order.tolist())) == len(order) else "mapped to others"
        yield Guess(f"the heads are {kind}: {at_most(order.tolist(), 8)}", np.take(e.expected, order, axis))


def channels_permuted(e: Evidence) -> Iterator[Guess]:
    """The channels are in another order, as those of a matrix are whose rows are."""
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


def not_dequantized(e: Evidence) -> Iterator[Guess]:
    """Codes where numbers are expected."""
    if e.grid is None or e.grid.scale.ndim:
        return
    codes, half = quantize(e.expected.astype(np.float32), e.grid).astype(np.float64), 2 ** (e.grid.bits - 1)
    for first, what in ((0, "unsigned"), (-half, "signed")):
        yield Guess(f"the values are codes, {what} ones of {e.grid.bits} bits, that were not dequantized: store them "
                    "as integers, or dequantize them", codes + first)  # fmt: skip


def of_another_tensor(e: Evidence) -> Iterator[Guess]:
    """Codes that are read with the step and the zero point of another tensor."""
    if e.grid is None:
        return
    codes = quantize(e.expected.astype(np.float32), e.grid).astype(np.float64)
    tried: list[Encoding] = [e.grid]
    for name, grid in e.references.grids.items():
        if grid.bits == e.grid.bits and not grid.scale.ndim and not any(grid == other for other in tried):
            tried.append(grid)
            yield Guess(f"its codes are read with the encoding of another tensor, {name}",
                        (codes + float(grid.offset)) * float(grid.scale))  # fmt: skip


def scale(e: Evidence) -> Iterator[Guess]:
    """One factor for all."""
    factor = _fit(e.device, e.expected)
    if math.isfinite(factor) and abs(factor - 1) > 1e-4 and factor > 0:
        yield Guess(f"all values are {factor:.4g} times what they should be: its scale is off by that factor",
                    factor * e.expected)  # fmt: skip
    if factor < 0:
        yield Guess("all values have the opposite sign", -e.expected)


def scale_of_parts(e: Evidence) -> Iterator[Guess]:
    """A factor for each head, or for each channel of all tokens."""
    if e.head_axis is not None and e.expected.shape[e.head_axis] > 1:
        axes = tuple(axis for axis in range(e.expected.ndim) if axis != e.head_axis)
        factors = _fits(e.device, e.expected, axes)
        off = np.flatnonzero(np.abs(factors.reshape(-1) - 1) > 1e-3)
        turned_over = np.flatnonzero(np.abs(factors.reshape(-1) + 1) <= 1e-3)
        if len(off) and np.array_equal(off, turned_over):
            said = f"head{'s' * (len(off) > 1)} {at_most(off, 8)} {'have' if len(off) > 1 else 'has'} the opposite sign"
        else:
            said = at_most([f"head {i} by {factors.flat[i]:.3g}" for i in off], 4)
            said = f"heads have scales of their own that are off: {said}"
        yield Guess(said, factors * e.expected)
    if e.spec.real >= ROWS_TO_FIT:
        factors = _fits(e.device, e.expected, tuple(range(e.expected.ndim - 1)))
        if e.head_axis is not None:
            factors = _fits(e.device, e.expected, (e.token_axis,))
        ends = f"{factors.min():.3g} to {factors.max():.3g}"
        yield Guess(f"each channel is off by its own factor, {ends}: the scales of a weight's rows are others, or in "
                    "another order", factors * e.expected)  # fmt: skip


def _fits(a: np.ndarray, b: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The factors by which b comes nearest to a, one for each index that `axes` do not sum over."""
    return (a * b).sum(axes, keepdims=True) / np.maximum(np.square(b).sum(axes, keepdims=True), 1e-300)


def zero_point(e: Evidence) -> Iterator[Guess]:
    """One constant for all, a multiple of the step where there is a grid."""
    shift = float(np.median(e.device - e.expected))
    step = float(e.grid.scale) if e.grid is not None else 0.0
    codes = round(shift / step) if step else 0
    if step and abs(codes) >= 2**e.grid.bits:  # type: ignore[union-attr]  # no zero point is that far off
        return
    if codes:
        yield Guess(f"all values are {abs(codes)} code{'s' * (abs(codes) > 1)} too {'high' if codes > 0 else 'low'} "
                    f"({shift:+.4g}): the zero point is off by that", e.expected + codes * step)  # fmt: skip
    elif shift:
        yield Guess(f"all values are {shift:+.4g} off: a zero point, or a bias", e.expected + shift)


def saturated(e: Evidence) -> Iterator[Guess]:
    """Values end where the right ones go on."""
    low, high = float(e.device.min()), float(e.device.max())
    share = float(((e.expected < low) | (e.expected > high)).mean())
    if share > 0:
        yield Guess(f"values end at {low:.4g} and {high:.4g}, but {share:.1%} of the right ones are beyond, "
                    f"{e.expected.min():.4g} to {e.expected.max():.4g}: saturation, its range is too narrow",
                    np.clip(e.expected, low, high))  # fmt: skip


def wrapped(e: Evidence) -> Iterator[Guess]:
    """Codes beyond the last begin again, or are read with the other signedness."""
    if e.grid is None:
        return
    codes, size = quantize(e.expected.astype(np.float32), e.grid).astype(np.int64), 2**e.grid.bits
    offset, step = float(e.grid.offset), float(e.grid.scale)
    yield Guess("codes are read with the other signedness: unsigned for signed, half the range off",
                ((codes + size // 2) % size + offset) * step)  # fmt: skip


def narrowed(e: Evidence) -> Iterator[Guess]:
    """Every value is one of a narrower format."""
    if e.grid is not None and (lost := unused_bits(e.device, e.expected, e.grid)):
        yield Guess(lost, e.expected, certain=True)
    if e.kind != "float":
        return
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        with np.errstate(over="ignore"):
            same, others = ((x.astype(dtype).astype(np.float64) == x).mean() for x in (e.device, e.expected))
        if same == 1 and others < 0.5:
            yield Guess(f"every value is a {name}: the device, or who fetched from it, rounds to that", e.expected,
                        certain=nearness(e.device, e.expected) > 20)  # fmt: skip
    distinct = np.unique(e.device)
    if 2 < len(distinct) <= 256 < e.device.size / 2:
        step = float(np.diff(distinct).min())
        if step > 0 and np.abs(e.device / step - np.rint(e.device / step)).max() < 1e-2:
            yield Guess(f"there are only {len(distinct)} different values, {step:.4g} apart: a grid of 8 bits or fewer",
                        e.expected, certain=True)  # fmt: skip


# What is computed again


def rope(e: Evidence) -> Iterator[Guess]:
    """Keys or queries turned by other angles, or in other pairs."""
    if e.what not in ("key", "query") or e.config.rope_theta is None or "position_ids_cos" not in e.inputs:
        return
    cos, sin = (e.inputs[f"position_ids_{name}"][:, :, -e.spec.real :].astype(np.float64) for name in ("cos", "sin"))
    plain = turned(e.expected, cos, -sin)  # before RoPE
    positions = e.spec.past + np.arange(e.spec.real)[None]
    size, theta = e.config.head_dim, e.config.rope_theta
    for other in THETAS:
        if other != theta:
            yield Guess(f"RoPE has the base {other:g}, expected {theta:g}",
                        turned(plain, *rope_tables(positions, size, other, np.float64)))  # fmt: skip
    yield Guess("RoPE turns pairs of neighbours (interleaved), expected element i of one half with i of the other",
                interleaved(plain, cos, sin))  # fmt: skip
    moves = {
        by: "padding is counted" for by in (e.spec.tokens - e.spec.real, e.spec.context - e.spec.real - e.spec.past)
    }
    moves |= {-e.spec.past: "the past is not counted", 1: "off by one", -1: "off by one"}
    for by, why in moves.items():
        if by:
            text = f"RoPE's positions are {abs(by)} too {'high' if by > 0 else 'low'}: {why}"
            yield Guess(text, turned(plain, *rope_tables(positions + by, size, theta, np.float64)))
    yield Guess("RoPE is missing", plain)
    yield Guess("RoPE turns the other way: sin has the wrong sign", turned(plain, cos, -sin))
    yield Guess("RoPE has cos and sin exchanged", turned(plain, sin, cos))
    yield Guess("the halves of RoPE's result are exchanged", np.roll(e.expected, size // 2, -1))


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on halves, as the decoder has it."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on neighbours, as GPT-J has it."""
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def mask(e: Evidence) -> Iterator[Guess]:
    """Attention that sees what it should not, or not what it should."""
    if not e.attends or "attention_mask" not in e.inputs:
        return
    right = e.inputs["attention_mask"]
    low, spec = float(right.min()), e.spec
    seen = right > low / 2
    keys = np.arange(spec.context)
    queries = np.arange(spec.context - spec.tokens, spec.context)[:, None]
    real = seen[0, 0].any(0)
    causal = keys[None] <= queries

    def biased(allowed: np.ndarray) -> np.ndarray:
        bias = np.where(seen, right, 0.0)  # ALiBi's, where it is known
        return np.where(np.broadcast_to(allowed, seen.shape), bias, low).astype(np.float32)

    ideas = {
        "attention sees later tokens: the mask is not causal": real[None] & np.ones_like(causal),
        "attention sees the padding: the mask of padding is missing": causal,
        "attention sees everything: there is no mask": np.ones_like(causal),
        "no token sees itself: the mask is off by one": real[None] & (keys[None] < queries),
        "attention sees the next token, too: the mask is off by one": real[None] & (keys[None] <= queries + 1),
        "attention does not see the past": real[None] & causal & (keys[None] >= spec.context - spec.tokens),
        "attention sees only the past": real[None] & causal & (keys[None] < spec.context - spec.tokens),
    }
    for text, allowed in ideas.items():
        if not np.array_equal(np.broadcast_to(allowed, seen.shape), seen):
            yield Guess(text, e.with_inputs(attention_mask=biased(allowed)))
    yield Guess("the mask is inverted, or its numbers are multiplied and not added",
                e.with_inputs(attention_mask=np.where(seen, low, 0.0).astype(np.float32)))  # fmt: skip
    if e.config.alibi:
        yield from _other_alibi(e, right, seen)
    for weak in (weak for weak in (-1.0, -10.0, -50.0, -100.0) if weak > low):
        yield Guess(f"masked places get {weak:g}, which is too weak to hide them",
                    e.with_inputs(attention_mask=np.where(seen, right, weak).astype(np.float32)))  # fmt: skip


def _other_alibi(e: Evidence, right: np.ndarray, seen: np.ndarray) -> Iterator[Guess]:
    """Other slopes in the mask."""
    heads = e.config.num_attention_heads
    slopes = alibi_slopes(heads)
    others = {
        "ALiBi is missing: the mask has no bias": 0 * slopes,
        "ALiBi's bias has the wrong sign": -slopes,
        "ALiBi's slopes are in the opposite order": slopes[::-1],
        "ALiBi has the slope of its first head in all heads": np.full_like(slopes, slopes[0]),
    }
    for count in {2 ** math.ceil(math.log2(heads)), 2 * heads, *([heads // 2] if heads > 1 else [])} - {heads}:
        others[f"ALiBi's slopes are those of {count} heads, expected {heads}"] = np.resize(alibi_slopes(count), heads)
    for text, other in others.items():
        factor = (other / slopes)[None, :, None, None]
        yield Guess(text, e.with_inputs(attention_mask=np.where(seen, right * factor, right).astype(np.float32)))


def past(e: Evidence) -> Iterator[Guess]:
    """Keys and values of the past in other slots than the mask and the positions say."""
    names = [value.name for value in e.spec.inputs if value.name.startswith("past_")]
    if not e.reads_past or not e.spec.past or not names:
        return
    axes = {value.name: value.token_axis for value in e.spec.inputs}

    def changed(function: Callable[[np.ndarray, int], np.ndarray], which: str = "") -> np.ndarray:
        return e.with_inputs(**{n: function(e.inputs[n], axes[n]) for n in names if n.startswith(f"past_{which}")})

    def moved(by: int) -> Callable[[np.ndarray, int], np.ndarray]:
        return lambda x, axis: np.roll(x, by, axis)

    def with_slot(slot: int, source: int | None = None) -> Callable[[np.ndarray, int], np.ndarray]:
        def function(x: np.ndarray, axis: int) -> np.ndarray:
            slots = np.moveaxis(x.copy(), axis, 0)
            slots[slot] = 0 if source is None else slots[source]
            return np.moveaxis(slots, 0, axis)

        return function

    def reread(x: np.ndarray, axis: int) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(2, 3)).reshape(x.shape)

    for by in (1, -1):
        where = f"one slot {'late' if by > 0 else 'early'}"
        yield Guess(f"the past keys and values stand {where}", changed(moved(by)))
        yield Guess(f"the past keys stand {where}", changed(moved(by), "key"))
        yield Guess(f"the past values stand {where}", changed(moved(by), "value"))
    yield Guess("the past stands on the left of the cache, expected it on the right", changed(moved(e.spec.past)))
    yield Guess("the past is zeros: it was not handed on", changed(lambda x, axis: np.zeros_like(x)))
    for which in ("key", "value"):
        yield Guess(f"the past {which}s are read transposed: features for slots", changed(reread, which))
        for text, other in _other_codes(e, which):
            yield Guess(f"the past {which}s are {text}", changed(other, which))
    exchanged = {n: e.inputs[f"past_{'value' if 'key' in n else 'key'}_{n.split('_')[2]}_in"] for n in names}
    yield Guess("keys and values of the past are exchanged", e.with_inputs(
        **{n: np.ascontiguousarray(x.swapaxes(2, 3)) for n, x in exchanged.items()}))  # fmt: skip
    for slot in sorted({*range(min(SLOTS, e.spec.past)), *range(max(0, e.spec.past - SLOTS), e.spec.past)}):
        at = slot - e.spec.past
        which = "last slot" if at == -1 else "first slot" if slot == 0 else f"slot {slot}"
        yield Guess(f"the {which} of the past is stale: zeros", changed(with_slot(at)))
        for other in (at - 1, at + 1):
            if -e.spec.past <= other < 0:
                yield Guess(f"the {which} of the past is stale: it holds slot {other + e.spec.past}",
                            changed(with_slot(at, other)))  # fmt: skip


def _other_codes(e: Evidence, which: str) -> Iterator[tuple[str, Callable[[np.ndarray, int], np.ndarray]]]:
    """Codes of the past read about another zero, where the past is on a grid."""
    grid = e.references.grids.get(f"model.layers.{e.spec.part.layers.start}.self_attn.{which}")
    if grid is None or e.kind == "float":
        return
    step, half = float(grid.scale), 2 ** (grid.bits - 1)
    for by in (half, -half, 1, -1):
        how = f"{abs(by)} code{'s' * (abs(by) > 1)} too {'high' if by > 0 else 'low'}: the zero point is off by that"
        yield how, lambda x, axis, by=by: (x + by * step).astype(np.float32)  # type: ignore[misc]

    def other_sign(x: np.ndarray, axis: int) -> np.ndarray:
        return (((np.rint(x / step) + 2 * half) % (2 * half) - half) * step).astype(np.float32)

    yield "of the other signedness", other_sign


def positions(e: Evidence) -> Iterator[Guess]:
    """Position tables of other positions or another base, where their effect is seen further on."""
    if not e.attends or e.config.rope_theta is None or "position_ids_cos" not in e.inputs:
        return
    first = e.spec.past - (e.spec.tokens - e.spec.real) + np.arange(e.spec.tokens)[None]
    size, theta = e.config.head_dim, e.config.rope_theta

    def tables(at: np.ndarray, base: float) -> np.ndarray:
        cos, sin = rope_tables(np.maximum(at, 0), size, base, np.float64)
        return e.with_inputs(position_ids_cos=cos.astype(np.float32), position_ids_sin=sin.astype(np.float32))

    for by in (1, -1):
        yield Guess(
            f"positions are one {'later' if by > 0 else 'earlier'} than they should be", tables(first + by, theta)
        )
    for other in THETAS:
        if other != theta:
            yield Guess(f"RoPE has the base {other:g}, expected {theta:g}", tables(first, other))
    yield Guess("cos and sin are exchanged", e.with_inputs(
        position_ids_cos=e.inputs["position_ids_sin"], position_ids_sin=e.inputs["position_ids_cos"]))  # fmt: skip


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


def norm_head(e: Evidence) -> Iterator[Guess]:
    """Logits of a head whose rows are not normalised."""
    if e.tap != "lm_head" or not e.config.norm_head:
        return
    model = e.references.model
    weight = model.weights["lm_head.weight"] if model is not None else None
    if isinstance(weight, NormHead):
        lengths = row_lengths(weight.array)
    elif e.spec.real > 1:  # fitted to the tokens, of which there must be more than one
        lengths = (e.device * e.expected).sum((0, 1)) / np.maximum(np.square(e.expected).sum((0, 1)), 1e-300)
    else:
        return
    yield Guess(f"each word's logit is off by its own factor, {lengths.min():.3g} to {lengths.max():.3g}, the length "
                "of its row: NormHead is missing", e.expected * lengths)  # fmt: skip
    if isinstance(weight, NormHead):
        yield Guess("each word's logit is divided by the length of its row once more: NormHead is applied twice",
                    e.expected / np.maximum(lengths, 1e-12))  # fmt: skip


def row_lengths(matrix: np.ndarray) -> np.ndarray:
    """Of a matrix, in float64, some rows at a time."""
    step = max(1, (16 << 20) // matrix.shape[1])
    pieces = [np.linalg.norm(matrix[i : i + step].astype(np.float64), axis=1) for i in range(0, len(matrix), step)]
    return np.concatenate(pieces)


def hypothetical(cause: str) -> Callable[[Evidence], Iterator[Guess]]:
    """The detector of what `export/causes/hypotheses.py` knows of a cause. It needs the model."""

    def detector(e: Evidence) -> Iterator[Guess]:
        if e.references.model is None:
            return
        layers: dict[int, list[str]] = {}
        for tap in e.suspects:
            layers.setdefault(stage(tap, e.config.num_hidden_layers), []).append(tap)
        # One fault is in one layer; another model differs in all of them.
        views = [(f", in layer {n}" * (len(layers) > 1), replace(e, suspects=tuple(own))) for n, own in layers.items()]
        for where, view in [*views, ("", e)] if len(layers) > 1 else views:
            doubtful = {last_name(tap) for tap in view.suspects}
            for hypothesis in hypotheses(view, cause):
                if doubtful.intersection(hypothesis.at):
                    yield Guess(hypothesis.text + where, view.if_true(hypothesis))

    return detector


def by_elimination(e: Evidence) -> Cause | None:
    """What is left where no pattern fits, if one operation with a parameter of its own is all that is suspected."""
    if len(e.suspects) == 1 and e.references.model is not None and f"{e.tap}.weight" in e.references.model.weights:
        return Cause("weights", f"what goes into {e.tap} is right, what comes out of it is not, and no known pattern "
                     "explains it: the device has other weights than the model (a stale file?), or computes this one "
                     "operation wrongly")  # fmt: skip
    return None


def _fit(a: np.ndarray, b: np.ndarray) -> float:
    """The factor by which b comes nearest to a, each row counting alike."""
    size = np.square(b).sum(-1)
    good = (size > 0) & np.isfinite(a).all(-1)
    return float(np.median((a * b).sum(-1)[good] / size[good])) if good.any() else math.nan


CAUSES: dict[str, Callable[[Evidence], Iterator[Guess]]] = {
    "not finite": not_finite,
    "never written": never_written,
    "zeros": zeros,
    "padding side": padding_side,
    "names swapped": swapped,
    "stale": stale,
    "shifted": shifted,
    "heads permuted": heads_permuted,
    "transposed": transposed,
    "RoPE": rope,
    "NormHead missing": norm_head,
    "codes": not_dequantized,
    "encoding": of_another_tensor,
    "scale": scale,
    "zero point": zero_point,
    "signedness": wrapped,
    "saturation": saturated,
    "parts exchanged": parts_exchanged,
    "positions": positions,
    "past": past,
    "mask": mask,
    "embedding": hypothetical("embedding"),
    "architecture": hypothetical("architecture"),
    "weights": hypothetical("weights"),
    "channels": channels_permuted,
    "scales": scale_of_parts,
    "dtype": lambda e: chain(narrowed(e), hypothetical("dtype")(e)),
}
