"""A LoRA adapter of peft, merged into the weights that it was trained for.

    W' = W + scale * B @ A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

DoRA (`use_dora`) gives each row of that sum the length that it has learned, m (O,):

    W' = m * (W + scale * B @ A) / |W + scale * B @ A|      row by row

PiSSA (`init_lora_weights: pissa`) began with the r largest singular directions of W as A and B, and trained them apart
from the rest. So they leave W before the trained ones are added:

    W' = W - U_r @ S_r @ V_r + scale * B @ A

Biases that were trained with the linears (`bias`, `lora_bias`) replace those of the model, or are added to them.

A (r, I) and B (O, r) come from `adapter_model.safetensors` or `.bin`, the numbers from `adapter_config.json`, where
`rank_pattern` and `alpha_pattern` may give a module its own. Modules in `modules_to_save` are stored whole. The sum is
computed in float32 and rounded once to the weight's format. In 16-bit formats, peft also rounds the product.

Source: `LoraLayer.update_layer`, `LoraLayer.pissa_init` and `Linear.get_delta_weight` in peft's
src/peft/tuners/lora/layer.py, `DoraLinearLayer` in dora.py there; Hu 2021, "LoRA"; Liu 2024, "DoRA"; Meng 2024,
"PiSSA".
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
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform", "rank_pattern",
    "alpha_pattern", "modules_to_save",
}  # fmt: skip
NEUTRAL = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "auto_mapping",
    "peft_version", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Endings of an adapter's tensors, after ".lora_".
PARTS = {
    "A.weight": "A", "B.weight": "B", "B.bias": "bias", "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}  # fmt: skip
# Keys that would change the numbers: only these values are understood. Any other key may be null, false or empty.
ONLY: dict[str, tuple] = {
    "bias": ("none", "all", "lora_only"), "use_dora": (True,), "lora_bias": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "pissa"), "layers_pattern": ("layers", ["layers"]),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MergedWeight:
    """A weight with an adapter added: W + scale * B @ A. `a` (r, I) and `b` (O, r) are float32.

    `magnitude` (O,): the length of each row of the sum, if the adapter says it (DoRA).
    """

    weight: Any
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The merged values of these rows, added in float32 (float64 in `float64`) and rounded once to `dtype`."""
        wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        delta = (self.b[rows].astype(wide) * self.scale) @ self.a.astype(wide)
        with np.errstate(over="ignore"):
            merged = self.weight.read(wide, rows) + delta
            if self.magnitude is not None:
                merged *= (self.magnitude[rows].astype(wide) / np.linalg.norm(merged, axis=1))[:, None]
            merged = merged.astype(dtype, copy=False)
        if not np.isfinite(merged).all():
            raise InputError(f"a merged weight is not finite in {dtype}; convert to float32 or bfloat16")
        return merged


