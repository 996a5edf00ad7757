"""Affine quantization, from floats to the phone's integers and back: to the bit as AIMET-ONNX simulates it.

    code = clip(round(x / scale - offset), 0, 2^bits - 1)          x' = scale * (code + offset)

Codes are unsigned and `offset` is at most 0, as in encodings files: symmetric int4 has offset -8, and the zero point of
a uint16 is -offset. All arithmetic is float32, although files keep scale and offset in double:

- x / scale is IEEE division. Multiplying by the reciprocal gives other numbers, and so does float64;
- the offset is subtracted before rounding, and the difference itself is rounded to float32. Rounding x / scale first
  gives another code for one uint16 value in 500;
- half a step is rounded up, as C's `round` does with positive numbers; `rint` would round it to even;
- `floor(v + 0.5)` would round v = 0.49999997 up, because the sum is 1.0 in float32. v - floor(v) is exact, and is
  compared with a half instead.

Falling into one of these traps changes codes by one. `rounding="even"` is the other convention, that of ONNX's
QuantizeLinear: rint(x / scale) - offset. (NaN, which AIMET leaves undefined, stays NaN here.)

**Source**: AIMET-ONNX 2.42, its CPU kernel, observed from outside; ONNX QuantizeLinear and DequantizeLinear.

>>> encoding = from_range(-1.0, 3.0, bits=4)
>>> encoding
Encoding 4 bits, -1.07 to 2.93 in steps of 0.267
>>> quantize(np.array([-9.0, -0.4, 0.0, 0.1, 2.9], np.float32), encoding)
array([ 0,  3,  4,  4, 15], dtype=int32)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

SMALLEST_STEP = float(np.finfo(np.float32).eps)  # no step is smaller, however narrow the range
LPBQ_STEPS = 16  # a block's step is 1 to 16 of its row's
Rounding = Literal["away", "even"]


@dataclass(frozen=True, eq=False)
class Encoding:
    """A grid for a tensor, or for each row or block of a matrix.

    `scale` and `offset`: float64, () for a tensor, (O,) for the rows of (O, I), (O, I / block_size) for its blocks.
    `symmetric` says how the range was chosen. `block_scale`, which only LPBQ has: integers (O, I / block_size) that
    multiply the rows' scales (O,).
    """

    bits: int
    scale: np.ndarray
    offset: np.ndarray
    symmetric: bool = False
    block_size: int | None = None
    block_scale: np.ndarray | None = None

    def __repr__(self) -> str:
        low, high = float(np.min(self.low)), float(np.max(self.high))
        steps = self.steps
        step = f"{steps:.3g}" if steps.ndim == 0 else f"{steps.min():.3g} to {steps.max():.3g}, {steps.size} of them"
        return f"Encoding {self.bits} bits, {low:.3g} to {high:.3g} in steps of {step}"

    def __eq__(self, other: object) -> bool:
        """The same grid, number for number; whether both are called symmetric does not matter."""
        if not isinstance(other, Encoding) or (self.bits, self.block_size) != (other.bits, other.block_size):
            return False
        return np.array_equal(self.steps, other.steps) and np.array_equal(self.offset, other.offset)

    __hash__ = None  # type: ignore[assignment]

    @property
    def steps(self) -> np.ndarray:
        """The step from one code to the next: `scale`, or in LPBQ the step of each block."""
        return self.scale if self.block_scale is None else self.scale[:, None] * self.block_scale

    @property
    def low(self) -> np.ndarray:
        """The value of code 0."""
        return self.steps * _spread(self.offset, self.steps)

    @property
    def high(self) -> np.ndarray:
        """The value of the last code."""
        return self.steps * (_spread(self.offset, self.steps) + 2**self.bits - 1)

    def rows(self, rows: slice | np.ndarray) -> Encoding:
        """The encoding of some rows of the matrix."""
        if not self.scale.ndim:
            return self
        blocks = None if self.block_scale is None else self.block_scale[rows]
        return Encoding(self.bits, self.scale[rows], self.offset[rows], self.symmetric, self.block_size, blocks)


def from_range(low, high, bits: int, symmetric: bool = False) -> Encoding:
    """The grid that covers [low, high] and 0, computed in float64; arrays give a grid for each element.

    A symmetric grid has one code more below 0 than above; its step is the larger of the steps that the two sides need.
    Any other grid is moved until 0 is on a code, so its ends are up to half a step away from `low` and `high`.

    Raises ValueError for a range that is not finite.
    """
    low, high = np.minimum(0.0, np.asarray(low, np.float64)), np.maximum(0.0, np.asarray(high, np.float64))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the range is not finite; a NaN or an infinity was seen")
    half = 2 ** (bits - 1)
    if symmetric:
        scale = np.maximum(np.maximum(high / (half - 1), -low / half), SMALLEST_STEP)
        return Encoding(bits, scale, np.full_like(scale, -half), symmetric=True)
    scale = np.maximum((high - low) / (2**bits - 1), SMALLEST_STEP)
    return Encoding(bits, scale, 0.0 - np.floor(-low / scale + 0.5))


def for_weight(weight: np.ndarray, bits: int, block_size: int | None = None, lpbq: bool = False) -> Encoding:
    """Symmetric grids for a float matrix (O, I): for each row, each block of a row, or LPBQ's two levels.

    LPBQ (low-power blockwise) keeps a float for each row: a sixteenth of the step that its coarsest block needs. For
    each block it keeps an integer from 1 to 16: the multiple of that float nearest to the step that the block needs.

    Raises ValueError if the rows are not made of whole blocks.
    """
    rows, columns = weight.shape
    if block_size is None:
        return from_range(weight.min(1), weight.max(1), bits, symmetric=True)
    expect_whole_blocks(columns, block_size)
    blocks = weight.reshape(rows, -1, block_size)
    fine = from_range(blocks.min(-1), blocks.max(-1), bits, symmetric=True)
    if not lpbq:
        return Encoding(bits, fine.scale, fine.offset, True, block_size)
    scale = fine.scale.max(1) / LPBQ_STEPS
    steps = np.clip(np.rint(fine.scale / scale[:, None]), 1, LPBQ_STEPS)
    return Encoding(bits, scale, np.full_like(scale, -(2 ** (bits - 1))), True, block_size, steps)


def expect_whole_blocks(
    length: int, block_size: int, which: str = "row", sizes: Sequence[int] = (), otherwise: str = ""
) -> None:
    """Raises ValueError, which names the `sizes` that fit, unless a row (or column) is made of whole blocks."""
    if block_size >= 1 and length % block_size == 0:
        return
    fitting = [size for size in sizes or (16, 32, 64, 128, 256) if length % size == 0]
    hint = f"{', '.join(map(str, fitting))} {'is' if len(fitting) == 1 else 'are'}" if fitting else otherwise
    raise ValueError(f"{which} length {length} is not a multiple of block_size {block_size}{hint and f'; {hint}'}")


def quantize(x: np.ndarray, encoding: Encoding, rounding: Rounding = "away") -> np.ndarray:
    """The codes of x, int32 from 0 to 2^bits - 1. At most 24 bits: float32 holds no larger code exactly."""
    codes, _, _ = _codes(x, encoding, rounding)
    return codes.astype(np.int32).reshape(x.shape)


def integers(x: np.ndarray, encoding: Encoding, rounding: Rounding = "away") -> np.ndarray:
    """The codes of x plus the offset, int32, so that 0 stands for 0: the integers that an exact product multiplies."""
    codes, _, offset = _codes(x, encoding, rounding)
    return (codes + offset).astype(np.int32).reshape(x.shape)


def dequantize(codes: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The float32 values that codes stand for."""
    scale, offset = _grid(codes, encoding)
    return (scale * (_blocked(codes, encoding).astype(np.float32) + offset)).reshape(codes.shape)


