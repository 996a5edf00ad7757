"""Values weighted by attention: a method of the decoder."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="context",
    breaks='model.layers.0.self_attn.context',
    title=Words(en='Values, weighted and summed', zh='加权求和的值'),
    task=Words(
        en="""Return what each token gathers: probs (B, H, T, S) times v (B, K, S, D), then the heads side by side.
H/K query heads in a row share one value head. Return (B, T, H * D).""",
        zh="""返回每个词元收集到的东西：probs（B, H, T, S）乘以 v（B, K, S, D），再把各头并排放好。
相邻的 H/K 个查询头合用一个值头。返回 (B, T, H * D)。""",
    ),
    hints=(
        Words(en='np.repeat(v, H // K, axis=1) gives each head its values.', zh='np.repeat(v, H // K, axis=1) 给每个头配上它的值。'),
        Words(en='Swap the axes of heads and tokens before you reshape.', zh='先交换头与词元两个轴，再 reshape。'),
    ),
)  # fmt: skip


@exercise.starts_as
def starter(self, probs, v):
    B, H, T, _ = probs.shape
    return np.zeros((B, T, H * v.shape[-1]), v.dtype)  # fill in


@exercise.solved_by
def solution(self, probs, v):
    B, H, T, _ = probs.shape
    v = np.repeat(v, H // v.shape[1], axis=1)
    return (probs @ v).swapaxes(1, 2).reshape(B, T, H * v.shape[-1])


@exercise.mistaken(
    en="the heads are not side by side: swap heads and tokens before reshaping",
    zh="各头没有并排：reshape 之前要交换头与词元",
)
def not_swapped(self, probs, v):
    B, H, T, _ = probs.shape
    v = np.repeat(v, H // v.shape[1], axis=1)
    return (probs @ v).reshape(B, T, H * v.shape[-1])


@exercise.mistaken(
    en="the heads are mixed, number by number, expected one after the other", zh="各头的数交错了，应当一头接一头"
)
def mixed(self, probs, v):
    B, H, T, _ = probs.shape
    v = np.repeat(v, H // v.shape[1], axis=1)
    return (probs @ v).transpose(0, 2, 3, 1).reshape(B, T, H * v.shape[-1])


@exercise.mistaken(en="heads take turns with value heads, expected groups", zh="查询头与值头轮流搭配了，应当分组搭配")
def turns(self, probs, v):
    B, H, T, _ = probs.shape
    v = np.tile(v, (1, H // v.shape[1], 1, 1))
    return (probs @ v).swapaxes(1, 2).reshape(B, T, H * v.shape[-1])
