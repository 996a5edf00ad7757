"""RoPE: a method of the decoder."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="rope",
    breaks="model.layers.0.self_attn.query",
    title=Words(en="Rotary position embedding", zh="旋转位置编码"),
    task=Words(
        en="""Turn each pair of elements by the angle of its token's position.
x is (B, H, T, D); cos and sin are (B, 1, T, D/2). Pair i is element i of the first half and element i of the second.
(a, b) becomes (a cos - b sin, b cos + a sin). Return an array of the shape of x.""",
        zh="""按词元位置对应的角度，旋转每一对元素。
x 的形状是 (B, H, T, D)，cos 和 sin 是 (B, 1, T, D/2)。第 i 对由前一半的第 i 个元素和后一半的第 i 个元素组成。
(a, b) 变成 (a cos - b sin, b cos + a sin)。返回与 x 形状相同的数组。""",
    ),
    hints=(
        Words(en="Cut the last axis in the middle, not into even and odd.", zh="把最后一个轴从中间切开，而不是按奇偶分。"),
        Words(en="np.split(x, 2, axis=-1) gives a and b; np.concatenate puts them back.",
              zh="np.split(x, 2, axis=-1) 得到 a 和 b，np.concatenate 再把它们拼回去。"),
    ),
)  # fmt: skip


@exercise.starts_as
def starter(self, x, cos, sin):
    return x  # fill in


@exercise.solved_by
def solution(self, x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@exercise.mistaken(en="your pairs are neighbours, expected halves", zh="你把相邻元素配成一对，应当是前后两半配对")
def neighbours(self, x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


@exercise.mistaken(en="it turns the other way: the sign of sin is wrong", zh="转反了方向：sin 的符号不对")
def other_way(self, x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)


@exercise.mistaken(en="the halves come back in the wrong order", zh="拼回去时两半的次序反了")
def halves_swapped(self, x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([b * cos + a * sin, a * cos - b * sin], axis=-1)


@exercise.mistaken(en="the second line uses the new a, expected the old one", zh="第二行用了已经更新过的 a，应当用旧值")
def overwritten(self, x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    a = a * cos - b * sin
    return np.concatenate([a, b * cos + a * sin], axis=-1)


@exercise.mistaken(en="nothing is turned", zh="没有做任何旋转")
def not_turned(self, x, cos, sin):
    return x.copy()
