"""A LoRA adapter of peft, merged into the weights that it was trained for.

    W' = W + scale * B @ A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

A (r, I) and B (O, r) come from `adapter_model.safetensors` or `.bin`, the numbers from `adapter_config.json`. The sum
is made in float32 and rounded once to the weight's format; peft rounds the product first, in 16-bit formats.

Source: `LoraLayer.update_layer` and `Linear.get_delta_weight` in peft's src/peft/tuners/lora/layer.py; Hu 2021, "LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.config import read_json
from refimpl.errors import InputError, at_most
from refimpl.weights import NormHead, Weight, map_tensors

PREFIX = "base_model.model."
# Keys that do not change the merged numbers, or whose effect is seen in the adapter's tensors.
NEUTRAL = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "lora_dropout", "auto_mapping", "peft_version", "megatron_core", "layers_to_transform",
    "layers_pattern", "exclude_modules", "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip
# Keys that would change them: understood only with these values. Others that are off (null, false, empty) pass.
ONLY: dict[str, tuple] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", None)}


@dataclass(frozen=True, eq=False)
class MergedWeight(Weight):
    """A weight with an adapter added: W + scale * B @ A. `a` (r, I) and `b` (O, r) are float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The merged values of these rows, added in float32 (float64 in `float64`) and rounded once to `dtype`."""
        wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        delta = (self.b[rows].astype(wide) * self.scale) @ self.a.astype(wide)
        with np.errstate(over="ignore"):
            merged = (self.array[rows].astype(wide) + delta).astype(dtype, copy=False)
        if not np.isfinite(merged).all():
            raise InputError(f"a merged weight is not finite in {dtype}; convert to float32 or bfloat16")
        return merged


def merge(folder: Path, weights: Mapping[str, Weight]) -> dict[str, MergedWeight]:
    """The weights that the adapter in `folder` changes, changed.

    Raises InputError for an adapter of another kind than plain LoRA on linears, for keys that are not understood, and
    for tensors without a partner, without a weight, or of another shape.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with adapter_config.json")
    scale, rank = _scale(folder / "adapter_config.json")
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((name for name in names if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder} holds neither {names[0]} nor {names[1]}; expected the adapter's weights")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in map_tensors(folder, file).items():
        target, dot, end = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or not dot or end not in ("A.weight", "B.weight"):
            raise InputError(f"{folder / file} has {name}, expected lora_A.weight and lora_B.weight of linears")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fV":  # V: bfloat16
            raise InputError(f"{folder / file} has {name} in another format than floating point")
        pairs.setdefault(f"{target}.weight", {})[end[0]] = array.astype(np.float32)
    strange = [name for name in pairs if name not in weights or len(weights[name].shape) != 2]
    if strange or not pairs:
        raise InputError(f"{folder / file} changes {at_most(strange, 3) or 'nothing'}, expected this model's linears")
    merged = {}
    for name, pair in pairs.items():
        (rows, columns), shapes = weights[name].shape, {part: pair[part].shape for part in sorted(pair)}
        if shapes != {"A": (rank, columns), "B": (rows, rank)}:
            raise InputError(f"the adapter of {name} has {shapes}, expected A {rank, columns} and B {rows, rank}")
        weight = weights[name]
        if isinstance(weight, NormHead):
            raise InputError("the adapter changes lm_head before NormHead; merge it first, then normalise the result")
        merged[name] = MergedWeight(weight.array, pair["A"], pair["B"], scale)
    return merged


def _scale(path: Path) -> tuple[float, int]:
    """What B @ A is multiplied with, and r."""
    keys: dict[str, Any] = read_json(path)
    if keys.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {keys.get('peft_type')!r}, expected 'LORA'")
    for key, value in keys.items():
        if key in ONLY and value not in ONLY[key]:
            raise InputError(f"{path}: {key} is {value!r}, expected {ONLY[key][0]!r}; this would change the numbers")
        if key not in NEUTRAL and key not in ONLY and value not in (None, False, {}, []):
            raise InputError(f"{path}: {key} is {value!r:.60}, which is not understood; it may change the numbers")
    rank, alpha, rooted = keys.get("r"), keys.get("lora_alpha"), keys.get("use_rslora", False)
    match rank, alpha, rooted:
        case int(), int() | float(), bool() if 0 < rank < 1 << 20 and abs(alpha) < 1e9:
            return alpha / (math.sqrt(rank) if rooted else rank), rank
    raise InputError(
        f"{path}: r is {rank!r:.40}, lora_alpha {alpha!r:.40}, use_rslora {rooted!r:.40}; expected 8, 16, false"
    )
