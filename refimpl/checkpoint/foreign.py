"""What other tools leave in a folder: how to recognise it, and what to do about it. Nothing here is read as weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"
# Endings of the tensors' names with which 4-bit engines store a matrix, and the engines' names.
ENGINES = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ", ".weight_packed": "compressed-tensors",
}  # fmt: skip
# Patterns of files that hold a model in a form that is not read here, and what to do with each.
MODELS: dict[str, str] = {
    "*.gguf": "llama.cpp's; give the file itself in place of the folder",
    "adapter_model.*": "a LoRA adapter's; merge it into its model: refimpl convert MODEL --lora ADAPTER --out NEW",
    "*.om": "compiled for Huawei's Ascend, which nothing turns back; take the PyTorch or safetensors weights",
    "*.mindir": "compiled for Huawei's Ascend, which nothing turns back; take the PyTorch or safetensors weights",
    "*.ckpt": "a checkpoint of MindSpore (Huawei's Ascend) or Lightning; save its state_dict as pytorch_model.bin",
    "mp_rank_*": "DeepSpeed's own; run its zero_to_fp32.py, which writes pytorch_model.bin",
    "zero_pp_rank_*": "DeepSpeed's own; run its zero_to_fp32.py, which writes pytorch_model.bin",
    "global_step*": "DeepSpeed's own; run its zero_to_fp32.py, which writes pytorch_model.bin",
    "*.pth": "PyTorch's; if it is a state_dict with Hugging Face's names, rename it to pytorch_model.bin",
    "*.pt": "PyTorch's; if it is a state_dict with Hugging Face's names, rename it to pytorch_model.bin",
    "*.safetensors": "safetensors under another name; rename it to model.safetensors, or add its index",
    "*.bin": "PyTorch's under another name; rename it to pytorch_model.bin, or add its index",
}


def instead_of_weights(folder: Path) -> str:
    """The end of an error message: what a folder holds in place of weights that are read here, and what to do."""
    for pattern, advice in MODELS.items():
        if found := sorted(folder.glob(pattern)):
            return f"{found[0].name} is {advice}"
    return "expected weights"


def adapter_beside(folder: Path) -> str | None:
    """A remark on an adapter that lies beside the weights. transformers and peft would apply it."""
    if not (folder / ADAPTER).exists():
        return None
    return (
        f"{ADAPTER} says that a LoRA adapter lies beside the weights. It is not applied, though transformers applies "
        f"it; merge it: refimpl convert {folder} --lora {folder} --out NEW"
    )


def of_an_engine(names: Iterable[str]) -> str | None:
    """An error message that names the engine, if tensors of these names are quantized by another engine; else None."""
    for name in names:
        for end, engine in ENGINES.items():
            if name.endswith(end):
                return f"{name} is of {engine}, whose 4-bit matrices are not read; {ORIGINAL}"
    return None


ORIGINAL = "take the model that it was made of, and refimpl quantize it"


def stubs(tensors: Mapping[str, Any]) -> str | None:
    """An error message if tensors have no numbers, as when DeepSpeed saves those of other processes; else None."""
    empty = [name for name, value in tensors.items() if getattr(value, "size", None) == 0]
    if not empty:
        return None
    return (
        f"{empty[0]} and {len(empty) - 1} other tensors have no numbers. DeepSpeed's ZeRO stage 3 saves such stubs "
        "where the weights lie in other processes; run its zero_to_fp32.py, or train with "
        "stage3_gather_16bit_weights_on_model_save"
    )


# What PyTorch's and peft's wrappers put into names: inside them, and before them.
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
ANCHOR = "model.embed_tokens.weight"


def unwrapped(tensors: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors under the names that the model gives them, and the parts that wrappers had added to those names.

    A prefix is removed if all names have it and the embedding's name is right without it.

    >>> unwrapped({"module.model.embed_tokens.weight": 1, "module._orig_mod.lm_head.weight": 2})
    ({'model.embed_tokens.weight': 1, 'lm_head.weight': 2}, ['_orig_mod.', 'module.'])
    """
    found = [part for part in INSIDE if any(part in name for name in tensors)]
    names = {name: name for name in tensors}
    for part in found:
        names = {name: short.replace(part, "") for name, short in names.items()}
    before = next((name.removesuffix(ANCHOR) for name in names.values() if name.endswith(f".{ANCHOR}")), "")
    if before and all(short.startswith(before) for short in names.values()):
        names = {name: short.removeprefix(before) for name, short in names.items()}
        found.append(before)
    if not found or len(set(names.values())) < len(names):
        return tensors, []
    return {short: tensors[name] for name, short in names.items()}, found


def unmerged(names: Iterable[str]) -> str | None:
    """An error message if an adapter's matrices lie among the weights, as in a model wrapped by peft; else None."""
    for name in names:
        if ".lora_A." in name:
            return (
                f"{name} belongs to an adapter that is not merged. Merge it where it was trained "
                "(merge_and_unload), or save it alone (save_pretrained) and use refimpl convert --lora"
            )
    return None
