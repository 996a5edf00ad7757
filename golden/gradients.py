"""How far two correct gradients may be apart, and the comparison that says so.

The rule of `golden.tolerance` is continued after the forward. Roundings are independent, so variances add up over all
operations: those of the forward up to the logits, then those of the backward pass. The gradient of a tap adds the
length of the sum that made it; for the input of a linear, this is the number of the matrix's rows. The gradient of a
parameter adds the number of tokens that it is summed over to what the gradient of its output has inherited.

A gradient is measured against the largest value of its tensor, not of its row. Where the loss hardly depends on a
token, the token's row is a small difference of large numbers. For the same reason a correct float32 run may need a
larger part of its bound than a forward does: up to a quarter, as `tests/gradients/test_pytorch_gradients.py` measures.

>>> bound = gradient_tolerances(Config(), "float32", batch=1, tokens=128)
>>> print(bound["model.layers.31.mlp.down_proj.weight"])
5.8e-04 (8 * 2^-24 * sqrt(1484868): float32 rounding, forward and back)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from golden.compare import Report, compare
from golden.tolerance import LARGEST, ROUNDINGS, SAFETY, Tolerance, variance
from refimpl.checkpoint.resolve import expected_shapes
from refimpl.config import Config
from refimpl.names import taps
from refimpl.trace import Trace


def gradient_tolerances(config: Config, dtype: str, batch: int, tokens: int) -> dict[str, Tolerance]:
    """The Tolerance of the gradient of every tap and parameter, in the order of the backward pass."""
    forward = sum(variance(name.rpartition(".")[2], config, dtype, tokens) for name in taps(config))
    inherited, rules = forward, {}
    parameters = list(expected_shapes(config))
    for name in reversed(taps(config)):
        inherited += _length(name.rpartition(".")[2], config, tokens)
        rules[name] = _rule(dtype, inherited)
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in parameters:
                rules[parameter] = _rule(dtype, inherited + batch * tokens)
    return rules


def compare_gradients(
    a: Mapping[str, Any], b: Mapping[str, Any], tolerance: Tolerance | Mapping[str, Tolerance]
) -> Report:
    """Judges gradients `a` by the reference `b`, each tensor against its largest value.

    If `b` is in the order of the backward pass, its first failure is the first that this pass computed. Indices are
    those of the flattened tensors.
    """
    ours, theirs = (
        Trace(((name, np.asarray(x).reshape(-1)) for name, x in side.items()), getattr(side, "meta", None))
        for side in (a, b)
    )
    return compare(ours, theirs, tolerance)


def _rule(dtype: str, variance: float) -> Tolerance:
    form = ROUNDINGS[dtype]
    relative = min(SAFETY * form.unit * math.sqrt(variance), LARGEST)
    return Tolerance(relative, f"{SAFETY} * {form.text} * sqrt({variance:.0f}): {dtype} rounding, forward and back")


def _length(module: str, config: Config, tokens: int) -> float:
    """How many products are summed for the gradient of one element of a tap."""
    hidden, inter, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    queries = tokens * heads // config.num_key_value_heads
    length = {
        "lm_head": config.vocab_size, "norm": config.vocab_size, "product": hidden,
        "post_attention_layernorm": 2 * inter, "attention_residual": hidden, "context": hidden,
        "probs": config.head_dim, "scores": tokens, "query": tokens, "key": queries, "value": queries,
        "input_layernorm": hidden + 2 * config.num_key_value_heads * config.head_dim, "embed_tokens": hidden,
    }  # fmt: skip
    return length.get(module, hidden if module.isdecimal() else 2)
