"""Scores of attention: a method of the decoder, with grouped queries."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="scores",
    breaks="model.layers.0.self_attn.scores",
    title=Words(en="Scores of attention", zh="注意力得分"),
    task=Words(
        en="""Return how well each query fits each key: their product over the root of D.
q is (B, H, T, D) and k is (B, K, S, D). H/K query heads in a row share one key head. Return (B, H, T, S).""",
        zh="""返回每个查询与每个键的合拍程度：点积除以 D 的平方根。
q 的形状是 (B, H, T, D)，k 是 (B, K, S, D)。相邻的 H/K 个查询头合用一个键头。返回 (B, H, T, S)。""",
    ),
    hints=(
        Words(en="np.repeat(k, H // K, axis=1) gives each query head its key head.",
              zh="np.repeat(k, H // K, axis=1) 给每个查询头配上它的键头。"),
        Words(en="Matrix products need the keys with their last two axes swapped; D is the last axis of q.",
              zh="做矩阵乘法前，要交换键的最后两个轴；D 是 q 最后一个轴的长度。"),
    ),
)  # fmt: skip


@exercise.starts_as
def starter(self, q, k):
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return 0 * (q @ k.swapaxes(-1, -2))  # fill in


@exercise.solved_by
def solution(self, q, k):
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])


@exercise.mistaken(en="the division by the root of D is missing", zh="忘了除以 D 的平方根")
def unscaled(self, q, k):
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return q @ k.swapaxes(-1, -2)


@exercise.mistaken(en="it is divided by D, expected its root", zh="除以了 D，应当除以 D 的平方根")
def divided_by_the_dimension(self, q, k):
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return q @ k.swapaxes(-1, -2) / q.shape[-1]


@exercise.mistaken(
    en="query heads take turns with key heads, expected groups", zh="查询头与键头轮流搭配了，应当分组搭配"
)
def heads_take_turns(self, q, k):
    k = np.tile(k, (1, q.shape[1] // k.shape[1], 1, 1))
    return q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
