"""The numbers themselves: no numbers, zeros, codes for values, another scale, zero point, range or width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from export.causes.evidence import Evidence, Guess, nearness
from export.causes.whatif import Hypothesis, Operation, WhatIf, last_name
from export.measure.figures import unused_bits
from refimpl.errors import at_most
from refimpl_kernels.affine import Encoding, fake_quantize, from_range, quantize

ROWS_TO_FIT = 8  # tokens that it takes to fit a factor for each channel


def byte_order(e: Evidence) -> Iterator[Guess]:
    """The bytes of each float, or of each code of 16 bits, are in the other order; such floats may well be NaN."""
    turned = [e.shown(e.raw.astype(np.float32, copy=False).byteswap())]
    if e.grid is not None and e.grid.bits == 16 and not e.grid.scale.ndim and np.isfinite(e.device).all():
        codes = quantize(e.device.astype(np.float32), e.grid).astype(np.uint16).byteswap()
        turned.append((codes + float(e.grid.offset)) * float(e.grid.scale))
    for values in turned:
        near = nearness(values, e.expected)
        yield Guess("the bytes of each number are in the other order: big-endian, expected little-endian", e.expected,
                    values, certain=near > 20 and near > nearness(e.device, e.expected))  # fmt: skip


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


def zeros(e: Evidence) -> Iterator[Guess]:
    """A head, a token or a channel is zeros."""
    heads = e.config.num_attention_heads
    for what, axis in (("head", e.axes.head), ("token", e.axes.token), ("channel", e.device.ndim - 1)):
        a, b = e.device, e.expected
        if what == "head" and axis is None and e.axes.letters[-1] == "H*D":
            a, b = (x.reshape(*x.shape[:-1], heads, -1) for x in (a, b))
            axis = a.ndim - 2
        if axis is None or a.shape[axis] < 2 or (what == "channel" and e.axes.letters[-1] == "S"):
            continue
        others = tuple(i for i in range(a.ndim) if i != axis)
        lost = np.flatnonzero(~np.any(a, others) & np.any(b, others)).tolist()
        if 0 < len(lost) < a.shape[axis]:
            kept = ~np.isin(np.arange(a.shape[axis]), lost)
            shape = [a.shape[axis] if i == axis else 1 for i in range(a.ndim)]
            yield Guess(f"{what}{'s' if len(lost) > 1 else ''} {at_most(lost, 8)} of {a.shape[axis]}: zeros",
                        (b * kept.reshape(shape)).reshape(e.expected.shape))  # fmt: skip


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


def _fit(a: np.ndarray, b: np.ndarray) -> float:
    """The factor by which b comes nearest to a, each row counting alike."""
    size = np.square(b).sum(-1)
    good = (size > 0) & np.isfinite(a).all(-1)
    return float(np.median((a * b).sum(-1)[good] / size[good])) if good.any() else math.nan


def scale_of_parts(e: Evidence) -> Iterator[Guess]:
    """A factor for each head, or for each channel of all tokens."""
    if e.axes.head is not None and e.expected.shape[e.axes.head] > 1:
        axes = tuple(axis for axis in range(e.expected.ndim) if axis != e.axes.head)
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
        if e.axes.head is not None:
            factors = _fits(e.device, e.expected, (e.axes.token,))
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
    if e.kind.coded:
        return
    for name, dtype in _narrower(e):
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


def dtypes(e: WhatIf) -> Iterator[Hypothesis]:
    """A suspect is rounded to fewer bits."""
    for tap in e.suspects:
        name, grid = last_name(tap), e.references.grids.get(tap) if e.kind.on_grids else None
        for called, dtype in _narrower(e) if grid is None else ():
            yield Hypothesis(f"{name} is rounded to {called}", (name,), partial(_narrow, dtype=dtype))
        if grid is not None and grid.bits > 8 and not grid.scale.ndim:
            narrow = from_range(grid.low, grid.high, 8)
            yield Hypothesis(f"{name} has 8 bits, expected {grid.bits}", (name,), partial(_coarse, grid=narrow))


def _narrower(e: WhatIf) -> Iterator[tuple[str, Any]]:
    """Narrow floats, by name and type, that a device should not round to: all but those that it should compute in."""
    return ((name, dtype) for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16))
            if name != e.dtype)  # fmt: skip


def _narrow(o: Operation, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return o.right.astype(dtype).astype(np.float64)


def _coarse(o: Operation, grid: Encoding) -> np.ndarray:
    return fake_quantize(np.asarray(o.right, np.float32), grid)
