"""What a checkpoint is, in a few lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from refimpl.errors import InputError
from refimpl.weights import expected_shapes

if TYPE_CHECKING:
    from refimpl.model import Model


def describe(model: Model) -> dict[str, Any]:
    """The facts of a model in reading order: family, sizes, how it tells positions, parameters, memory, tokenizer."""
    c = model.config
    parameters = sum(math.prod(shape) for shape in expected_shapes(c).values())
    try:
        tokenizer = f"{type(model.tokenizer).__name__}, {model.tokenizer.vocab_size} tokens"
    except InputError:
        tokenizer = "none"
    return {
        "family": c.family,
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "intermediate": c.intermediate_size,
        "heads": f"{c.num_attention_heads} of {c.head_dim}, {c.num_key_value_heads} for keys and values",
        "vocabulary": c.vocab_size,
        "context": c.max_position_embeddings,
        "positions": "ALiBi" if c.rope_theta is None else f"RoPE, theta {c.rope_theta:g}",
        "head": "tied to the embedding" if c.tie_word_embeddings else "NormHead" if c.norm_head else "plain",
        "parameters": parameters,
        "stored as": ", ".join(sorted({str(w.dtype) for w in model.weights.values()})),
        "bytes": sum(w.array.nbytes for name, w in model.weights.items() if name in expected_shapes(c)),
        "tokenizer": tokenizer,
    }
