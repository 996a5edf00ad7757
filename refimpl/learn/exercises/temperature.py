"""Temperature: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words
from refimpl_kernels.ops import NumPyOps


def cases() -> Iterator[Case]:
    ops, logits = NumPyOps(np.dtype(np.float64)), np.array([3.0, 1.0, 0.0, -2.0])
    for about, temperature in (("cold", 0.5), ("hot", 4.0), ("one", 1.0)):
        yield Case(about, (logits, temperature), ops.softmax(logits[None] / temperature)[0])


exercise = Exercise(
    kind="function",
    function="shares",
    breaks='cold',
    title=Words(en='Temperature', zh='温度'),
    task=Words(en='Return the shares of words by their logits (V,) at a temperature: softmax of the logits over the temperature.', zh='返回给定温度下各词的概率：logits（V,）除以温度，再做 softmax。'),
    hints=(
        Words(en='Divide before the exponential.', zh='取指数之前先除。'),
        Words(en='Below 1, the best word gets more.', zh='小于 1 时，最好的词更占优。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(logits, temperature):
    return np.ones_like(logits) / len(logits)  # fill in


@exercise.solved_by
def solution(logits, temperature):
    e = np.exp((logits - logits.max()) / temperature)
    return e / e.sum()


@exercise.mistaken(en="the temperature multiplies, expected that it divides", zh="温度乘上去了，应当去除")
def multiplied(logits, temperature):
    e = np.exp((logits - logits.max()) * temperature)
    return e / e.sum()


@exercise.mistaken(en="the shares are divided, expected the logits", zh="除的是概率，应当除 logits")
def afterwards(logits, temperature):
    e = np.exp(logits - logits.max())
    return e / e.sum() / temperature