def made_for(folder: Path) -> set[str]:
    """The modules whose matrices an adapter holds, such as W_pack. Raises InputError if there is no adapter."""
    names = map_tensors(folder, adapter_files(folder)[1].name)
    return {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names}


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The two files of an adapter: its config and its weights. Raises InputError if they are not there."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with adapter_config.json")
    file = next((name for name in NAMES if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder} holds neither {NAMES[0]} nor {NAMES[1]}; expected the adapter's weights")
    return folder / "adapter_config.json", folder / file


def merge(folder: Path, weights: Mapping[str, Weight]) -> dict[str, MergedWeight | Weight]:
    """The weights that the adapter in `folder` changes: with the adapter merged in, or as the adapter holds them whole.

    Raises InputError unless the adapter is plain LoRA on linears, its keys are understood, its tensors come in pairs
    that fit a weight, and the pairs are those of the linears that its config names.
    """
    config, file = adapter_files(folder)
    keys = read_json(config)
    _expect_understood(config, keys)
    whole = _saved_whole(config, keys)
    replaced: dict[str, MergedWeight | Weight] = {}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in map_tensors(folder, file.name).items():
        saved = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        if saved in weights and saved.split(".")[-2] in whole:
            replaced[saved] = _replacement(f"{file}: {name}", array, weights[saved])
            continue
        if saved in weights and saved.endswith(".bias") and keys.get("bias") in ("all", "lora_only"):
            replaced[saved] = _replacement(f"{file}: {name}", array, weights[saved])
            continue
        target, dot, end = name.removeprefix(PREFIX).rpartition(".lora_")
        part = PARTS.get(end.replace(".default", ""))  # a trainer's own torch.save leaves that word in it
        if not name.startswith(PREFIX) or not dot or part is None:
            raise InputError(f"{file} has {name}, expected lora_A.weight and lora_B.weight of linears")
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS:
            raise InputError(f"{file} has {name} in {getattr(array, 'dtype', 'a list')}, expected floating point")
        pairs.setdefault(f"{target}.weight", {})[part] = array
    strange = [name for name in pairs if name not in weights or len(weights[name].shape) != 2]
    if strange or not pairs:
        raise InputError(f"{file} changes {at_most(strange, 3) or 'nothing'}, expected this model's linears")
    linears = [name for name, weight in weights.items() if len(weight.shape) == 2]
    targets = {name for name in linears if _targeted(config, keys, name)}
    if targets != set(pairs) and not _is_pattern(keys.get("target_modules")):
        differing = at_most(sorted(targets ^ set(pairs)), 3)
        raise InputError(f"{config} and {file.name} disagree on whether {differing} is changed; download both again")
    if absent := sorted(whole - {name.split(".")[-2] for name in replaced}):
        raise InputError(f"{config} names {at_most(absent)} as saved whole, but {file.name} has no such tensor")
    merged = replaced
    for name, pair in pairs.items():
        scale, rank = _scale(config, keys, name.removesuffix(".weight"))
        (rows, columns), shapes = weights[name].shape, {part: pair[part].shape for part in sorted(pair)}
        wanted: dict[str, tuple[int, ...]] = {"A": (rank, columns), "B": (rows, rank)}
        wanted |= {"bias": (rows,)} if keys.get("lora_bias") else {}
        wanted |= {"magnitude": (rows,)} if keys.get("use_dora") else {}
        if shapes != wanted:
            said = " and ".join(f"{part} {shape}" for part, shape in wanted.items())
            raise InputError(f"the adapter of {name} has {shapes}, expected {said}")
        weight = weights[name]
        if isinstance(weight, NormHead):
            raise InputError("the adapter changes lm_head before NormHead; merge it first, then normalise the result")
        parts = {part: array.astype(np.float32) for part, array in pair.items()}
        a, b = parts["A"], parts["B"]
        if keys.get("init_lora_weights") == "pissa":
            first_a, first_b = _largest_directions(weight.read(np.dtype(np.float64)), rank)
            a, b = np.concatenate((a, first_a)), np.concatenate((b, -first_b / scale), axis=1)
        merged[name] = MergedWeight(weight, a, b, scale, parts.get("magnitude"))
        if "bias" in parts:
            bias = f"{name.removesuffix('weight')}bias"
            if bias not in weights:
                raise InputError(f"the adapter adds to {bias}, which this model lacks; is it another model's?")
            merged[bias] = Weight(weights[bias].read(np.dtype(np.float32)) + scale * parts["bias"])
    return merged


def _largest_directions(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, I) and B (O, rank) whose product is the `rank` largest singular directions of a matrix (O, I)."""
    left, sizes, right = np.linalg.svd(weight, full_matrices=False)
    return (sizes[:rank, None] * right[:rank]).astype(np.float32), left[:, :rank].astype(np.float32)


def _saved_whole(path: Path, keys: dict[str, Any]) -> set[str]:
    """The modules that the adapter holds whole."""
    modules = keys.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{path}: modules_to_save is {modules!r:.60}, expected a list of names such as 'lm_head'")
    return set(modules)


def _replacement(what: str, array: Any, weight: Weight) -> Weight:
    """A weight that an adapter holds whole."""
    if not isinstance(array, np.ndarray) or array.dtype not in FLOATS or array.shape != weight.shape:
        raise InputError(f"{what} is {getattr(array, 'shape', 'a list')}, expected floats of shape {weight.shape}")
    if isinstance(weight, NormHead):
        raise InputError("the adapter changes lm_head before NormHead; merge it first, then normalise the result")
    return Weight(array)


def _expect_understood(path: Path, keys: dict[str, Any]) -> None:
    """Raises InputError for keys that would change the numbers in a way that is not known here."""
    if keys.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {keys.get('peft_type')!r:.40}, expected 'LORA'")
    for key, value in keys.items():
        if key in NEUTRAL | READ or value in (None, False, {}, []):
            continue
        if key not in ONLY:
            raise InputError(f"{path}: {key} is {value!r:.60}, which is not understood; it may change the numbers")
        if value not in ONLY[key]:
            raise InputError(f"{path}: {key} is {value!r:.60}, expected {ONLY[key][0]!r}; it may change the numbers")


def _scale(path: Path, keys: dict[str, Any], module: str) -> tuple[float, int]:
    """The factor of a module's B @ A, and r."""
    rank, alpha = (_of_module(path, keys, pattern, module, key) for pattern, key in PATTERNS)
    rooted = keys.get("use_rslora", False)
    match rank, alpha, rooted:
        case int(), int() | float(), bool() if type(alpha) is not bool and 0 < rank < 1 << 20 and abs(alpha) < 1e9:
            return alpha / (math.sqrt(rank) if rooted else rank), rank
    raise InputError(
        f"{path}: r is {rank!r:.40}, lora_alpha {alpha!r:.40}, use_rslora {rooted!r:.40}; expected 8, 16, false"
    )


PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))


