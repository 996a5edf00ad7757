"""One block of four-bit weights: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl_kernels.affine import Encoding, quantize


def cases() -> Iterator[Case]:
    for about, x, scale in (
        ("a small block", [0.7, -0.2, 0.34, -0.85], 0.1),
        ("an outlier", [3.0, -3.0, 0.1], 0.25),
        ("halves", [0.25, 0.75, -1.25], 0.5),
    ):
        yield Case(
            about,
            (np.array(x), scale),
            quantize(np.array(x), Encoding(4, np.array(scale), np.array(-8.0), symmetric=True), "even") - 8.0,
        )


exercise = Exercise(
    kind="function",
    function="codes",
    breaks='a small block',
    title=Words(en='Codes of a block', zh='一个块的码'),
    task=Words(en='Return the codes of a block x with the given scale: the nearest whole number of scales, at least -8 and at most 7, as float64. Halves go to the even number, as np.round does.', zh='给定缩放，返回块 x 的码：最接近的整数倍，不小于 -8，不大于 7，用 float64 表示。恰好一半时取偶数，和 np.round 一样。'),
    hints=(
        Words(en='Divide, round, clip.', zh='先除，再舍入，再截断。'),
        Words(en='np.clip(values, -8, 7) keeps numbers in range.', zh='np.clip(值, -8, 7) 让数留在范围里。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(x, scale):
    return np.zeros_like(x)  # fill in


@exercise.solved_by
def solution(x, scale):
    return np.clip(np.round(x / scale), -8, 7)


@exercise.mistaken(en="the codes are cut off towards zero, expected rounded", zh="直接截去小数了，应当舍入")
def cut(x, scale):
    return np.clip(np.trunc(x / scale), -8, 7)


@exercise.mistaken(en="codes beyond the range are not clipped", zh="超出范围的码没有截断")
def unclipped(x, scale):
    return np.round(x / scale)


@exercise.mistaken(en="the lowest code is -8, not -7", zh="最小的码是 -8，不是 -7")
def symmetric(x, scale):
    return np.clip(np.round(x / scale), -7, 7)
