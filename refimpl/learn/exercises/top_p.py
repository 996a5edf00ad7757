"""Top-p: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    for about, shares, p, count in (
        ("three words", [0.15, 0.5, 0.3, 0.05], 0.9, 3),
        ("one word", [0.97, 0.02, 0.01], 0.9, 1),
        ("all of them", [0.25, 0.35, 0.4], 0.99, 3),
    ):
        best = sorted(shares, reverse=True)[:count]
        yield Case(about, (np.array(shares), p), np.array([s / sum(best) if s in best else 0.0 for s in shares]))


exercise = Exercise(
    kind="function",
    function="top_p",
    breaks='three words',
    title=Words(en='Top-p', zh='top-p 采样'),
    task=Words(en='shares (V,) sum to 1. Keep the best words until together they hold at least p, set all others to 0, and make the rest sum to 1 again.', zh='shares（V,）之和为 1。从最好的词开始保留，直到合起来不少于 p，其余置 0，再让剩下的之和为 1。'),
    hints=(
        Words(en='Sort from the best down, and take a running sum.', zh='从大到小排序，再逐个累加。'),
        Words(en='The word with which p is reached is kept.', zh='让累加值达到 p 的那个词要保留。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(shares, p):
    return shares  # fill in


@exercise.solved_by
def solution(shares, p):
    order = np.argsort(-shares)
    count = int((np.cumsum(shares[order]) < p).sum()) + 1
    kept = np.zeros_like(shares)
    kept[order[:count]] = shares[order[:count]]
    return kept / kept.sum()


@exercise.mistaken(en="the word with which p is reached is kept as well", zh="让累加值达到 p 的那个词也要保留")
def one_short(shares, p):
    order = np.argsort(-shares)
    count = max(1, int((np.cumsum(shares[order]) < p).sum()))
    kept = np.zeros_like(shares)
    kept[order[:count]] = shares[order[:count]]
    return kept / kept.sum()


@exercise.mistaken(en="what is kept has to sum to 1 again", zh="留下的要重新归一，使和为 1")
def not_again(shares, p):
    order = np.argsort(-shares)
    count = int((np.cumsum(shares[order]) < p).sum()) + 1
    kept = np.zeros_like(shares)
    kept[order[:count]] = shares[order[:count]]
    return kept