def _of_module(path: Path, keys: dict[str, Any], pattern: str, module: str, key: str) -> Any:
    """The value of a key for one module, which `rank_pattern` or `alpha_pattern` may change.

    The first name with which the module's name ends counts. In peft, these names are regular expressions. An untrusted
    one might run for ever, so only plain names are accepted.

    Source: `get_pattern_key` in peft's src/peft/utils/other.py.
    """
    found = keys.get(pattern) or {}
    if not isinstance(found, dict) or not all(re.fullmatch(r"\^?[\w.]{1,200}", name) for name in found):
        raise InputError(f"{path}: {pattern} is {found!r:.60}, expected names of modules such as up_proj")
    for name, value in found.items():
        if module == name.removeprefix("^") or (name[0] != "^" and module.endswith(f".{name}")):
            return value
    return keys.get(key)


def _is_pattern(modules: Any) -> bool:
    """Whether target_modules is a regular expression. It is not run: the adapter's tensors tell what is changed."""
    return isinstance(modules, str) and modules != "all-linear"


def _targeted(path: Path, keys: dict[str, Any], name: str) -> bool:
    """Whether the config says that this weight is changed.

    Source: `check_target_module_exists` in peft's src/peft/tuners/tuners_utils.py, except for patterns.
    """
    modules, layers = keys.get("target_modules"), keys.get("layers_to_transform")
    if modules == "all-linear":  # but the head, in peft as here
        return name.startswith("model.layers.")
    if _is_pattern(modules):
        return True
    if not isinstance(modules, list) or not modules or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{path}: target_modules is {modules!r:.60}, expected a list of names such as 'W_pack'")
    layers = [layers] if type(layers) is int else layers or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f"{path}: layers_to_transform is {layers!r:.60}, expected a list of layers' numbers")
    module = name.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    inside = not layers or (layer is not None and int(layer[1]) in layers)
    return inside and any(f".{module}".endswith(f".{target}") for target in modules)
