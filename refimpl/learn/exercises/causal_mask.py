"""The causal mask: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.config import Config
from refimpl.learn.exercise import Case, Exercise, Words
from refimpl.positions import attention_bias


def cases() -> Iterator[Case]:
    for tokens, past in ((4, 0), (1, 5), (3, 2)):
        bias = attention_bias(Config(), np.ones((1, past + tokens), int), tokens, np.float64)[0, 0]
        yield Case(f"{tokens} tokens" + f" behind {past}" * bool(past), (tokens, past), np.where(bias == 0, 0.0, -1e9))


exercise = Exercise(
    kind="function",
    function="causal_mask",
    breaks='4 tokens',
    title=Words(en='The causal mask', zh='因果掩码'),
    task=Words(
        en="""Return what is added to the scores of T new tokens behind `past` tokens: float64 (T, past + T).
0 where a token may look (the past, and the new tokens up to itself), -1e9 elsewhere.""",
        zh="""返回加到 T 个新词元得分上的数，前面已有 past 个词元：float64，形状 (T, past + T)。
可以看的地方是 0（过去，以及直到自己为止的新词元），其余是 -1e9。""",
    ),
    hints=(
        Words(en='Token t stands at position past + t, and may look at all positions up to it.', zh='第 t 个词元的位置是 past + t，它可以看到直到自己的所有位置。'),
        Words(en='Compare np.arange(past + T) with the position of each token.', zh='拿 np.arange(past + T) 与各词元的位置比较。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(T, past):
    return np.zeros((T, past + T))  # fill in


@exercise.solved_by
def solution(T, past):
    at = np.arange(past + T)
    return np.where(at <= past + np.arange(T)[:, None], 0.0, -1e9)


@exercise.mistaken(en="a token may look at itself", zh="词元可以看自己")
def blind(T, past):
    at = np.arange(past + T)
    return np.where(at < past + np.arange(T)[:, None], 0.0, -1e9)


@exercise.mistaken(en="the past was forgotten: positions begin behind it", zh="忘了过去：新词元的位置从过去之后算起")
def no_past(T, past):
    at = np.arange(past + T)
    return np.where(at <= np.arange(T)[:, None], 0.0, -1e9)


@exercise.mistaken(en="this looks ahead, and not back", zh="方向反了：看的是后面，不是前面")
def ahead(T, past):
    at = np.arange(past + T)
    return np.where(at >= past + np.arange(T)[:, None], 0.0, -1e9)
