"""LoRA: a matrix does not change, 4-bit blocks included, but gets a correction of low rank that learns.

    y = x Wᵀ + scale * (x Aᵀ) Bᵀ          A (r, I), B (O, r), scale = alpha / r

A begins at random and B at zero, so training begins with the unchanged model. Only A and B learn: r numbers for each
row and for each column. An adapter is saved in peft's format; peft loads it, and `refimpl convert --lora` merges it.

Source: Hu 2021, "LoRA"; `LoraLayer` and `Linear.forward` in peft's src/peft/tuners/lora/layer.py. Rank 1, alpha 32 and
W_pack are those of the official fine-tune.py, whose dropout of 0.1 is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refimpl.checkpoint.lora import PREFIX
from refimpl.checkpoint.weights import NormHead, Weight
from refimpl.errors import InputError, at_most
from refimpl_kernels.ops import NumPyOps


@dataclass(frozen=True)
class Lora:
    """Which matrices get a correction of which rank: `targets` are the last parts of modules' names."""

    rank: int = 1
    alpha: float = 32
    targets: tuple[str, ...] = ("W_pack",)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 0 < self.rank <= 1024:
            raise InputError(f"the rank is {self.rank!r:.40}, expected a whole number from 1 to 1024")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < 1e6:
            raise InputError(f"alpha is {self.alpha!r:.40}, expected a positive number")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modules(self, weights: Mapping[str, Any]) -> list[str]:
        """The modules that are targeted. Raises InputError for a target that is not a linear here."""
        linears = [n.removesuffix(".weight") for n, w in weights.items() if len(w.shape) == 2 and "embed" not in n]
        for target in self.targets:
            if not any(f".{module}".endswith(f".{target}") for module in linears):
                known = at_most(sorted({module.rpartition(".")[2] for module in linears}), 9)
                raise InputError(f"no linear is called {target!r:.40}; expected some of {known}")
        found = [m for m in linears if any(f".{m}".endswith(f".{target}") for target in self.targets)]
        if any(isinstance(weights[f"{module}.weight"], NormHead) for module in found):
            raise InputError("lm_head is a NormHead, which has no correction of low rank; choose other targets")
        return found

    def begin(self, weights: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
        """A and B of each module, float32: A uniform within 1 / sqrt(I), as peft has it, and B zero."""
        rng, made = np.random.default_rng(seed), {}
        for module in self.modules(weights):
            outs, ins = weights[f"{module}.weight"].shape
            bound = 1 / math.sqrt(ins)
            made[f"{module}.lora_A.weight"] = rng.uniform(-bound, bound, (self.rank, ins)).astype(np.float32)
            made[f"{module}.lora_B.weight"] = np.zeros((outs, self.rank), np.float32)
        return made

    def over(self, weights: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> dict[str, Adapted]:
        """The weights that have a correction, by their names."""
        modules = [name.removesuffix(".lora_A.weight") for name in parameters if name.endswith(".lora_A.weight")]
        return {
            f"{m}.weight": Adapted(weights[f"{m}.weight"], Weight(parameters[f"{m}.lora_A.weight"]),
                                   Weight(parameters[f"{m}.lora_B.weight"]), self.scale)
            for m in modules
        }  # fmt: skip

    def save(self, folder: Path, parameters: Mapping[str, np.ndarray], base: str) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, as peft does."""
        keys = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": list(self.targets),
        }  # fmt: skip
        save_file({PREFIX + name: x for name, x in parameters.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight and its correction. Whoever multiplies with it, multiplies with both."""

    base: Any
    a: Weight
    b: Weight
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return getattr(self.base, "dtype", np.dtype(np.float32))

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The values of these rows, as merged weights have them."""
        delta = self.b.read(dtype, rows) @ self.a.read(dtype)
        return self.base.read(dtype, rows) + delta * np.asarray(self.scale, dtype)

    def linear(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """x (..., I) by both: (..., O)."""
        ops = NumPyOps(x.dtype)
        y = ops.linear(x, self.base) + ops.linear(ops.linear(x, self.a), self.b) * np.asarray(self.scale, x.dtype)
        return y if bias is None else y + bias
