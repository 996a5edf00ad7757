"""The Baichuan2 decoder, written once.

This file is the model: NumPy computes it, the 16-bit emulation rounds it, and the ONNX graphs that run on a phone
are this same code, run on symbols. It is written in `+ - * reshape transpose` on tensors and the functions of an
`ops` (`kernels/refimpl_kernels/ops.py` says what each one means); it never asks which one it runs on.

Every tensor passes through `tap(name, x)` under its PyTorch name, and goes on as what the tap returns: so a run can
be recorded, fed, quantized or broken from outside. Likewise `cache(layer, key, value)` takes the new keys and
values and returns all that attention may see.

B batch · T tokens · S keys (past + T) · C hidden · F intermediate · H heads · K key/value heads · D head dim · V words

Source: the official `modeling_baichuan.py` of Baichuan2-7B (RoPE) and -13B (ALiBi), and Qwen2 in transformers.
"""

from dataclasses import dataclass
from typing import Any

from refimpl.cache import no_cache
from refimpl.config import Config
from refimpl.trace import Tap, silent


@dataclass(frozen=True)
class Decoder:
    """The forward of one model over one kind of tensors. `weights` maps a parameter's name to what `ops` reads."""

    config: Config
    weights: Any
    ops: Any
    tap: Tap = silent
    cache: Any = no_cache

    def __call__(self, ids, cos, sin, mask, logits_from=0):
        """Logits (B, T, V) of token ids (B, T), or of those from a token on. `cos`, `sin`, `mask`: see `layer`."""
        x = self.embed(ids)                                                                  # (B, T, C)
        for i in range(self.config.num_hidden_layers):
            x = self.layer(i, x, cos, sin, mask)                                             # (B, T, C)
        return self.head(x[:, logits_from:])                                                 # (B, T, V)

    def embed(self, ids):
        return self.tap("model.embed_tokens", self.ops.take(self.weights["model.embed_tokens.weight"], ids))

    def layer(self, i, x, cos, sin, mask):
        """Layer `i` on the residual stream (B, T, C): attention and MLP, each on a normed copy, each added back.

        `cos`, `sin`: (B, 1, T, D/2) for the tokens' positions, or None for ALiBi.
        `mask`: (B, 1 or H, T, S), added to the scores: 0 or ALiBi's bias where a token may look, else very low.
        """
        at = f"model.layers.{i}"
        x = x + self.attention(i, self.rms_norm(f"{at}.input_layernorm", x), cos, sin, mask)  # (B, T, C)
        x = self.tap(f"{at}.attention_residual", x)
        x = x + self.mlp(f"{at}.mlp", self.rms_norm(f"{at}.post_attention_layernorm", x))    # (B, T, C)
        return self.tap(at, x)

    def head(self, x):
        """Logits. NormHead (Baichuan2) divides each row of lm_head by its length, when the weights are read."""
        return self.linear("lm_head", self.rms_norm("model.norm", x))                        # (B, T, V)

    def attention(self, i, x, cos, sin, mask):
        """Every token gathers, in each head, the values of the tokens that it looks at."""
        config, at = self.config, f"model.layers.{i}.self_attn"
        B, T, _ = x.shape
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        qkv = [self.linear(f"{at}.{module}", x) for module in config.qkv_modules]
        q, k, v = self.ops.split(qkv[0], (H * D, K * D, K * D)) if config.qkv_packed else qkv
        q = q.reshape(B, T, H, D).transpose(0, 2, 1, 3)                                      # (B, H, T, D)
        k = k.reshape(B, T, K, D).transpose(0, 2, 1, 3)                                      # (B, K, T, D)
        v = v.reshape(B, T, K, D).transpose(0, 2, 1, 3)                                      # (B, K, T, D)
        if cos is not None:
            q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        q = self.tap(f"{at}.query", q)
        k, v = self.cache(i, self.tap(f"{at}.key", k), self.tap(f"{at}.value", v))           # (B, K, S, D)
        scores = self.tap(f"{at}.scores", self.scores(q, k))                                 # (B, H, T, S)
        probs = self.tap(f"{at}.probs", self.probs(scores, mask))                            # (B, H, T, S)
        context = self.tap(f"{at}.context", self.context(probs, v))                          # (B, T, H*D)
        return self.linear(f"{at}.o_proj", context)                                          # (B, T, C)

    def scores(self, q, k):
        """q kᵀ / √D: how well each query fits each key. H/K query heads share a key head, as more rows of one product.

        A 16-bit model whose attention is fused (scaled_dot_product_attention) has scores and probs in float32.
        """
        (B, H, T, D), (_, K, S, _) = q.shape, k.shape
        if self.config.fused_attention:
            q, k = self.ops.upcast(q), self.ops.upcast(k)
        product = self.ops.matmul(q.reshape(B, K, H // K * T, D), k.transpose(0, 1, 3, 2))   # (B, K, H/K*T, S)
        return self.ops.type_as(self.ops.upcast(product) * D**-0.5, q).reshape(B, H, T, S)

    def probs(self, scores, mask):
        """softmax(scores + mask), in float32 at least: the share of its attention that a token gives to each key."""
        return self.ops.type_as(self.ops.softmax(self.ops.upcast(scores) + mask), scores)    # (B, H, T, S)

    def context(self, probs, v):
        """The values of all keys, weighted by probs and summed; then the heads stand side by side again."""
        (B, H, T, S), (_, K, _, D) = probs.shape, v.shape
        context = self.ops.weighted_sum(probs.reshape(B, K, H // K * T, S), v)               # (B, K, H/K*T, D)
        return context.reshape(B, H, T, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)        # (B, T, H*D)

    def rope(self, x, cos, sin):
        """Turns each pair (element i of the first half and i of the second, not neighbours) by its position's angle.

        Both q and k are turned, so that their product depends on how far apart the two tokens are, and on no more.
        """
        ops = self.ops
        a, b = ops.split(ops.upcast(x), (self.config.head_dim // 2,) * 2)                    # (B, *, T, D/2) each
        if not self.config.rope_upcast:
            a, b, cos, sin = (ops.type_as(half, x) for half in (a, b, cos, sin))
        a, b = ops.type_as(a * cos - b * sin, x), ops.type_as(b * cos + a * sin, x)
        return ops.concat((a, b))                                                            # (B, *, T, D)

    def mlp(self, at, x):
        """SwiGLU: the gate, through SiLU, decides how much of each intermediate feature goes on."""
        gate = self.ops.upcast(self.linear(f"{at}.gate_proj", x))                            # (B, T, F)
        gate = self.tap(f"{at}.act_fn", self.ops.type_as(gate * self.ops.sigmoid(gate), x))  # (B, T, F)
        product = self.tap(f"{at}.product", gate * self.linear(f"{at}.up_proj", x))          # (B, T, F)
        return self.linear(f"{at}.down_proj", product)                                       # (B, T, C)

    def rms_norm(self, name, x):
        """x over the root of (its mean square + eps), in float32 at least, times a gain. No mean is subtracted."""
        wide = self.ops.upcast(x)
        wide = wide * self.ops.rsqrt(self.ops.mean(wide * wide) + self.config.rms_norm_eps)  # (B, T, C)
        return self.tap(name, self.ops.parameter(self.weights[f"{name}.weight"]) * self.ops.type_as(wide, x))

    def linear(self, name, x):
        return self.tap(name, self.ops.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")))
