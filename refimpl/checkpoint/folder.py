"""A checkpoint's folder: its files mapped, checked against the config, and read as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.checkpoint import gguf
from refimpl.checkpoint.doctor import remarks
from refimpl.checkpoint.foreign import adapter_beside, instead_of_weights, unwrapped
from refimpl.checkpoint.quantized_files import MANIFEST, collect, provenance
from refimpl.checkpoint.resolve import resolve
from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.checkpoint.torch_files import map_torch
from refimpl.checkpoint.weights import Weights, quantized_weight
from refimpl.config import Config, doubt, read_config
from refimpl.errors import InputError, Remark, at_most
from refimpl.files import inside, read_json
from refimpl.text.templates import template_remark
from refimpl.text.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A config and weights, and the folder that they come from, with its tokenizer and other files."""

    folder: Path
    config: Config
    weights: Weights

    @classmethod
    def read(cls, folder: str | Path) -> Checkpoint:
        """The checkpoint in a folder, or in a GGUF file, its weights mapped.

        Raises InputError and warns as `refimpl.load` says.
        """
        folder = Path(folder)
        if folder.suffix == ".gguf":
            return cls(folder, *gguf.read_model(folder))
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; expected one with config.json and weights")
        config = read_config(folder)
        tensors = read_checkpoint(folder)
        weights = resolve(config, tensors).replace({}, provenance(folder))
        said = [f"{folder}: {remark}" for remark in folder_remarks(folder, config, tensors)]
        try:
            load_tokenizer(folder, config)
        except InputError as error:
            said.append(str(error))
        for remark in said:
            warnings.warn(remark, Remark, stacklevel=3)  # points at the caller of `load` or `quantize_checkpoint`
        return cls(folder, config, weights)


def folder_remarks(folder: Path, config: Config, tensors: Mapping[str, Any]) -> list[str]:
    """Remarks on a folder that loads: what its config leaves open, what is not read, what is unusual."""
    said = [doubt(read_json(folder / "config.json")), adapter_beside(folder), template_remark(folder, config)]
    return [*(remark for remark in said if remark), *remarks(config, tensors)]


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """All tensors of a folder, mapped and unread: of `model.safetensors`, else of `pytorch_model.bin`.

    Either may be cut into shards, whose names stand in an index beside them. A `.bin` is parsed and never executed
    (see `checkpoint.torch_files`); with safetensors beside it, it is not looked at. Matrices that a manifest says to be
    quantized (see `refimpl.checkpoint.quantized_files`) come as a `QuantizedWeight`.

    A prefix that a wrapper of the model has put before all names, such as `module.` or `base_model.model.`, is removed,
    and a remark names it. Raises InputError for what is missing, damaged, or not understood.
    """
    folder = Path(folder)
    tensors, wrappers = unwrapped(_read_tensors(folder))
    if wrappers:
        said = f"the names of tensors had {at_most(wrappers)} in them, from a wrapper of the model; it is removed"
        warnings.warn(f"{folder}: {said}", Remark, stacklevel=4)
    if not (folder / MANIFEST).exists():
        return tensors
    tensors, quantized = collect(folder / MANIFEST, tensors)
    return {**tensors, **{name: quantized_weight(*found) for name, found in quantized.items()}}


def _read_tensors(folder: Path) -> dict[str, Any]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).exists():
            return map_tensors(folder, single)
        index = folder / f"{single}.index.json"
        if index.exists():
            return _map_shards(index)
    raise InputError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index; {instead_of_weights(folder)}"
    )


def map_tensors(folder: Path, file: str) -> dict[str, Any]:
    """The tensors of a folder's file (see `refimpl.files.inside`), by its suffix `.safetensors` or another."""
    inside(folder, file)
    mapped = map_safetensors(folder / file) if file.endswith(".safetensors") else map_torch(folder / file)
    for name in mapped:
        if not name.isprintable() or len(name) > 200:
            raise InputError(f"{folder / file} has a tensor called {name!a:.80}, which is not a parameter's name")
    return mapped


def _map_shards(index: Path) -> dict[str, Any]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map, which says the file of each tensor; download it again")
    folder = index.parent
    shards: dict[str, dict[str, Any]] = {}
    tensors = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index} places {name} in {file!r}, expected the name of a file beside it")
        if file not in shards:
            if not (folder / file).exists():
                raise InputError(f"the shard {folder / file} is missing, but {index.name} names it; download it again")
            shards[file] = map_tensors(folder, file)
        if name not in shards[file]:
            raise InputError(f"{folder / file} lacks {name}, which {index.name} places there; download both again")
        tensors[name] = shards[file][name]
    return tensors
