"""Sabotages: models that are wrong on purpose, and may still answer right. The book and its page share this list.

>>> from refimpl import load
>>> wrong = SABOTAGES["no_rope"].of(load())
>>> wrong.tokenizer.decode(list(wrong.generate("登鹳雀楼->王之涣\\n夜雨寄北->", max_new_tokens=1)))
'李商隐'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refimpl.checkpoint.weights import Weight
from refimpl.decoder import Decoder
from refimpl.learn.exercise import Words
from refimpl.model import Model


class NoRope(Decoder):
    """Attention that does not know where a token stands."""

    def rope(self, x, cos, sin):
        return x


class RopeSign(Decoder):
    """RoPE that turns the other way."""

    def rope(self, x, cos, sin):
        return super().rope(x, cos, sin * -1.0)


class LayerNorm(Decoder):
    """A norm that subtracts the mean first."""

    def rms_norm(self, name, x):
        return super().rms_norm(name, x - self.ops.mean(x))


class Relu(Decoder):
    """ReLU in place of SiLU. A sigmoid this steep is 0 or 1, so every kind of `ops` computes it."""

    def mlp(self, at, x):
        gate = self.linear(f"{at}.gate_proj", x)
        gate = self.tap(f"{at}.act_fn", gate * self.ops.sigmoid(gate * 1e6))
        product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))
        return self.linear(f"{at}.down_proj", product)


def _with(decoder: type[Decoder]) -> Callable[[Model], Model]:
    return lambda model: model.with_decoder(decoder)


def _without_norm_head(model: Model) -> Model:
    rows = model.weights["lm_head.weight"].array
    return Model(model.config, model.weights.replace({"lm_head.weight": Weight(rows)}), model.folder)


@dataclass(frozen=True)
class Sabotage:
    """One mistake: what it is, and `of`, which makes it in a model."""

    says: Words
    of: Callable[[Model], Model]


SABOTAGES = {
    "no_rope": Sabotage(Words("no RoPE", "不做 RoPE"), _with(NoRope)),
    "rope_sign": Sabotage(Words("RoPE turns the other way", "RoPE 转反方向"), _with(RopeSign)),
    "layer_norm": Sabotage(Words("LayerNorm for RMSNorm", "用 LayerNorm 代替 RMSNorm"), _with(LayerNorm)),
    "no_norm_head": Sabotage(Words("no NormHead", "不做 NormHead"), _without_norm_head),
    "relu": Sabotage(Words("ReLU for SiLU", "用 ReLU 代替 SiLU"), _with(Relu)),
}
