"""The capstone: the layers of the decoder, as one class."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="decoder",
    function="MyDecoder",
    breaks="model.layers.0",
    title=Words(en="The whole decoder", zh="整个解码器"),
    task=Words(
        en="""Write a class MyDecoder with the method layer(self, i, x, cos, sin, mask), and whatever it needs.
Given are self.config, self.linear(name, x), self.gain(name) of a norm, self.tap(name, x), which shows a tensor and
returns it, and self.cache(i, key, value), which returns all keys and values. cos is None for models with ALiBi.
Every tensor of `refimpl trace` has to be shown, in its shape; embedding and head are there already.""",
        zh="""写一个类 MyDecoder，方法是 layer(self, i, x, cos, sin, mask)，别的按需要添。
现成的有：self.config；self.linear(名字, x)；某个归一化的增益 self.gain(名字)；self.tap(名字, x)，
它交出一个张量并原样返回；self.cache(i, key, value)，它返回全部键和值。用 ALiBi 的模型 cos 为 None。
refimpl trace 里的每个张量都要按它的形状交出来；嵌入和头已经写好。""",
    ),
    hints=(
        Words(en="Write it tensor by tensor: the check names the first one that is missing or wrong.",
              zh="一个张量一个张量地写：检查会说出第一个缺的或错的。"),
        Words(en="refimpl/decoder.py has all of it in a hundred lines; chapters 3 to 8 have them one by one.",
              zh="refimpl/decoder.py 用一百行写完了全部；第 3 到第 8 章逐一讲过。"),
    ),
)  # fmt: skip


@exercise.starts_as
class Starter:
    def layer(self, i, x, cos, sin, mask):
        return self.tap(f"model.layers.{i}", x)  # fill in


@exercise.solved_by
class Solution:
    def layer(self, i, x, cos, sin, mask):
        at = f"model.layers.{i}"
        x = x + self.attention(i, self.norm(f"{at}.input_layernorm", x), cos, sin, mask)
        x = self.tap(f"{at}.attention_residual", x)
        return self.tap(at, x + self.mlp(f"{at}.mlp", self.norm(f"{at}.post_attention_layernorm", x)))

    def norm(self, name, x):
        root = np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return self.tap(name, self.gain(name) * x / root)

    def attention(self, i, x, cos, sin, mask):
        c, at, (B, T, _) = self.config, f"model.layers.{i}.self_attn", x.shape
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        made = [self.linear(f"{at}.{module}", x) for module in c.qkv_modules]
        q, k, v = np.split(made[0], [H * D, (H + K) * D], axis=-1) if c.qkv_packed else made
        q, k, v = (part.reshape(B, T, -1, D).swapaxes(1, 2) for part in (q, k, v))
        if cos is not None:
            q, k = (self.turned(part, cos, sin) for part in (q, k))
        q = self.tap(f"{at}.query", q)
        k, v = self.cache(i, self.tap(f"{at}.key", k), self.tap(f"{at}.value", v))
        k, v = (np.repeat(part, H // K, axis=1) for part in (k, v))
        scores = self.tap(f"{at}.scores", q @ k.swapaxes(-1, -2) / np.sqrt(D))
        e = np.exp(scores + mask - (scores + mask).max(-1, keepdims=True))
        probs = self.tap(f"{at}.probs", e / e.sum(-1, keepdims=True))
        context = self.tap(f"{at}.context", (probs @ v).swapaxes(1, 2).reshape(B, T, H * D))
        return self.linear(f"{at}.o_proj", context)

    def turned(self, x, cos, sin):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def mlp(self, at, x):
        gate = self.linear(f"{at}.gate_proj", x)
        gate = self.tap(f"{at}.act_fn", gate / (1 + np.exp(-gate)))
        product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
        return self.linear(f"{at}.down_proj", product)
