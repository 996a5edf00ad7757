"""Bisect: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    for about, right, wrong in (
        ("the sixth of eight", 5, 3),
        ("the first of fifty-four", 0, 54),
        ("the last of a thousand", 999, 1),
    ):
        states = [False] * right + [True] * wrong
        low, high, looks = 0, len(states) - 1, 0
        while low < high:
            middle, looks = (low + high) // 2, looks + 1
            low, high = (low, middle) if states[middle] else (middle + 1, high)
        assert low == states.index(True)
        yield Case(about, (states,), np.array([low, looks]))


exercise = Exercise(
    kind="function",
    function="first_wrong",
    breaks='the sixth of eight',
    title=Words(en='The first wrong tensor', zh='第一个错的张量'),
    task=Words(
        en="""states is a list of booleans in computing order: False is right, True is wrong; from the first wrong one on, all are wrong.
Return np.array([index of the first wrong one, how many states you looked at]). Look at the middle (low + high) // 2 of what is left; the last one is known to be wrong.""",
        zh="""states 是按计算顺序排列的布尔值：False 是对，True 是错；从第一个错的起，后面全错。
返回 np.array([第一个错的下标, 看了几次])。每次看剩余部分的中间 (low + high) // 2；已知最后一个是错的。""",
    ),
    hints=(
        Words(en='Keep low and high: the first wrong one lies between them.', zh='维护 low 和 high：第一个错的就在它们之间。'),
        Words(en='A wrong middle becomes high; a right one makes low = middle + 1.', zh='中间若错，high = 中间；若对，low = 中间 + 1。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(states):
    return np.array([0, 0])  # fill in


@exercise.solved_by
def solution(states):
    low, high, looks = 0, len(states) - 1, 0
    while low < high:
        middle, looks = (low + high) // 2, looks + 1
        low, high = (low, middle) if states[middle] else (middle + 1, high)
    return np.array([low, looks])


@exercise.mistaken(en="every tensor was looked at: halve what is left", zh="挨个都看了：要每次减半")
def one_by_one(states):
    return np.array([states.index(True), states.index(True) + 1])


@exercise.mistaken(
    en="this is the last right one, expected the first wrong one", zh="这是最后一个对的，应当是第一个错的"
)
def before_it(states):
    low, high, looks = 0, len(states) - 1, 0
    while low < high:
        middle, looks = (low + high) // 2, looks + 1
        low, high = (low, middle) if states[middle] else (middle + 1, high)
    return np.array([low - 1, looks])
