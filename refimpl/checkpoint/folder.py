"""A checkpoint's folder, read as a whole."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from refimpl.checkpoint.doctor import remarks
from refimpl.checkpoint.quantized_files import provenance
from refimpl.checkpoint.weights import Weights, read_checkpoint, resolve
from refimpl.config import Config, read_config
from refimpl.errors import InputError, Remark
from refimpl.text.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A config and weights, and the folder that they come from, with its tokenizer and other files."""

    folder: Path
    config: Config
    weights: Weights

    @classmethod
    def read(cls, folder: str | Path) -> Checkpoint:
        """The checkpoint in a folder, its weights mapped. Raises InputError and warns as `refimpl.load` says."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; expected one with config.json and weights")
        config = read_config(folder)
        tensors = read_checkpoint(folder)
        weights = resolve(config, tensors).replace({}, provenance(folder))
        said = [f"{folder}: {remark}" for remark in remarks(config, tensors)]
        try:
            load_tokenizer(folder, config)
        except InputError as error:
            said.append(str(error))
        for remark in said:
            warnings.warn(remark, Remark, stacklevel=3)  # at who called `load`, or `quantize_checkpoint`
        return cls(folder, config, weights)
