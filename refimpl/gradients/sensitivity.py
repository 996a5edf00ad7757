"""What an error of a matrix costs, by the gradients of a text: for the search of scales, and for choosing formats.

If a matrix is off by E, its output at token t is off by E x_t, and the loss of that text by g_t · E x_t to first order,
where g_t is the gradient by the output. If labels are drawn from the model's own predictions, the mean of the
squares is twice the KL divergence that the error adds (that mean of g gᵀ is Fisher's information, the second
derivative of the KL). Tokens are taken as independent.

    a column's importance      mean over t of |g_t|² x_tj²         activations alone: mean over t of x_tj²
    a matrix's cost            mean over t of (g_t · E x_t)² / 2   in nats of KL a token

**Source**: the diagonal is that of Kim 2023, "SqueezeLLM"; LeCun 1989, "Optimal Brain Damage".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.blocks.importance import Importance
from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.gradients.backward import backward
from refimpl.gradients.objective import NextToken, softmax
from refimpl.names import input_of
from refimpl.sweep import Pool, Result, sweep
from refimpl.windows import WINDOW, cut


def matrices_of(weights: Mapping[str, Any]) -> list[str]:
    """The modules whose matrices are quantized: all linears."""
    return [n.removesuffix(".weight") for n, w in weights.items() if len(w.shape) == 2 and "embed_tokens" not in n]


def observe_sensitivity(
    model: Forward, ids, window: int = WINDOW, seed: int = 0, executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Importance:  # fmt: skip
    """The importance of every linear's input columns over a text or its ids, by squared gradients.

    It is used like that of `refimpl.blocks.importance.observe_importance`. Labels are drawn with `seed`. Raises
    InputError for ids outside the vocabulary, and for a loss that is NaN or infinite.
    """
    ids = model.token_ids(ids)[0]
    pieces = [(model, row, seed + n) for n, row in enumerate(cut(model, ids, window)) if len(row) > 1]
    squares: dict[str, np.ndarray] = {}
    for found in sweep(weighted_squares, pieces, "collecting gradients", executor, resume):
        squares = {name: squares.get(name, 0.0) + x for name, x in found.items()}
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    meta = {
        "family": model.config.family,
        "tokens": len(ids),
        "ids_sha256": digest,
        "window": window,
        "by": "gradients",
    }
    return Importance({name: (x / len(ids)).astype(np.float32) for name, x in squares.items()}, meta)


def weighted_squares(model: Forward, ids: np.ndarray, seed: int) -> Result:
    """The squares of each linear's input, weighted by the squared gradient of its output: module -> (I,) float64."""
    found = {}
    for name, (x, g) in signals(model, ids, seed).items():
        found[name] = np.square(g).sum(-1) @ np.square(x)
    return found


def signals(model: Forward, ids: np.ndarray, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Linear -> its input x (T, I), and the gradient g (T, O) of the sum of the tokens' losses by its output: float64.

    The label of each token is drawn from the model's own prediction.
    """
    ids = np.atleast_2d(ids)
    names = matrices_of(model.weights)
    inputs: dict[str, np.ndarray] = {}

    def tap(name, x):
        inputs[name] = x
        return x

    logits = model.forward(ids, "float32", None, None, tap)
    p = softmax(logits[0].astype(np.float64))
    drawn = (p.cumsum(-1) > np.random.default_rng(seed).random((len(p), 1))).argmax(-1)
    labels = np.concatenate([[0], drawn[:-1]])[None]
    objective = NextToken(labels, counts=(1, 1))
    wanted = set(names)
    _, gradients = backward(model, ids, objective, wanted.__contains__, recompute=True)
    return {
        name: (inputs[input_of(name)][0].astype(np.float64), gradients[name][0].astype(np.float64)) for name in names
    }


def costs(model: Forward, candidates: Mapping[str, Any], ids, window: int = WINDOW, seed: int = 0) -> dict[str, dict]:
    """What each candidate costs in each matrix: module -> name of the candidate -> (KL by gradients, squared error).

    `candidates`: name -> weights of the whole model in that format. The KL is in nats a token; the squared error is
    that of the output, over the output's own square: what activations alone say.
    """
    ids = model.token_ids(ids)[0]
    total: dict[str, dict[str, np.ndarray]] = {}
    count = 0
    for n, row in enumerate(cut(model, ids, window)):
        if len(row) < 2:
            continue
        count += len(row)
        for name, (x, g) in signals(model, row, seed + n).items():
            weight = model.weights[f"{name}.weight"].read(np.dtype(np.float32)).astype(np.float64)
            y = np.square(x @ weight.T).sum()
            for candidate, weights in candidates.items():
                error = weights[f"{name}.weight"].read(np.dtype(np.float32)).astype(np.float64) - weight
                e = x @ error.T
                found = np.array([np.square((g * e).sum(-1)).sum() / 2, np.square(e).sum(), y])
                at = total.setdefault(name, {})
                at[candidate] = at.get(candidate, 0.0) + found
    return {name: {candidate: (x[0] / count, x[1] / x[2]) for candidate, x in of.items()} for name, of in total.items()}


def allocate(
    costs: Mapping[str, Mapping[str, float]], bits: Mapping[str, Mapping[str, float]], budget: float
) -> dict[str, str]:
    """A recipe, module -> candidate, of the least cost that a greedy choice finds within `budget` bits.

    It begins with the smallest candidate of each module, and repeatedly takes the change that saves the most cost per
    bit. `bits`: module -> candidate -> bits of the whole matrix. Raises InputError if the budget is too small.

    >>> bits = dict.fromkeys("ab", {"q4": 4, "q8": 8})
    >>> allocate({"a": {"q4": 9.0, "q8": 1.0}, "b": {"q4": 3.0, "q8": 0.5}}, bits, 12)
    {'a': 'q8', 'b': 'q4'}
    """
    chosen = {module: min(of, key=lambda c: (of[c], costs[module][c])) for module, of in bits.items()}
    left = budget - sum(bits[module][c] for module, c in chosen.items())
    if left < 0:
        raise InputError(f"the smallest formats need {budget - left:.0f} bits, more than {budget:.0f}")
    while True:
        steps = [
            ((costs[module][now] - costs[module][c]) / max(bits[module][c] - bits[module][now], 1e-9), module, c)
            for module, now in chosen.items()
            for c in bits[module]
            if costs[module][c] < costs[module][now] and bits[module][c] - bits[module][now] <= left
        ]
        if not steps:
            return chosen
        _, module, best = max(steps)
        left -= bits[module][best] - bits[module][chosen[module]]
        chosen[module] = best
