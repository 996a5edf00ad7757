"""A folder of quantized weights: safetensors files, and a manifest that says which arrays make which matrix.

    quantization.json     version, family, recipe, importance, source (files and their sizes), bytes, files (SHA-256),
                          and in tensors for each matrix its format, shape, block_size, axis
    model*.safetensors    a matrix K in blocks as K.packed, K.scales, … (the arrays of `formats.Blocks`);
                          all other parameters, unchanged
    config.json           the source's, with a quantization_config that keeps other software from reading it wrongly

Arrays are mapped and read bit for bit as they were saved, so a 7B opens at once. The manifest is an untrusted file like
any other: all that it says has to fit the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl_kernels import formats

MANIFEST, VERSION = "quantization.json", 1
# The format that a matrix is rounded to, if its engine does not give float32.
ROUNDED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
HEADER = {"format", "shape", "block_size", "axis"}


def describe_matrix(header: Mapping[str, Any], rounded: np.dtype | None) -> dict[str, Any]:
    """The manifest's entry of a matrix with this `Blocks.header()`."""
    return dict(header) if rounded is None else {**header, "rounded": rounded.name}


def provenance(folder: Path) -> dict[str, Any]:
    """The manifest's entries on how a folder's matrices were made; empty without a manifest."""
    said = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    return {key: said[key] for key in ("recipe", "importance") if key in said}


def collect(
    manifest: Path, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[formats.Blocks, np.dtype | None]]]:
    """The tensors that are not quantized; and for each quantized matrix, name -> (blocks, the format it is rounded to).

    Raises InputError for a manifest of another version, and if manifest and arrays do not fit together.
    """
    said = read_json(manifest)
    if type(said.get("version")) is not int or said["version"] != VERSION:
        raise InputError(f"{manifest} has version {said.get('version')!r:.40}, expected {VERSION}; update refimpl")
    matrices = said.get("tensors")
    if not isinstance(matrices, dict) or not matrices:
        raise InputError(f"{manifest} names no tensors; expected the format and shape of each quantized matrix")
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in matrices}
    rest = {}
    for name, array in tensors.items():
        matrix, _, part = name.rpartition(".")
        if matrix in parts:
            parts[matrix][part] = array
        else:
            rest[name] = array
    if both := [name for name in matrices if name in rest]:
        raise InputError(f"{manifest} says that {at_most(both, 1)} is quantized, but it is stored unquantized, too")
    found = {}
    for name, entry in matrices.items():
        try:
            found[name] = _matrix(entry, parts[name])
        except ValueError as error:
            raise InputError(f"{manifest}: {name!a:.99} does not fit: {error}") from None
    return rest, found


def _matrix(entry: Any, arrays: dict[str, Any]) -> tuple[formats.Blocks, np.dtype | None]:
    if not isinstance(entry, dict) or set(entry) - {*HEADER, "rounded"} or not set(entry) >= HEADER:
        raise ValueError(f"its entry is {entry!r:.60}, expected {', '.join(sorted(HEADER))}")
    shape, size, axis = entry["shape"], entry["block_size"], entry["axis"]
    whole = lambda n: type(n) is int and 0 < n < 1 << 24
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(whole, shape)):
        raise ValueError(f"its shape is {shape!r:.60}, expected two numbers below 2^24")
    if type(size) is not int:
        raise ValueError(f"its block_size is {size!r:.40}, expected a number of weights")
    if not isinstance(entry["format"], str) or axis not in formats.format_named(entry["format"]).axes:
        raise ValueError(f"its format is {entry['format']!r:.40} with axis {axis!r:.40}, which does not exist")
    if axis is not None and type(axis) is not int:
        raise ValueError(f"its axis is {axis!r}, expected a number or null")
    if not arrays:
        raise ValueError("the files have no arrays of it")
    for part, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{part} is not an array")
    rounded = entry.get("rounded")
    if rounded is not None and (not isinstance(rounded, str) or rounded not in ROUNDED):
        raise ValueError(f"it is rounded to {rounded!r:.40}, expected {', '.join(ROUNDED)}")
    blocks = formats.from_arrays({key: entry[key] for key in HEADER}, arrays)
    return blocks, None if rounded is None else np.dtype(ROUNDED[rounded])
