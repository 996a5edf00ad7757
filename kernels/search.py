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
    """The parts of blocks (n, b): `encode(scales)` where `search` is 0, else those of the best scales tried.

    `encode` takes scales (n, 1) as float32 and rounds them as the format stores them; `decode` is the format's own.
    """
    best = encode(scales)
    if not search:
        return best
    least = weighted_error(x, decode(best), importance)

    def consider(trial: np.ndarray) -> None:
        parts = encode(trial)
        error = weighted_error(x, decode(parts), importance)
        better = error < least
        least[better] = error[better]
        for name, values in parts.items():
            np.copyto(best[name], values, where=better)

    for factor in np.linspace(0.55, 1.15, search):
        consider(scales * np.float32(factor))
    for _ in range(2):
        scale = best["scales"].astype(np.float32)
        unit = decode(best) / np.where(scale == 0, np.float32(1), scale)  # what the codes stand for at a scale of 1
        norm = _sum(unit, unit, importance)
        fitted = _sum(x, unit, importance) / np.where(norm > 0, norm, 1)
        consider(np.where(norm > 0, fitted, scale).astype(np.float32))
    return best


def best_lines(
    x: np.ndarray,
    scales: np.ndarray,
    mins: np.ndarray,
    search: int,
    importance: np.ndarray | None,
    highest: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """For blocks (n, b) the scales and minima of the best lines w ≈ scale * code + min, codes 0 … 15: (n, 1) each.

    Starts from those given, tries `search` scales from 0.7 to 1.1 of the first and for each the least-squares line of
    its codes, with a minimum that is not above `highest`; at last fits a line to the best codes so far, twice.
    """
    best, lows = scales, mins
    least = weighted_error(x, _on_line(x, scales, mins) * scales + mins, importance)
    fitted = _line_fit(x, importance, highest)
    for factor in [*np.linspace(0.7, 1.1, search), None, None]:
        scale, low = (best, lows) if factor is None else (scales * np.float32(factor), mins)
        scale, low = fitted(_on_line(x, scale, low), scale, low)
        error = weighted_error(x, _on_line(x, scale, low) * scale + low, importance)
        better = error < least
        least, best, lows = (np.where(better, a, b) for a, b in ((error, least), (scale, best), (low, lows)))
    return best, lows


def _on_line(x: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    codes = x - mins
    codes *= reciprocal(scales)
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 15, out=codes)


def _line_fit(
    x: np.ndarray, importance: np.ndarray | None, highest: float
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The least-squares line through (code, weight) of each block, from codes and the line to keep if there is none."""
    wide = x.astype(np.float64)
    costs = np.ones_like(wide) if importance is None else importance.astype(np.float64)
    total, sum_x = np.einsum("nb->n", costs)[:, None], np.einsum("nb,nb->n", costs, wide)[:, None]

    def fitted(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q = codes.astype(np.float64)
        weighed = q if importance is None else q * costs
        sum_q = np.einsum("nb->n", weighed)[:, None]
        sum_qq, sum_qx = (np.einsum("nb,nb->n", weighed, other)[:, None] for other in (q, wide))
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = (total * sum_qx - sum_q * sum_x) / (total * sum_qq - sum_q**2)
            low = (sum_x - scale * sum_q) / total
            if np.isfinite(highest):
                held = low > highest
                scale = np.where(held, (sum_qx - highest * sum_q) / sum_qq, scale)
                low = np.where(held, highest, low)
        usable = np.isfinite(scale) & np.isfinite(low) & (scale > 0)
        return np.where(usable, scale, scales).astype(np.float32), np.where(usable, low, mins).astype(np.float32)

    return fitted


def weighted_error(x: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Σ importance * (x - decoded)² of each block: (n, 1) in float64."""
    error = x - decoded
    return _sum(error, error, importance)


def _sum(a: np.ndarray, b: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Σ importance * a * b of each block: (n, 1) in float64, the same at any number of threads."""
    left = a.astype(np.float64)
    right = left if b is a else b.astype(np.float64)
    return np.einsum("nb,nb->n", left if importance is None else left * importance, right)[:, None]


def importance_of(activations: np.ndarray) -> np.ndarray:
    """What an error in each input column costs: the mean square of calibration activations (…, I) -> (I,) float32."""
    flat = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    return np.mean(flat * flat, axis=0).astype(np.float32)


def reciprocal(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for a scale of 0 or one so small that its reciprocal is infinite: such a block is all zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
