"""The grid of an activation: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl_kernels.affine import from_range


def cases() -> Iterator[Case]:
    for about, low, high, bits in (
        ("-1 to 3 on 8 bits", -1.0, 3.0, 8),
        ("2 to 6 on 4 bits", 2.0, 6.0, 4),
        ("-212 to 194 on 16 bits", -212.0, 194.0, 16),
    ):
        made = from_range(low, high, bits)
        yield Case(about, (low, high, bits), np.array([float(made.scale), float(-made.offset)]))


exercise = Exercise(
    kind="function",
    function="grid",
    breaks='-1 to 3 on 8 bits',
    title=Words(en='Step and zero point', zh='步长与零点'),
    task=Words(en='Return np.array([step, zero_point]) of the grid with 2^bits codes from low to high. The range always contains 0. The zero point is the code that stands for 0, the nearest whole number.', zh='返回 np.array([步长, 零点])：从 low 到 high 的格点，共 2^bits 个码。范围总要包含 0。零点是代表 0 的码，取最接近的整数。'),
    hints=(
        Words(en='There are 2^bits codes, and so 2^bits - 1 steps between them.', zh='码有 2^bits 个，它们之间是 2^bits - 1 步。'),
        Words(en='Widen the range to 0 first: min(low, 0) and max(high, 0).', zh='先把范围扩到 0：min(low, 0) 和 max(high, 0)。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(low, high, bits):
    return np.array([1.0, 0.0])  # fill in


@exercise.solved_by
def solution(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    return np.array([step, np.floor(-low / step + 0.5)])


@exercise.mistaken(en="there is one step less than codes: 2^bits - 1", zh="步数比码数少一：2^bits - 1")
def one_more(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 2**bits
    return np.array([step, np.floor(-low / step + 0.5)])


@exercise.mistaken(en="a range that lies on one side has to be widened to 0", zh="范围只在一侧时，要扩到 0")
def without_zero(low, high, bits):
    step = (high - low) / (2**bits - 1)
    return np.array([step, np.floor(-low / step + 0.5)])


@exercise.mistaken(en="the zero point has the wrong sign", zh="零点的符号反了")
def negative_zero(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    return np.array([step, np.floor(low / step + 0.5)])
