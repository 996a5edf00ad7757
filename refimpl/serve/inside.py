"""What a model does inside for one token: where each layer looks, and what it would say if it were the last.

The stream after each layer goes through the final norm and the head: the layer's own best guesses. Only the rows of the
last token are kept, so the memory does not grow with the depth of the model.

**Source** of the guesses: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.forward import Forward
from refimpl.serve.writing import likeliest, log_softmax

TOP = 5  # guesses of each layer


def inside(model: Forward, ids: Sequence[int], dtype: str, go_on: Callable[[], None]) -> dict[str, Any]:
    """What the page shows of the token behind `ids`: tokens, and for each layer its attention and its guesses.

    `attention`: (tokens) shares, the mean over heads. `heads`: (heads, tokens). `guesses`: token and probability.
    """
    kept: dict[str, np.ndarray] = {}
    layers = range(model.config.num_hidden_layers)
    wanted = {f"model.layers.{i}" for i in layers} | {f"model.layers.{i}.self_attn.probs" for i in layers}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        go_on()
        if name in wanted:
            kept[name] = np.array(x[0, ..., -1, :], np.float32)
        return x

    model.forward(np.asarray([ids]), dtype, None, None, tap, 1)
    spell = lambda id: model.tokenizer.token_bytes(id).decode(errors="replace")
    found = []
    for i in layers:
        heads = kept[f"model.layers.{i}.self_attn.probs"]
        logprobs = log_softmax(model.head(kept[f"model.layers.{i}"][None, None], dtype)[0, 0])
        found.append({
            "attention": heads.mean(0).round(4).tolist(),
            "heads": heads.round(4).tolist(),
            "guesses": [[spell(id), float(np.exp(p))] for id, p in likeliest(logprobs, TOP)],
        })  # fmt: skip
    return {"tokens": [spell(id) for id in ids], "layers": found}
