"""Softmax with a mask: a method of the decoder."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="probs",
    breaks='model.layers.0.self_attn.probs',
    title=Words(en='Softmax under a mask', zh='带掩码的 softmax'),
    task=Words(
        en="""Return the share of its attention that each token gives to each key: softmax over the last axis of scores + mask.
scores is (B, H, T, S), mask (B, 1 or H, T, S) has very low numbers where a token may not look.""",
        zh="""返回每个词元分给各个键的注意力：对 scores + mask 的最后一个轴做 softmax。
scores 的形状是 (B, H, T, S)，mask 是 (B, 1 或 H, T, S)，不许看的地方是极小的数。""",
    ),
    hints=(
        Words(en='Add the mask before the exponential.', zh='取指数之前先加掩码。'),
        Words(en='Divide by the sum over the last axis, with keepdims=True.', zh='除以最后一个轴上的和，别忘了 keepdims=True。'),
    ),
)  # fmt: skip


@exercise.starts_as
def starter(self, scores, mask):
    return np.ones_like(scores) / scores.shape[-1]  # fill in


@exercise.solved_by
def solution(self, scores, mask):
    e = np.exp(scores + mask - (scores + mask).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@exercise.mistaken(en="the mask is missing: tokens look ahead", zh="没有加掩码：词元看到了后面")
def no_mask(self, scores, mask):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@exercise.mistaken(
    en="the shares of a key sum to 1, expected those of a query", zh="对键求和成 1 了，应当对每个查询求和成 1"
)
def over_queries(self, scores, mask):
    e = np.exp(scores + mask - (scores + mask).max(-1, keepdims=True))
    return e / e.sum(-2, keepdims=True)


@exercise.mistaken(en="the mask multiplies, expected that it is added", zh="掩码乘上去了，应当相加")
def multiplied(self, scores, mask):
    e = np.exp(scores - scores.max(-1, keepdims=True)) * (mask > -1e4)
    return e