def fake_quantize(x: np.ndarray, encoding: Encoding, rounding: Rounding = "away") -> np.ndarray:
    """x on the grid: `dequantize(quantize(x))`, float32, of the shape of x."""
    codes, scale, offset = _codes(x, encoding, rounding)
    return (scale * (codes + offset)).reshape(x.shape)


def _codes(x: np.ndarray, encoding: Encoding, rounding: Rounding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes as float32, and scale and offset as they broadcast to them."""
    scale, offset = _grid(x, encoding)
    last = 2**encoding.bits - 1
    with np.errstate(over="ignore"):  # infinity is clipped, too
        v = _blocked(x, encoding).astype(np.float32, copy=False) / scale
    if rounding == "even":
        code = np.rint(v) - offset
    else:
        v = np.clip(v - offset, -1, last + 1)  # infinity less its floor would be NaN
        code = np.floor(v)
        code = code + (v - code >= 0.5)
    return np.clip(code, 0, last), scale, offset


def _blocked(x: np.ndarray, encoding: Encoding) -> np.ndarray:
    return x.reshape(len(x), -1, encoding.block_size) if encoding.block_size else x


def _grid(x: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset in float32, with a last axis of length 1 unless they are scalars."""
    steps = encoding.steps
    grid = (steps.astype(np.float32), _spread(encoding.offset, steps).astype(np.float32))
    return grid if not steps.ndim else (grid[0][..., None], grid[1][..., None])


def _spread(offset: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """A row's offset for each of its blocks."""
    return offset[:, None] if offset.ndim < steps.ndim else offset
