"""Classic mistakes, made on purpose: each must turn the report red, and the first red tensor must be where it was made.

The goldens are PyTorch's own; the tolerance is float32's, the widest at which anybody works with this reference.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from test_goldens import ROOM

import golden
import refimpl
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.decoder import Decoder
from refimpl.positions import alibi_slopes, attention_bias, rope_tables
from refimpl_kernels.ops import NumPyOps

DATA = Path(golden.__file__).parent / "data"
ROPE, ALIBI, GQA = "baichuan-7b-v1-tiny", "baichuan2-13b-tiny", "qwen2-tiny"
MUTANTS = {}


def mutant(name, on, red):
    """Registers a mistake: `change(made, model)` makes it; `red` is the tensor that must be the first to differ."""

    def register(change):
        MUTANTS[name] = on, red, change
        return change

    return register


def change_weight(model, name, function):
    """The model with one parameter's values changed."""
    weight = model.weights[name]
    return refimpl.Model(model.config, model.weights.replace({name: type(weight)(function(weight.array.copy()))}))


class Made:
    """What one mistake has put in the place of functions; `unreached` are those that nothing has called yet."""

    def __init__(self, patch):
        self.patch, self.unreached = patch, set()

    def decoder(self, model, **methods):
        """The model with other methods in its decoder."""
        called = {name: self._noted(name, method) for name, method in methods.items()}
        return model.with_decoder(type("Mutant", (Decoder,), called))

    def replace(self, target, function):
        """Puts a function in the place of `target`, the dotted name that it is called by."""
        self.patch.setattr(target, self._noted(target, function))

    def _noted(self, name, function):
        self.unreached.add(name)

        def noted(*arguments):
            self.unreached.discard(name)
            return function(*arguments)

        return noted


@mutant("NormHead is dropped", ALIBI, "lm_head")
def _(made, model):
    head = model.weights["lm_head.weight"]
    assert isinstance(head, NormHead)
    return refimpl.Model(model.config, model.weights.replace({"lm_head.weight": Weight(head.array)}))


@mutant("RoPE turns the other way", ROPE, "model.layers.0.self_attn.query")
def _(made, model):
    return made.decoder(model, rope=lambda self, x, cos, sin: Decoder.rope(self, x, cos, -sin))


