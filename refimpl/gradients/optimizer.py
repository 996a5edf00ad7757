"""AdamW: each parameter moves against the mean of its gradients, by about the same step whatever their size.

    clip    g     = g * min(1, max_norm / (|g| + 1e-6))               |g|: of all gradients as one vector
    decay   w     = w (1 - lr * weight_decay)                         matrices alone: no norms, no biases
    mean    m     = beta1 m + (1 - beta1) g
    square  v     = beta2 v + (1 - beta2) g²
    step    w     = w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Deviation: under the transformers of its day, the official script let RMSNorm's gains decay, too, since it knew only
LayerNorm by its class. Today's Trainer leaves them out, by their names, and so does this.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); torch.optim.AdamW; the arguments of
fine-tune.py in the README of baichuan-inc/Baichuan2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from refimpl.errors import InputError

CHUNK = 1 << 15  # numbers that are moved at a time: what is computed on the way stays in the processor's cache


@dataclass(frozen=True)
class AdamW:
    """The numbers of the official script. The learning rate is constant."""

    learning_rate: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = (0, 1) if field.name.startswith("beta") else (0, math.inf)
            if type(value) not in (int, float) or not low <= value < high:
                raise InputError(f"{field.name} is {value!r:.40}, expected a number from {low} to below {high}")

    @staticmethod
    def decays(name: str, parameter: np.ndarray) -> bool:
        """Whether weight decay applies to a parameter."""
        return parameter.ndim == 2

    def clip(self, gradients: Mapping[str, np.ndarray]) -> tuple[float, float]:
        """The factor that clips the gradients, and their common norm."""
        norm = global_norm(gradients)
        return min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0, norm

    def clipped(self, gradients: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        """The gradients, scaled down where their common norm is above `max_grad_norm` (0: never), and that norm."""
        scale, norm = self.clip(gradients)
        return {name: g if scale == 1.0 else g * np.asarray(scale, g.dtype) for name, g in gradients.items()}, norm

    def step(
        self,
        parameters: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        moments: Moments,
        scale: float = 1.0,
    ) -> None:
        """Moves the parameters, in place, by `scale` times the gradients: see `clip`."""
        moments.count += 1
        first, second = 1 - self.beta1**moments.count, 1 - self.beta2**moments.count
        for name, gradient in gradients.items():
            parameter = parameters[name]
            decay = self.learning_rate * self.weight_decay if self.decays(name, parameter) else 0.0
            mean = moments.mean.setdefault(name, np.zeros_like(parameter))
            square = moments.square.setdefault(name, np.zeros_like(parameter))
            parts = [x.reshape(-1) for x in (parameter, mean, square, gradient)]
            for start in range(0, parameter.size, CHUNK):
                w, m, v, g = (part[start : start + CHUNK] for part in parts)
                g = g if scale == 1.0 else g * np.asarray(scale, g.dtype)
                w *= 1 - decay
                m += (g - m) * (1 - self.beta1)
                v *= self.beta2
                v += (1 - self.beta2) * g * g
                w -= (self.learning_rate / first) * m / (np.sqrt(v) / math.sqrt(second) + self.epsilon)


class Moments:
    """AdamW's memory: how many steps it took, and for each parameter the `mean` and the `square`."""

    def __init__(self, count: int = 0, mean: dict | None = None, square: dict | None = None):
        self.count = count
        self.mean: dict[str, np.ndarray] = mean or {}
        self.square: dict[str, np.ndarray] = square or {}


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    """The length of all gradients as one vector; squares are summed in float64."""
    flat = (g.reshape(-1) for g in gradients.values())
    parts = (g[i : i + CHUNK].astype(np.float64) for g in flat for i in range(0, g.size, CHUNK))
    return math.sqrt(math.fsum(float(np.einsum("i,i->", x, x)) for x in parts))  # fsum gives the same in any order
