"""Better than rounding to nearest: for each block the scale whose codes stand for the weights best.

The scale that just reaches the largest weight of a block wastes codes on it. `best_scales` tries others,

    scale * f,  f in `search` even steps from 0.55 to 1.15,     then twice the least-squares scale of the best codes,
    and keeps for each block what has the least    Σ_j importance_j * (w_j - w'_j)²

so that no block gets worse than rounding to nearest. `importance` says how much an error of each input column costs:
the mean of x² over calibration activations, for then Σ_j importance_j * e_j² is the expected squared error
that the block alone adds to an output of the layer (columns taken as uncorrelated). It is the diagonal of the matrix
that GPTQ uses whole, the statistic of llama.cpp's imatrix, and what AWQ's column scaling looks for.

**Source**: the objective: Lin 2023, "AWQ", equation 4; llama.cpp's ggml-quants.c: make_qx_quants searches like this.

>>> importance_of(np.array([[1.0, 2.0], [1.0, -4.0]], np.float32))
array([ 1., 10.], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Parts = dict[str, np.ndarray]


def best_scales(
    x: np.ndarray,
    scales: np.ndarray,
    encode: Callable[[np.ndarray], Parts],
    decode: Callable[[Parts], np.ndarray],
    search: int,
    importance: np.ndarray | None,
) -> Parts:
    """The parts of blocks (n, b): `encode(scales)` where `search` is 0, else the best of the scales tried.

    `encode` takes scales (n, 1) as float32 and rounds them as the format stores them; `decode` is the format's own.
    """
    best = encode(scales)
    if not search:
        return best
    weights = np.ones_like(x) if importance is None else importance
    least = weighted_error(x, decode(best), weights)

    def consider(trial: np.ndarray) -> None:
        parts = encode(trial)
        error = weighted_error(x, decode(parts), weights)
        better = error < least
        least[better] = error[better]
        for name, values in parts.items():
            best[name][better[:, 0]] = values[better[:, 0]]

    for factor in np.linspace(0.55, 1.15, search):
        consider(scales * np.float32(factor))
    for _ in range(2):
        scale = best["scales"].astype(np.float32)
        unit = decode(best) / np.where(scale == 0, np.float32(1), scale)
        norm = (weights * unit * unit).sum(-1, keepdims=True)
        consider(np.where(norm > 0, (weights * x * unit).sum(-1, keepdims=True) / np.where(norm > 0, norm, 1), scale))
    return best


def weighted_error(x: np.ndarray, decoded: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ weights * (x - decoded)² of each block, (n, 1) in float64."""
    return (weights * np.square(x.astype(np.float64) - decoded)).sum(-1, keepdims=True)


def importance_of(activations: np.ndarray) -> np.ndarray:
    """What an error in each input column costs: the mean square of calibration activations (…, I) -> (I,) float32."""
    flat = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    return np.mean(flat * flat, axis=0).astype(np.float32)
