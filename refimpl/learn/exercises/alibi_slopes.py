"""ALiBi's slopes: a function of its own."""

import math
from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl.positions import alibi_slopes


def cases() -> Iterator[Case]:
    """Powers of two, 13B's 40 heads, and small counts between."""
    for heads in (8, 1, 4, 40, 6, 12):
        yield Case(f"{heads} heads", (heads,), alibi_slopes(heads))


exercise = Exercise(
    kind="function",
    function="alibi_slopes",
    breaks="8 heads",
    title=Words(en="ALiBi's slopes", zh="ALiBi 的斜率"),
    task=Words(
        en="""Return the slopes of `heads` heads as a float64 array (heads,).
For a power of two n they are 2^(-8/n), 2^(-16/n) ... 2^-8.
Otherwise the largest power of two below has its series; the others take every second slope of the next power's.""",
        zh="""返回 heads 个头的斜率，float64 数组，形状 (heads,)。
n 是二的幂时，斜率为 2^(-8/n)、2^(-16/n) …… 2^-8。
否则，先取不超过 heads 的最大的二的幂的数列；其余的头从下一个幂的数列里隔一个取一个。""",
    ),
    hints=(
        Words(en="It is a geometric series: each slope is the one before times the first.", zh="这是等比数列：首项也是公比。"),
        Words(en="13B has 40 heads: 32 of the series of 32, then 8 of the series of 64: 1st, 3rd, 5th ...",
              zh="13B 有 40 个头：先取 32 的数列的全部 32 项，再取 64 的数列的第 1、3、5 …… 项，共 8 项。"),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(heads):
    return np.ones(heads)  # fill in


@exercise.solved_by
def solution(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, between])


@exercise.mistaken(
    en="40 heads are not a power of two: they have slopes of two series", zh="40 不是二的幂，斜率要由两个数列拼成"
)
def one_series(heads):
    return 2.0 ** (-8 / heads * np.arange(1, heads + 1))


@exercise.mistaken(en="the slopes are those of twice the heads", zh="这是两倍头数的斜率")
def twice_the_heads(heads):
    return 2.0 ** (-4 / heads * np.arange(1, heads + 1))


@exercise.mistaken(
    en="the sign is wrong: slopes are positive, and the distance is negative", zh="符号错了：斜率为正，距离才是负的"
)
def negative(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = -(2.0 ** (-8 / power * np.arange(1, power + 1)))
    between = -(2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2)))
    return np.concatenate([slopes, between])


@exercise.mistaken(en="the series begins at 1, expected 2^(-8/n)", zh="数列从 1 开始了，应当从 2^(-8/n) 开始")
def begins_at_one(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(power))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, between])
