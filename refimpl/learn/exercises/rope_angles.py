"""RoPE's angles: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl.positions import rope_tables


def cases() -> Iterator[Case]:
    for about, positions, size in (
        ("positions 0 to 3, heads of 8", range(4), 8),
        ("position 7, heads of 2", [7], 2),
        ("late positions", [100, 101], 6),
    ):
        cos, sin = rope_tables(np.array([positions]), size, 10000.0, np.dtype(np.float64))
        turns = np.outer(positions, [10000.0 ** (-2 * i / size) for i in range(size // 2)])
        assert np.allclose(np.cos(turns), cos[0, 0]) and np.allclose(np.sin(turns), sin[0, 0])
        yield Case(about, (np.array(positions), size), turns)


exercise = Exercise(
    kind="function",
    function="angles",
    breaks='positions 0 to 3, heads of 8',
    title=Words(en="RoPE's angles", zh='RoPE 的角度'),
    task=Words(
        en="""Return the angles in radians by which RoPE turns each pair: float64 (positions, D / 2).
Pair i of position m turns by m * 10000^(-2i / D).""",
        zh="""返回 RoPE 把每一对转多少弧度：float64，形状 (位置数, D / 2)。
位置 m 的第 i 对转 m * 10000^(-2i / D)。""",
    ),
    hints=(
        Words(en='np.outer(positions, speeds) gives all products.', zh='np.outer(位置, 速度) 一次得到所有乘积。'),
        Words(en='There are D / 2 pairs, i from 0.', zh='一共 D / 2 对，i 从 0 开始。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(positions, D):
    return np.zeros((len(positions), D // 2))  # fill in


@exercise.solved_by
def solution(positions, D):
    return np.outer(positions, 10000.0 ** (-2 * np.arange(D // 2) / D))


@exercise.mistaken(en="the exponent is i / D, expected 2i / D", zh="指数用了 i / D，应当是 2i / D")
def twice(positions, D):
    return np.outer(positions, 10000.0 ** (-np.arange(D // 2) / D))


@exercise.mistaken(en="pairs are counted from 1, expected from 0", zh="对的编号从 1 数了，应当从 0 数")
def from_one(positions, D):
    return np.outer(positions, 10000.0 ** (-2 * (np.arange(D // 2) + 1) / D))


@exercise.mistaken(en="these are degrees, expected radians", zh="这是度，应当用弧度")
def degrees(positions, D):
    return np.degrees(np.outer(positions, 10000.0 ** (-2 * np.arange(D // 2) / D)))
