"""SwiGLU: a method of the decoder."""

import numpy as np

from refimpl.learn.exercise import Exercise, Words

exercise = Exercise(
    kind="method",
    function="mlp",
    breaks='model.layers.0.mlp.act_fn',
    title=Words(en='SwiGLU', zh='SwiGLU：带门的 MLP'),
    task=Words(
        en="""Compute the MLP on x (B, T, C): down_proj of SiLU(gate_proj) times up_proj. `at` is its name.
self.linear(f"{at}.gate_proj", x) multiplies by a matrix; show act_fn and product with self.tap(name, tensor).""",
        zh="""在 x（B, T, C）上计算 MLP：SiLU(gate_proj) 乘以 up_proj，再过 down_proj。at 是它的名字。
self.linear(f"{at}.gate_proj", x) 乘以一个矩阵；act_fn 和 product 用 self.tap(名字, 张量) 交出来。""",
    ),
    hints=(
        Words(en='SiLU(g) is g / (1 + exp(-g)).', zh='SiLU(g) 是 g / (1 + exp(-g))。'),
        Words(en='product is act_fn times self.linear(f"{at}.up_proj", x).', zh='product 是 act_fn 乘以 self.linear(f"{at}.up_proj", x)。'),
    ),
)  # fmt: skip


@exercise.starts_as
def starter(self, at, x):
    gate = self.tap(f"{at}.act_fn", 0 * self.linear(f"{at}.gate_proj", x))  # fill in
    product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
    return self.linear(f"{at}.down_proj", product)


@exercise.solved_by
def solution(self, at, x):
    gate = self.linear(f"{at}.gate_proj", x)
    gate = self.tap(f"{at}.act_fn", gate / (1 + np.exp(-gate)))
    product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
    return self.linear(f"{at}.down_proj", product)


@exercise.mistaken(en="this is ReLU, expected SiLU", zh="这是 ReLU，应当是 SiLU")
def relu(self, at, x):
    gate = self.tap(f"{at}.act_fn", np.maximum(self.linear(f"{at}.gate_proj", x), 0))
    product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
    return self.linear(f"{at}.down_proj", product)


@exercise.mistaken(en="this is the sigmoid alone, expected the gate times it", zh="这只是 sigmoid，还要乘以门本身")
def sigmoid_alone(self, at, x):
    gate = self.tap(f"{at}.act_fn", 1 / (1 + np.exp(-self.linear(f"{at}.gate_proj", x))))
    product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
    return self.linear(f"{at}.down_proj", product)


@exercise.mistaken(en="SiLU is on up_proj, expected on gate_proj", zh="SiLU 用在了 up_proj 上，应当用在 gate_proj 上")
def exchanged(self, at, x):
    gate, up = self.linear(f"{at}.gate_proj", x), self.linear(f"{at}.up_proj", x)
    up = self.tap(f"{at}.act_fn", up / (1 + np.exp(-up)))
    return self.linear(f"{at}.down_proj", self.tap(f"{at}.product", gate * up))
