"""A Baichuan in PyTorch under the module names of the official one: a third opinion, and code to be trusted or not.

The 7B rotates and uses the fused attention, the 13B has ALiBi over absolute key positions and multiplies by hand; the
second generation normalises its head. It has the habits of the official code that a golden must cope with: float32 in
the midst, a head that replaces its weight in the first forward, modules called by keyword, layers that return tuples.
And one that it has not: it adds to the stream in place, unless it is trained.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


def slopes_of(heads):
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (k + 1) / heads) for k in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return slopes_of(below) + slopes_of(2 * below)[::2][: heads - below]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        scaled = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(self.weight.dtype)


class NormHead(nn.Module):
    def __init__(self, hidden, words):
        super().__init__()
        self.weight, self.first = nn.Parameter(torch.empty(words, hidden)), True
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x):
        if self.training:
            return F.linear(x, F.normalize(self.weight))
        if self.first:
            self.weight, self.first = nn.Parameter(F.normalize(self.weight)), False
        return F.linear(x, self.weight)


class MLP(nn.Module):
    def __init__(self, hidden, inter):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotates = config.max_position_embeddings is not None
        if self.rotates:
            exponents = torch.arange(0, self.dim, 2).float() / self.dim
            angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 10000.0**-exponents)
            self.cos, self.sin = torch.cat([angles] * 2, -1).cos(), torch.cat([angles] * 2, -1).sin()

    def forward(self, x, allowed, positions):
        batch, tokens, _ = x.shape
        q, k, v = self.W_pack(x).view(batch, tokens, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        if self.rotates:
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if allowed.shape[0] == 1:
                context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:  # rows of padding see nothing, which must not become NaN
                mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
                context = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            bias = torch.Tensor(slopes_of(self.heads))[:, None, None] * torch.arange(tokens)
            scores = torch.matmul(q, k.transpose(2, 3)) / self.dim**0.5 + bias.to(q.dtype)
            probs = F.softmax(scores.masked_fill(~allowed, torch.finfo(q.dtype).min), dim=-1)
            context = torch.matmul(probs, v)
        return self.o_proj(input=context.transpose(1, 2).reshape(batch, tokens, -1)), None

    def rotate(self, x, positions):
        cos, sin, wide = self.cos[positions][:, None], self.sin[positions][:, None], x.float()
        turned = torch.cat((-wide[..., self.dim // 2 :], wide[..., : self.dim // 2]), -1)
        return (wide * cos + turned * sin).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, allowed, positions):
        x = x + self.self_attn(x=self.input_layernorm(x), allowed=allowed, positions=positions)[0]
        added = self.mlp(self.post_attention_layernorm(x))
        if self.training:  # autograd needs the stream as it was
            return (x + added,)
        x += added
        return (x,)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        raise AssertionError("weights are about to be read, and need no start")

    def _set_gradient_checkpointing(self, module, value=False):
        module.gradient_checkpointing = value


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = (False,)
        self.post_init()

    def forward(self, ids, attention_mask, positions):
        tokens = ids.shape[1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            allowed = allowed & (attention_mask > 0)[:, None, None]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, allowed, torch.arange(tokens)[None] if positions is None else positions)[0]
        return self.norm(x)


class BaichuanForCausalLM(BaichuanPreTrainedModel):
    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        self.model = BaichuanModel(config)
        second = config.z_loss_weight is not None or getattr(config, "tokenizer_class", None) == "BaichuanTokenizer"
        head = NormHead if second else lambda hidden, words: nn.Linear(hidden, words, bias=False)
        self.lm_head = head(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, return_dict=True, **_):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, attention_mask, position_ids)))
