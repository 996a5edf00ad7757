"""A quantized model taught by the float model that it was made of: how much of the loss comes back.

The loss is the mean KL divergence of next-token distributions from the teacher's, on any text: no labels are needed.
One of two things learns:

- the scales: every block's scale gets a factor, which begins at 1. The result is the same number format with other
  scales, so it is saved, exported and encoded for a phone as before, and costs nothing there;
- corrections of low rank (LoRA) over the blocks. They are kept beside them, or merged into the float weights.

**Source**: Hinton 2015, "Distilling the Knowledge in a Neural Network"; for scales, Esser 2020, "Learned Step Size".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from refimpl.checkpoint.weights import QuantizedWeight, Weights, quantized_weight
from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.gradients.adapters import Lora
from refimpl.gradients.backward import backward
from refimpl.gradients.objective import Teacher
from refimpl.gradients.optimizer import AdamW, Moments
from refimpl.gradients.products import keep_freed_memory
from refimpl_kernels import formats

SCALED = ("int4", "q4_0", "nf4", "matmulnbits", "q8_0")  # formats whose numbers are a level times a scale


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix in blocks along its rows whose scales have `factors` (O, blocks a row), which learn."""

    weight: QuantizedWeight
    factors: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The values of these rows with the present scales."""
        values = self.weight.read(dtype, rows)
        return (self._blocks(values) * self.factors[rows].astype(dtype)[..., None]).reshape(values.shape)

    def adjoint(self, g: np.ndarray) -> np.ndarray:
        """The gradient by the factors from that by the values: (O, I) -> (O, blocks a row)."""
        return (self._blocks(g) * self._blocks(self.weight.read(g.dtype))).sum(-1)

    def finished(self) -> QuantizedWeight:
        """The same codes with the new scales, rounded as the format stores them."""
        blocks = self.weight.blocks
        scales = blocks.scales.reshape(self.factors.shape).astype(np.float32) * self.factors
        rounded = scales.astype(blocks.scales.dtype).reshape(blocks.scales.shape)
        return quantized_weight(replace(blocks, scales=rounded), self.weight.rounded)

    def _blocks(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(len(values), self.factors.shape[1], -1)


def repair(
    model: Forward, teacher: Forward, rows: Sequence[np.ndarray], lora: Lora | None = None,
    optimizer: AdamW | None = None, steps: int = 200, batch: int = 8, seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Weights, list[float]]:  # fmt: skip
    """The weights of a quantized model after some steps towards its teacher, and the KL of each step.

    `rows`: windows of token ids of one length. `lora`: None trains the scales. `optimizer`: by default, the official
    one with a learning rate of 1e-3. Raises InputError if no matrix has scales that can learn.
    """
    optimizer = optimizer or AdamW(learning_rate=1e-3, weight_decay=0.0)
    if len({len(row) for row in rows}) != 1:
        raise InputError(f"the windows have {len({len(row) for row in rows})} lengths, expected some of one length")
    keep_freed_memory()
    parameters = lora.begin(model.weights, seed) if lora else _factors(model)
    moments, rng, losses = Moments(), np.random.default_rng(seed), []
    for step in tqdm(range(steps), desc="repairing", unit="step", disable=None, leave=False):
        ids = np.stack([rows[i] for i in rng.choice(len(rows), min(batch, len(rows)), replace=False)])
        weights = _weights(model, parameters, lora)
        loss, found = backward(
            model, ids, Teacher(teacher(ids)), parameters.keys().__contains__, recompute=True, weights=weights
        )
        gradients, _ = optimizer.clipped({name: found[name] for name in parameters})
        optimizer.step(parameters, gradients, moments)
        losses.append(loss)
        on_step(step, loss)
    weights = _weights(model, parameters, lora)
    done = {name: weight.finished() for name, weight in weights.items() if isinstance(weight, Scaled)}
    return weights.replace(done), losses


def _weights(model: Forward, parameters: Mapping[str, np.ndarray], lora: Lora | None) -> Weights:
    if lora:
        return model.weights.replace(lora.over(model.weights, parameters))
    entries: dict[str, Any] = {}
    for name, factors in parameters.items():
        matrix = name.removesuffix(".scales") + ".weight"
        entries[matrix] = Scaled(model.weights[matrix], factors)
    return model.weights.replace(entries)


def _factors(model: Forward) -> dict[str, np.ndarray]:
    found = {}
    for name, weight in model.weights.items():
        blocks: formats.Blocks | None = getattr(weight, "blocks", None)
        if blocks is None or blocks.format not in SCALED or weight.shape[1] % blocks.block_size:
            continue
        if blocks.scales.dtype.kind == "f" and blocks.axis in (1, None):
            shape = weight.shape[0], weight.shape[1] // blocks.block_size
            found[f"{name.removesuffix('.weight')}.scales"] = np.ones(shape, np.float32)
    if not found:
        raise InputError(
            f"no matrix is in blocks whose scales can learn; formats that have them are {', '.join(SCALED)}"
        )
    return found
