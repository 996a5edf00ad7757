"""bitsandbytes' dynamic 8-bit numbers, the second quantization of NF4's and FP4's block scales ("double quantization").

A code is an index into a fixed table of 256 values between -1 and 1, dense near zero:

    decade i = 0 … 6, one for each power 10^(i-6):  2^i midpoints of 2^i equal steps between 0.1 and 1, both signs
    and 0 and 1                                     127 + 127 + 2 = 256 values, sorted

The scales of all 4-bit blocks of a matrix, one float32 each, are stored like this:

    scales of 4-bit blocks   a0 … a255 | a256 … a511 | …        float32, all positive
    offset                   mean(a)                            float32, one a matrix
    nested scales            max|a0…a255 - offset|, …           float32, one for 256 scales
    codes                    the value nearest to (a - offset) / nested scale: uint8, one for each scale

    a' = value[code] * nested scale + offset                    8 + 32/256 bits instead of 32

On a GPU the code is that of the nearest value. A CPU differs in two ways, and so does this file: the relative number
is first rounded to one of 65536 even steps between -1 and 1, so that a table gives its code; and a block of zeros gets
code 0 (-0.993, times a scale of 0).

The offset's last bit depends on the order of the sum. `mean` below is the order of PyTorch's CPU sum on one thread,
with 8 float32 lanes. (Above 32768 scales PyTorch splits the sum among its threads.)

**Source**: bitsandbytes functional.py: create_dynamic_map, quantize_4bit; csrc/cpu_ops.cpp: quantize_cpu; PyTorch
aten/src/ATen/native/cpu/SumKernel.cpp: cascade_sum. Dettmers 2021, "8-bit Optimizers via Block-wise Quantization".

>>> nested = nest(np.array([1.0, 2.0, 4.0], np.float32))
>>> nested["scales"], nested["offset"].round(4), nested["nested_scales"].round(4)
(array([ 14,  56, 255], dtype=uint8), np.float32(2.3333), array([1.6667], dtype=float32))
>>> unnest(nested["scales"], np.arange(3), **{k: v for k, v in nested.items() if k != "scales"}).round(2)
array([1.01, 1.99, 4.  ], dtype=float32)
"""

from __future__ import annotations

import numpy as np

from refimpl_kernels.formats.search import reciprocal

BLOCK_SIZE = 256  # scales that share one nested scale


def _values() -> np.ndarray:
    found = [0.0, 1.0]
    low, high = np.float64(np.float32(0.1)), np.float64(1)
    for i in range(7):
        at = np.arange(2**i + 1)
        step = np.float64(np.float32(high - low) / np.float32(2**i))
        # PyTorch's linspace counts from the nearer end in fused float32 steps: exact here, then rounded once
        edges = np.where(at <= at[-1] // 2, low + step * at, high - step * at[::-1]).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = (np.float32(10.0 ** (i - 6)) * middles).tolist()
        found += decade + [-v for v in decade]
    return np.sort(np.array(found, np.float32))


VALUES = _values()
_STEPS = (np.arange(1 << 16) / 32767.5 - 1).astype(np.float32)
NEAREST = np.searchsorted((VALUES[:-1] + VALUES[1:]) / np.float32(2), _STEPS).astype(np.uint8)  # code of each step


def mean(x: np.ndarray) -> np.float32:
    """The mean of a float32 vector, summed in PyTorch's order.

    32 running sums (4 rows of 8 lanes) take the numbers in turn; every `step` turns they are emptied into sums of
    sums, three levels deep, so that no sum grows much longer than the others.
    """
    lanes, rows, levels = 8 if len(x) >= 8 else 1, 4, 4
    vectors = x[: len(x) // lanes * lanes].reshape(-1, lanes)
    turns = vectors[: len(vectors) // rows * rows].reshape(-1, rows, lanes)
    power = max(4, (len(turns) - 1).bit_length() // levels)
    step = 1 << power
    sums = np.zeros((levels, rows, lanes), np.float32)
    whole = len(turns) // step * step
    for turn in range(step, whole + 1, step):
        sums[0] = np.add.reduce(turns[turn - step : turn], axis=0)
        for level in range(1, levels):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if turn & (step - 1) << level * power:
                break
    for row in turns[whole:]:
        sums[0] += row
    for level in range(1, levels):
        sums[0] += sums[level]
    lane = sums[0, 0]
    for vector in vectors[len(turns) * rows :]:
        lane += vector
    for row in sums[0, 1:]:
        lane += row
    total = np.float32(0)
    for number in [*x[len(vectors) * lanes :], *lane]:
        total += number
    return total / np.float32(len(x))


def quantize(x: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks (n, b) of float32 as `codes` (n, b) uint8 and `scales` (n, 1) float32, the largest magnitude of each."""
    scales = np.abs(x).max(-1, keepdims=True)
    relative = x * reciprocal(scales)
    steps = np.floor((relative + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)).astype(np.uint16)
    return dict(codes=np.where(scales > 0, NEAREST[steps], 0).astype(np.uint8), scales=scales)


def dequantize(codes: np.ndarray, scales: np.ndarray, values: np.ndarray = VALUES) -> np.ndarray:
    """Blocks (n, b) of float32: value * scale."""
    return values[codes] * scales


def nest(scales: np.ndarray) -> dict[str, np.ndarray]:
    """A vector of float32 scales as `scales` (uint8 codes), `offset`, `nested_scales`, `nested_code` (the values)."""
    offset = mean(scales)
    count = len(scales)
    blocks = np.zeros((-(-count // BLOCK_SIZE), BLOCK_SIZE), np.float32)
    blocks.reshape(-1)[:count] = scales - offset
    parts = quantize(blocks)
    return dict(
        scales=parts["codes"].reshape(-1)[:count], offset=np.asarray(offset), nested_scales=parts["scales"].reshape(-1),
        nested_code=VALUES.copy(),
    )  # fmt: skip


def unnest(
    scales: np.ndarray,
    which: np.ndarray,
    offset: np.ndarray,
    nested_scales: np.ndarray,
    nested_code: np.ndarray = VALUES,
) -> np.ndarray:
    """The float32 scales that the uint8 codes `scales` of the blocks numbered `which` stand for."""
    return dequantize(scales, nested_scales.reshape(-1)[which // BLOCK_SIZE], nested_code) + offset.reshape(())
