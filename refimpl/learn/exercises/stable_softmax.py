"""Softmax that does not overflow: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl_kernels.ops import NumPyOps


def cases() -> Iterator[Case]:
    ops = NumPyOps(np.dtype(np.float64))
    for about, x in (
        ("small numbers", [2.0, 1.0, 0.0]),
        ("large numbers", [1000.0, 999.0, 0.0]),
        ("equal ones", [-5.0] * 4),
    ):
        yield Case(about, (np.array(x),), ops.softmax(np.array([x]))[0])


exercise = Exercise(
    kind="function",
    function="softmax",
    breaks='small numbers',
    title=Words(en='Softmax that does not overflow', zh='不会溢出的 softmax'),
    task=Words(en='Return the softmax of a vector x, float64 (n,). It has to work for numbers of a thousand, too.', zh='返回向量 x 的 softmax，float64，形状 (n,)。数到一千也得算得出来。'),
    hints=(
        Words(en='exp(1000) is infinite. A common number may be subtracted first.', zh='exp(1000) 是无穷大。可以先减去一个公共的数。'),
        Words(en='Subtract the largest.', zh='减去最大的那个。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(x):
    return np.ones_like(x) / len(x)  # fill in


@exercise.solved_by
def solution(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@exercise.mistaken(en="large numbers overflow: subtract the largest first", zh="大数溢出了：先减去最大的")
def overflows(x):
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(x)
        return np.nan_to_num(e / e.sum(), nan=-1.0)


@exercise.mistaken(en="the shares do not sum to 1", zh="各份之和不是 1")
def not_normed(x):
    return np.exp(x - x.max())


@exercise.mistaken(en="the powers are of 2, expected of e", zh="底数用了 2，应当是 e")
def base_two(x):
    p = 2.0 ** (x - x.max())
    return p / p.sum()