@mutant("RoPE's halves are swapped", ROPE, "model.layers.0.self_attn.query")
def _(made, model):
    return made.decoder(
        model, rope=lambda self, x, cos, sin: np.roll(Decoder.rope(self, x, cos, sin), x.shape[-1] // 2, -1)
    )


@mutant("RoPE pairs neighbours", GQA, "model.layers.0.self_attn.query")
def _(made, model):
    def rope(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

    return made.decoder(model, rope=rope)


@mutant("RoPE's theta is Baichuan's", GQA, "model.layers.0.self_attn.query")
def _(made, model):
    made.replace("refimpl.forward.rope_tables", lambda at, dim, theta, dtype: rope_tables(at, dim, 1e4, dtype))


@mutant("keys are one position late", ROPE, "model.layers.0.self_attn.key")
def _(made, model):
    one_more = rope_tables(np.ones((1, 1), int), model.config.head_dim, model.config.rope_theta, "float32")
    calls = []

    def rope(self, x, cos, sin):
        calls.append(x)
        x = Decoder.rope(self, x, cos, sin)
        return x if len(calls) % 2 else Decoder.rope(self, x, *one_more)  # of each layer, first the query, then the key

    return made.decoder(model, rope=rope)


@mutant("W_pack is read as key, query, value", ALIBI, "model.layers.0.self_attn.W_pack")
def _(made, model):
    def swap(w):
        q, k, v = np.split(w, 3)
        return np.concatenate([k, q, v])

    return change_weight(model, "model.layers.0.self_attn.W_pack.weight", swap)


@mutant("a query sees the next token", ROPE, "model.layers.0.self_attn.probs")
def _(made, model):
    def shifted(config, mask, tokens, dtype):
        bias = attention_bias(config, mask, tokens, dtype)
        return np.concatenate([bias[:, :, 1:], bias[:, :, -1:]], axis=2)

    made.replace("refimpl.forward.attention_bias", shifted)


@mutant("padding is not masked", ALIBI, "lm_head")  # all that is recorded of the padded batch
def _(made, model):
    unmasked = lambda config, mask, *rest: attention_bias(config, np.ones_like(mask), *rest)
    made.replace("refimpl.forward.attention_bias", unmasked)


@mutant("ALiBi has the slopes of twice the heads", ALIBI, "model.layers.0.self_attn.probs")
def _(made, model):
    made.replace("refimpl.positions.alibi_slopes", lambda heads: alibi_slopes(2 * heads)[:heads])


@mutant("ALiBi grows with distance", ALIBI, "model.layers.0.self_attn.probs")
def _(made, model):
    made.replace("refimpl.positions.alibi_slopes", lambda heads: -alibi_slopes(heads))


@mutant("keys and values are one slot off", ROPE, "model.layers.0.self_attn.probs")
def _(made, model):
    made.replace("refimpl.forward.no_cache", lambda layer, key, value: (np.roll(key, 1, 2), np.roll(value, 1, 2)))


@mutant("values are one slot off", GQA, "model.layers.0.self_attn.context")
def _(made, model):
    made.replace("refimpl.forward.no_cache", lambda layer, key, value: (key, np.roll(value, 1, 2)))


@mutant("query heads take turns with key heads", GQA, "model.layers.0.self_attn.probs")
def _(made, model):
    def attention(self, i, x, cos, sin, mask):
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        order = np.argsort(np.arange(heads) % kv, kind="stable")

        class Turned(type(self.ops)):
            def matmul(self, q, k):
                batch, dim = q.shape[0], q.shape[-1]
                each = q.reshape(batch, heads, -1, dim)[:, order].reshape(q.shape)
                scores = super().matmul(each, k)
                back = scores.reshape(batch, heads, -1, scores.shape[-1])[:, np.argsort(order)]
                return back.reshape(scores.shape)

        turned = Decoder(self.config, self.weights, Turned(self.ops.dtype), self.tap)
        return Decoder.attention(turned, i, x, cos, sin, mask)

    return made.decoder(model, attention=attention)


@mutant("scores are not scaled", ROPE, "model.layers.0.self_attn.probs")
def _(made, model):
    softmax = NumPyOps.softmax
    made.replace(
        "refimpl_kernels.ops.NumPyOps.softmax", lambda self, x: softmax(self, x * np.where(x > -1e4, 10**0.5, 1))
    )


@mutant("eps is outside the root", ROPE, "model.layers.0.input_layernorm")
def _(made, model):
    def rms_norm(self, name, x):
        root = np.sqrt(np.mean(x * x, -1, keepdims=True)) + self.config.rms_norm_eps**0.5
        return self.tap(name, self.ops.parameter(self.weights[f"{name}.weight"]) * (x / root))

    return made.decoder(model, rms_norm=rms_norm)


@mutant("eps is 1e-5", ROPE, "model.layers.0.input_layernorm")
def _(made, model):
    def rms_norm(self, name, x):
        scale = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)
        return self.tap(name, self.ops.parameter(self.weights[f"{name}.weight"]) * (x * scale))

    return made.decoder(model, rms_norm=rms_norm)


@mutant("the norm subtracts the mean", GQA, "model.layers.0.input_layernorm")
def _(made, model):
    rms_norm = Decoder.rms_norm
    return made.decoder(model, rms_norm=lambda self, name, x: rms_norm(self, name, x - x.mean(-1, keepdims=True)))


@mutant("the gain is one plus the weight", ALIBI, "model.layers.1.input_layernorm")
def _(made, model):
    return change_weight(model, "model.layers.1.input_layernorm.weight", lambda w: 1 + w)


@mutant("gate and up are swapped", GQA, "model.layers.0.mlp.gate_proj")
def _(made, model):
    names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")]
    swapped = {a: model.weights[b] for a, b in zip(names, reversed(names), strict=True)}
    return refimpl.Model(model.config, model.weights.replace(swapped))


@mutant("GELU stands for SiLU", ROPE, "model.layers.0.mlp.act_fn")
def _(made, model):
    erf = np.vectorize(math.erf)
    made.replace("refimpl_kernels.ops.NumPyOps.sigmoid", lambda self, x: (0.5 * (1 + erf(x / 2**0.5))).astype(x.dtype))


@mutant("biases are dropped", GQA, "model.layers.0.self_attn.q_proj")
def _(made, model):
    weights = {n: w for n, w in model.weights.items() if not n.endswith(".bias")}
    return refimpl.Model(model.config, type(model.weights)(weights))


@mutant("a residual is dropped", ALIBI, "model.layers.0")
def _(made, model):
    def layer(self, i, x, cos, sin, mask):
        at = f"model.layers.{i}"
        x = x + self.attention(i, self.rms_norm(f"{at}.input_layernorm", x), cos, sin, mask)
        return self.tap(at, self.mlp(f"{at}.mlp", self.rms_norm(f"{at}.post_attention_layernorm", x)))

    return made.decoder(model, layer=layer)


@mutant("token ids are one too high", GQA, "model.layers.0.input_layernorm")
def _(made, model):
    return change_weight(model, "model.embed_tokens.weight", lambda w: np.roll(w, 1, axis=0))


@mutant("the head's rows are permuted", ALIBI, "lm_head")
def _(made, model):
    return change_weight(model, "lm_head.weight", lambda w: w[::-1])


@mutant("layers are exchanged", GQA, "model.layers.0.input_layernorm")
def _(made, model):
    other = {"0": "1", "1": "0", "2": "2"}
    swapped = {}
    for name in model.weights:
        if name.startswith("model.layers."):
            parts = name.split(".")
            parts[2] = other[parts[2]]
            swapped[name] = model.weights[".".join(parts)]
    return refimpl.Model(model.config, model.weights.replace(swapped))


@mutant("a weight is truncated to bfloat16", GQA, "model.layers.2.self_attn.o_proj")
def _(made, model):
    cut = lambda w: (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return change_weight(model, "model.layers.2.self_attn.o_proj.weight", cut)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_report_turns_red_where_it_went_wrong(name, monkeypatch):
    on, red, change = MUTANTS[name]
    model = refimpl.load(DATA / on / "model")
    made = Made(monkeypatch)
    model = change(made, model) or model
    report = golden.check(model, DATA / on / "golden", "float32")
    assert not made.unreached, "the mistake is in the place of something that is not called"
    assert not report
    guilty = report.failures[0].name.split("/")[-1]
    assert guilty == red
    assert report.worst[0].excess > 10, "not a matter of taste"


@pytest.mark.parametrize("on", [ROPE, ALIBI, GQA])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_without_a_mistake_it_is_green(on, dtype):
    report = golden.check(DATA / on / "model", DATA / on / "golden", dtype)
    assert report
    if dtype:
        assert report.worst[0].excess < ROOM, "the bound has room"
