"""RMSNorm: a method of the decoder."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="rms_norm",
    breaks="model.layers.0.input_layernorm",
    title=Words(en="RMSNorm", zh="RMSNorm 归一化"),
    task=Words(
        en="""Divide each token's vector by its root mean square, then multiply by the gain.
x is (B, T, C); the gain is self.weights[f"{name}.weight"].array, and eps is self.config.rms_norm_eps.
Give the result to self.tap under its name, and return what it returns.""",
        zh="""让每个词元的向量除以自己的均方根，再乘以增益。
x 的形状是 (B, T, C)；增益是 self.weights[f"{name}.weight"].array，eps 是 self.config.rms_norm_eps。
把结果以 name 为名交给 self.tap，并返回它的返回值。""",
    ),
    hints=(
        Words(
            en="The mean is taken over the last axis: each token on its own.",
            zh="均值沿最后一个轴计算，各词元互不相干。",
        ),
        Words(en="eps is added to the mean square, before the root.", zh="eps 加在均方上，然后才开方。"),
    ),
)


@exercise.starts_as
def starter(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    normed = x  # fill in
    return self.tap(name, normed * gain)


@exercise.solved_by
def solution(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    normed = x / np.sqrt(mean_square + self.config.rms_norm_eps)
    return self.tap(name, normed * gain)


@exercise.mistaken(en="a mean is subtracted: that is LayerNorm", zh="减去了均值，那是 LayerNorm 的做法")
def mean_is_subtracted(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    x = x - x.mean(axis=-1, keepdims=True)
    return self.tap(name, x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps) * gain)


@exercise.mistaken(en="eps is added outside the root", zh="eps 加到了根号外面")
def eps_outside(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    return self.tap(name, x / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + self.config.rms_norm_eps**0.5) * gain)


@exercise.mistaken(en="eps is 1e-5, not the config's", zh="eps 用了 1e-5，而不是配置里的值")
def another_eps(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    return self.tap(name, x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * gain)


@exercise.mistaken(en="the gain is one plus the weight, as in Gemma", zh="增益写成了 1 加权重，那是 Gemma 的做法")
def gain_plus_one(self, name, x):
    gain = 1 + self.weights[f"{name}.weight"].array.astype(x.dtype)
    return self.tap(name, x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps) * gain)


@exercise.mistaken(
    en="the mean runs over all tokens, not over each token's vector", zh="均值跨所有词元计算，而不是逐个词元"
)
def mean_over_tokens(self, name, x):
    gain = self.weights[f"{name}.weight"].array.astype(x.dtype)
    mean_square = (x * x).mean(axis=(-2, -1), keepdims=True)
    return self.tap(name, x / np.sqrt(mean_square + self.config.rms_norm_eps) * gain)
