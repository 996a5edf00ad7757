"""Every tensor that the decoder shows, and the one name that it has everywhere.

A tensor's name is its PyTorch module path: the weight's name without `.weight`. This table drives the NumPy trace and
the test of its shapes, the hooks on PyTorch, the ONNX value names and the documentation.

The letters of a shape: B batch · T tokens · S keys (past + T) · C hidden · F intermediate · H heads · K key/value
heads · D head dim · V vocabulary.

>>> from refimpl.config import Config
>>> config = Config(family="Baichuan2-7B", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
>>> for name, tap in taps(config).items():
...     print(f"{name:46} {tap.shape}")
model.embed_tokens                             B T C
model.layers.0.input_layernorm                 B T C
model.layers.0.self_attn.W_pack                B T H*D+2*K*D
...
model.norm                                     B T C
lm_head                                        B T V
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refimpl.config import Config


@dataclass(frozen=True)
class Row:
    """One row of the table: `name` (`{i}` is the layer), `shape` in letters, `meaning`, and where PyTorch shows it.

    `observed` is "output" (of the module of that name), "input MODULE" (the module whose first input it is) or
    "" where the official code keeps the tensor in a local variable, so that only a derivation can show it.
    """

    name: str
    shape: str
    meaning: str
    observed: str = "output"


NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # the last names of what RMSNorm gives
_LAYER = "model.layers.{i}"
_ATTN = _LAYER + ".self_attn"
_MLP = _LAYER + ".mlp"

EMBED = (Row("model.embed_tokens", "B T C", "the embedding row of each token"),)
QKV_PACKED = (Row(f"{_ATTN}.W_pack", "B T H*D+2*K*D", "queries, keys and values side by side, before RoPE"),)
QKV_SEPARATE = (
    Row(f"{_ATTN}.q_proj", "B T H*D", "queries before RoPE"),
    Row(f"{_ATTN}.k_proj", "B T K*D", "keys before RoPE"),
    Row(f"{_ATTN}.v_proj", "B T K*D", "values"),
)
ATTENTION = (
    Row(f"{_ATTN}.query", "B H T D", "queries as attention uses them (after RoPE, if the model has it)", ""),
    Row(f"{_ATTN}.key", "B K T D", "the new keys as the cache keeps them (after RoPE, if the model has it)", ""),
    Row(f"{_ATTN}.value", "B K T D", "the new values as the cache keeps them", ""),
    Row(f"{_ATTN}.scores", "B H T S", "query times key over the root of D, before mask and ALiBi", ""),
    Row(f"{_ATTN}.probs", "B H T S", "softmax of scores + mask", ""),
    Row(f"{_ATTN}.context", "B T H*D", "probs times value, heads side by side", f"input {_ATTN}.o_proj"),
    Row(f"{_ATTN}.o_proj", "B T C", "what attention adds to the residual stream"),
    Row(f"{_LAYER}.attention_residual", "B T C", "the stream after it", f"input {_LAYER}.post_attention_layernorm"),
)
MLP = (
    Row(f"{_LAYER}.post_attention_layernorm", "B T C", "RMSNorm before the MLP"),
    Row(f"{_MLP}.gate_proj", "B T F", "the gate before SiLU"),
    Row(f"{_MLP}.act_fn", "B T F", "SiLU of the gate"),
    Row(f"{_MLP}.up_proj", "B T F", "what the gate lets through"),
    Row(f"{_MLP}.product", "B T F", "act_fn times up_proj", f"input {_MLP}.down_proj"),
    Row(f"{_MLP}.down_proj", "B T C", "what the MLP adds to the residual stream"),
    Row(_LAYER, "B T C", "the stream after the layer"),
)
HEAD = (
    Row("model.norm", "B T C", "the final RMSNorm"),
    Row("lm_head", "B T V", "the logits"),
)


def layer_taps(config: Config) -> tuple[Row, ...]:
    """The rows of one layer, in computing order, with `{i}` still in their names."""
    norm = Row(f"{_LAYER}.input_layernorm", "B T C", "RMSNorm before attention")
    return (norm, *(QKV_PACKED if config.qkv_packed else QKV_SEPARATE), *ATTENTION, *MLP)


def taps(config: Config) -> dict[str, Row]:
    """Full name -> row for every tap of this model, in computing order."""
    layers = [(t.name.format(i=i), t) for i in range(config.num_hidden_layers) for t in layer_taps(config)]
    return dict([(t.name, t) for t in EMBED] + layers + [(t.name, t) for t in HEAD])


def input_of(module: str) -> str:
    """The tap that a linear multiplies.

    >>> input_of("model.layers.3.mlp.up_proj"), input_of("lm_head")
    ('model.layers.3.post_attention_layernorm', 'model.norm')
    """
    parent, _, kind = module.rpartition(".")
    layer = parent.rpartition(".")[0]
    found = {
        "lm_head": "model.norm", "o_proj": f"{parent}.context", "down_proj": f"{parent}.product",
        "gate_proj": f"{layer}.post_attention_layernorm", "up_proj": f"{layer}.post_attention_layernorm",
    }  # fmt: skip
    return found.get(kind, f"{layer}.input_layernorm")


def shape(tap: Row, config: Config, batch: int, tokens: int, keys: int) -> tuple[int, ...]:
    """The numbers behind a tap's letters.

    >>> from refimpl.config import Config
    >>> shape(QKV_PACKED[0], Config(hidden_size=32, num_attention_heads=4), batch=2, tokens=5, keys=9)
    (2, 5, 96)
    """
    letters = {
        "B": batch, "T": tokens, "S": keys, "C": config.hidden_size, "F": config.intermediate_size,
        "H": config.num_attention_heads, "K": config.num_key_value_heads, "D": config.head_dim, "V": config.vocab_size,
    }  # fmt: skip

    def term(product: str) -> int:
        return math.prod(int(f) if f.isdigit() else letters[f] for f in product.split("*"))

    return tuple(sum(term(product) for product in axis.split("+")) for axis in tap.shape.split())
