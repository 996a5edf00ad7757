"""A LoRA adapter of peft, merged into the weights that it was trained for.

    W' = W + scale * B @ A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

A (r, I) and B (O, r) come from `adapter_model.safetensors` or `.bin`, the numbers from `adapter_config.json`. The sum
is computed in float32 and rounded once to the weight's format. In 16-bit formats, peft also rounds the product.

Source: `LoraLayer.update_layer` and `Linear.get_delta_weight` in peft's src/peft/tuners/lora/layer.py; Hu 2021, "LoRA".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint.folder import map_tensors
from refimpl.checkpoint.weights import FLOATS, NormHead, Weight
from refimpl.errors import InputError, at_most
from refimpl.files import read_json

PREFIX = "base_model.model."
NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# Keys that are read here, and keys that do not change the merged numbers.
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform"}
NEUTRAL = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "auto_mapping",
    "peft_version", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Keys that would change the numbers: only these values are understood. Any other key may be null, false or empty.
ONLY: dict[str, tuple] = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal"), "layers_pattern": ("layers", ["layers"]),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MergedWeight:
    """A weight with an adapter added: W + scale * B @ A. `a` (r, I) and `b` (O, r) are float32."""

    array: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The merged values of these rows, added in float32 (float64 in `float64`) and rounded once to `dtype`."""
        wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        delta = (self.b[rows].astype(wide) * self.scale) @ self.a.astype(wide)
        with np.errstate(over="ignore"):
            merged = (self.array[rows].astype(wide) + delta).astype(dtype, copy=False)
        if not np.isfinite(merged).all():
            raise InputError(f"a merged weight is not finite in {dtype}; convert to float32 or bfloat16")
        return merged


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The two files of an adapter: its config and its weights. Raises InputError if they are not there."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with adapter_config.json")
    file = next((name for name in NAMES if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder} holds neither {NAMES[0]} nor {NAMES[1]}; expected the adapter's weights")
    return folder / "adapter_config.json", folder / file


def merge(folder: Path, weights: Mapping[str, Weight]) -> dict[str, MergedWeight]:
    """The weights that the adapter in `folder` changes, with the adapter merged.

    Raises InputError unless the adapter is plain LoRA on linears, its keys are understood, its tensors come in pairs
    that fit a weight, and the pairs are those of the linears that its config names.
    """
    config, file = adapter_files(folder)
    keys = read_json(config)
    scale, rank = _scale(config, keys)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in map_tensors(folder, file.name).items():
        target, dot, end = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or not dot or end not in ("A.weight", "B.weight"):
            raise InputError(f"{file} has {name}, expected lora_A.weight and lora_B.weight of linears")
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS:
            raise InputError(f"{file} has {name} in {getattr(array, 'dtype', 'a list')}, expected floating point")
        pairs.setdefault(f"{target}.weight", {})[end[0]] = array
    strange = [name for name in pairs if name not in weights or len(weights[name].shape) != 2]
    if strange or not pairs:
        raise InputError(f"{file} changes {at_most(strange, 3) or 'nothing'}, expected this model's linears")
    targets = {name for name, weight in weights.items() if len(weight.shape) == 2 and _targeted(config, keys, name)}
    if targets != set(pairs):
        differing = at_most(sorted(targets ^ set(pairs)), 3)
        raise InputError(f"{config} and {file.name} disagree on whether {differing} is changed; download both again")
    merged = {}
    for name, pair in pairs.items():
        (rows, columns), shapes = weights[name].shape, {part: pair[part].shape for part in sorted(pair)}
        if shapes != {"A": (rank, columns), "B": (rows, rank)}:
            raise InputError(f"the adapter of {name} has {shapes}, expected A {rank, columns} and B {rows, rank}")
        weight = weights[name]
        if isinstance(weight, NormHead):
            raise InputError("the adapter changes lm_head before NormHead; merge it first, then normalise the result")
        merged[name] = MergedWeight(weight.array, pair["A"].astype(np.float32), pair["B"].astype(np.float32), scale)
    return merged


def _scale(path: Path, keys: dict[str, Any]) -> tuple[float, int]:
    """What B @ A is multiplied with, and r."""
    if keys.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {keys.get('peft_type')!r:.40}, expected 'LORA'")
    for key, value in keys.items():
        if key in NEUTRAL | READ or value in (None, False, {}, []):
            continue
        if key not in ONLY:
            raise InputError(f"{path}: {key} is {value!r:.60}, which is not understood; it may change the numbers")
        if value not in ONLY[key]:
            raise InputError(f"{path}: {key} is {value!r:.60}, expected {ONLY[key][0]!r}; it may change the numbers")
    rank, alpha, rooted = keys.get("r"), keys.get("lora_alpha"), keys.get("use_rslora", False)
    match rank, alpha, rooted:
        case int(), int() | float(), bool() if type(alpha) is not bool and 0 < rank < 1 << 20 and abs(alpha) < 1e9:
            return alpha / (math.sqrt(rank) if rooted else rank), rank
    raise InputError(
        f"{path}: r is {rank!r:.40}, lora_alpha {alpha!r:.40}, use_rslora {rooted!r:.40}; expected 8, 16, false"
    )


def _targeted(path: Path, keys: dict[str, Any], name: str) -> bool:
    """Whether the config says that this weight is changed.

    Source: `check_target_module_exists` in peft's src/peft/tuners/tuners_utils.py, but for patterns.
    """
    modules, layers = keys.get("target_modules"), keys.get("layers_to_transform")
    if not isinstance(modules, list) or not modules or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{path}: target_modules is {modules!r:.60}, expected a list of names such as 'W_pack'")
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f"{path}: layers_to_transform is {layers!r:.60}, expected a list of layers' numbers")
    module = name.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    inside = not layers or (layer is not None and int(layer[1]) in layers)
    return inside and any(f".{module}".endswith(f".{target}") for target in modules)
