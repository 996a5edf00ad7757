"""Encodings files: what AIMET writes and Qualcomm's converter reads, in the three versions that are in use.

Each version writes the same grid in its own way:

    0.6.1   {"x": [{"bitwidth": 16, "scale": s, "offset": -32768, "is_symmetric": "False", …}]}   one dict a row
    1.0.0   [{"name": "x", "bw": 16, "scale": [s], "offset": [-32768], "is_sym": false, …}]       lists, row by row
    2.0.0   [{"name": "x", "output_dtype": "uint16", "y_scale": s, "y_zero_point": 32768}]         as ONNX has it

The first two state offsets on the unsigned grid, real = (code + offset) * scale, so symmetric int4 has -8. The last
gives symmetric weights a signed type and no zero point; whether an activation was meant to be symmetric is lost. Blocks
exist from 1.0.0 on. A 16-bit float has an entry in the first two versions, and none in the last.

**Source**: AIMET's quantization encoding specification; what AIMET-ONNX 2.42 writes and accepts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import refimpl
from export.graphs.naming import tap_of
from refimpl.errors import InputError
from refimpl.files import VALUES, read_json, write_whole
from refimpl.grids.encodings import INPUTS, Encodings, Float16, near
from refimpl.model import Model
from refimpl.names import taps
from refimpl_kernels.affine import LPBQ_STEPS, Encoding

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
LARGEST = 1 << 30  # bytes of a file that is read: 7 B weights in LPBQ blocks of 64 are 0.3 GB
FEWEST = 16  # weights that share a grid


def write_encodings(encodings: Encodings, path: str | Path, version: str = "1.0.0") -> None:
    """Writes an encodings file, whole or not at all.

    Raises InputError for an unknown version, for blocks in 0.6.1, and if the file cannot be written.
    """
    write_whole(path, json.dumps(as_json(encodings, version), allow_nan=False))


def as_json(encodings: Encodings, version: str = "1.0.0") -> dict[str, Any]:
    """The content of an encodings file, in one of VERSIONS."""
    if version not in VERSIONS:
        raise InputError(f"the version is {version!r}, expected one of {', '.join(VERSIONS)}")
    head = {"version": version, "producer": {"package": "refimpl", "version": refimpl.__version__}}
    if version == "2.0.0":
        both = [(encodings.activations, False), (encodings.parameters, True)]
        entries = [_entry_2(name, e, signed) for part, signed in both for name, e in part.items()]
        return {**head, "encodings": [entry for entry in entries if entry]}
    activation_bits, bits = (
        Counter(e.bits for e in part.values()).most_common(1)[0][0] if part else default
        for part, default in ((encodings.activations, 16), (encodings.parameters, 4))
    )
    arguments = {"activation_bitwidth": activation_bits, "dtype": "int", "is_symmetric": True, "param_bitwidth": bits,
                 "per_channel_quantization": True, "quant_scheme": "min_max"}  # fmt: skip
    sections: dict[str, Any] = {}
    for section, part in (("activation", encodings.activations), ("param", encodings.parameters)):
        if version == "0.6.1":
            sections[f"{section}_encodings"] = {name: _entries_0(name, e) for name, e in part.items()}
        else:
            sections[f"{section}_encodings"] = [_entry_1(name, e) for name, e in part.items()]
    return {**head, "quantizer_args": arguments, **sections}


def _entries_0(name: str, encoding: Encoding | Float16) -> list[dict[str, Any]]:
    if isinstance(encoding, Float16):
        return [{"bitwidth": encoding.bits, "dtype": "float"}]
    if encoding.block_size:
        raise InputError(f"{name} has its scales in blocks, which version 0.6.1 cannot say; write 1.0.0 or 2.0.0")
    parts = (encoding.low, encoding.high, encoding.scale, encoding.offset)
    return [
        {"bitwidth": encoding.bits, "dtype": "int", "is_symmetric": str(encoding.symmetric),
         "min": low, "max": high, "scale": scale, "offset": int(offset)}
        for low, high, scale, offset in zip(*(np.ravel(part).tolist() for part in parts), strict=True)
    ]  # fmt: skip


def _entry_1(name: str, encoding: Encoding | Float16) -> dict[str, Any]:
    if isinstance(encoding, Float16):
        return {"name": name, "dtype": "FLOAT", "bw": encoding.bits, "enc_type": "PER_TENSOR"}
    entry: dict[str, Any] = {"name": name, "dtype": "INT", "bw": encoding.bits, "is_sym": encoding.symmetric}
    scale, offset = np.ravel(encoding.scale).tolist(), np.ravel(encoding.offset).astype(int).tolist()
    if encoding.block_scale is not None:
        # bw and the offset are those of the product code * block scale
        bits = encoding.bits + int(math.log2(LPBQ_STEPS))
        steps = np.ravel(encoding.block_scale).astype(int).tolist()
        entry |= {"enc_type": "LPBQ", "bw": bits, "compressed_bw": encoding.bits, "per_block_int_scale": steps}
        offset = [-(2 ** (bits - 1))] * len(scale)
    else:
        kind = "PER_BLOCK" if encoding.block_size else "PER_CHANNEL" if encoding.scale.ndim else "PER_TENSOR"
        entry["enc_type"] = kind
    if encoding.block_size:
        entry["block_size"] = encoding.block_size
    return {**entry, "scale": scale, "offset": offset}


def _entry_2(name: str, encoding: Encoding | Float16, signed: bool) -> dict[str, Any] | None:
    if isinstance(encoding, Float16):
        return None
    signed &= encoding.symmetric
    entry: dict[str, Any] = {"name": name, "output_dtype": f"{'int' if signed else 'uint'}{encoding.bits}"}
    if encoding.block_scale is not None:
        steps = encoding.block_scale.astype(int).tolist()
        entry |= {"per_channel_float_scale": encoding.scale[:, None].tolist(), "per_block_int_scale": steps}
    else:
        entry["y_scale"] = encoding.scale.tolist()
        zero_point = -encoding.offset - (2 ** (encoding.bits - 1) if signed else 0)
        if np.any(zero_point):
            entry["y_zero_point"] = zero_point.astype(int).tolist()
    if encoding.scale.ndim:
        entry["axis"] = 1 if encoding.block_size else 0
    if encoding.block_size:
        entry["block_size"] = encoding.block_size
    return entry


def read_encodings(path: str | Path, model: Model) -> Encodings:
    """The encodings of a model from a file of any of VERSIONS, which may come from anywhere.

    The names are taps and parameters, or those that AI Hub gives the ends of a graph (`logits`, `past_key_0_in`).

    Raises InputError, in one line, for a file that is not an encodings file, is damaged, or is of another model.
    """
    path = Path(path)
    weights = sum(math.prod(weight.shape) for weight in model.weights.values())
    content = read_json(path, LARGEST, VALUES + weights // FEWEST)
    try:
        return _read(content, model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(content: Mapping[str, Any], model: Model) -> Encodings:
    version = content.get("version")
    if version not in VERSIONS:
        raise InputError(f"the version is {version!a:.40}, expected one of {', '.join(VERSIONS)}")
    entries = list(named_entries(content, version))
    known, shapes = {*taps(model.config), *INPUTS}, {name: weight.shape for name, weight in model.weights.items()}
    if not any(tap_of(name) in known or name in shapes for name, _ in entries):
        raise InputError(f"of {len(entries)} encodings none has a name of this model; they are another's")
    activations: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for name, entry in entries:
        tap = name if name in shapes else tap_of(name)
        if tap not in known and tap not in shapes:
            raise InputError(f"there is an encoding for {name!a:.99}, which this model lacks{near(name, known)}")
        try:
            encoding = (_parse_0, _parse_1, _parse_2)[VERSIONS.index(version)](entry, shapes.get(tap, ()))
        except InputError as error:
            raise InputError(f"the encoding of {name} {error}") from None
        part = parameters if tap in shapes else activations
        if tap in part and (part[tap] != encoding or tap == name):
            raise InputError(f"{name} has two encodings; one tensor stands on one grid")
        part[tap] = encoding
    return Encodings(activations, parameters).check(model.config, model.weights)


def named_entries(content: Mapping[str, Any], version: str) -> Iterator[tuple[str, Any]]:
    """Name and entry of everything in the file."""
    for section in ["encodings"] if version == "2.0.0" else ["activation_encodings", "param_encodings"]:
        part, kind = content.get(section), dict if version == "0.6.1" else list
        if not isinstance(part, kind):
            raise InputError(f"{section} is {type(part).__name__}, but version {version} has a {kind.__name__} there")
        if isinstance(part, dict):
            yield from part.items()
            continue
        for entry in part:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise InputError(f"{section} holds something that is not an object with a name")
            yield entry["name"], entry


def _parse_0(entry: Any, shape: tuple[int, ...]) -> Encoding | Float16:
    if not isinstance(entry, list) or not entry or not all(isinstance(row, dict) for row in entry):
        raise InputError("is not a list of objects")
    kinds = {(str(r.get("dtype")), str(r.get("is_symmetric")), str(r.get("bitwidth"))) for r in entry}
    if len(kinds) != 1:
        raise InputError("gives its rows different numbers of bits, or different kinds")
    first = entry[0]
    if first.get("dtype") == "float":
        return _float(first.get("bitwidth"))
    rows = [len(entry)] if len(entry) > 1 else []
    scale, offset = ([row.get(key) for row in entry] for key in ("scale", "offset"))
    symmetric = {"True": True, "False": False}.get(str(first.get("is_symmetric")))
    if first.get("dtype") != "int" or symmetric is None:
        raise InputError(f"has dtype {first.get('dtype')!a:.40}, is_symmetric {first.get('is_symmetric')!a:.40}")
    return _affine(first.get("bitwidth"), _array(scale, rows, "scale"), _array(offset, rows, "offset"), symmetric)


def _parse_1(entry: Mapping[str, Any], shape: tuple[int, ...]) -> Encoding | Float16:
    if entry.get("dtype") == "FLOAT":
        return _float(entry.get("bw"))
    kind, symmetric, bits = entry.get("enc_type"), entry.get("is_sym"), entry.get("bw")
    if entry.get("dtype") != "INT" or not isinstance(symmetric, bool):
        raise InputError(f"has dtype {entry.get('dtype')!a:.40} and is_sym {symmetric!a:.40}")
    if np.any(entry.get("zero_point_shift", 0.0)):
        raise InputError("has a zero_point_shift, which is not simulated")
    if kind == "PER_TENSOR":
        return _affine(bits, _array(entry.get("scale"), [], "scale"), _array(entry.get("offset"), [], "offset"),
                       symmetric)  # fmt: skip
    if kind not in ("PER_CHANNEL", "PER_BLOCK", "LPBQ"):
        raise InputError(f"has the enc_type {kind!a:.40}, expected PER_TENSOR, PER_CHANNEL, PER_BLOCK or LPBQ")
    rows, blocks, size = [*shape[:1]], [*shape[:1]], None
    if kind != "PER_CHANNEL":
        size = _block_size(entry, shape)
        blocks = [shape[0], shape[1] // size]
    many = rows if kind == "LPBQ" else blocks
    scale, offset = (_array(entry.get(key), many, key) for key in ("scale", "offset"))
    if kind != "LPBQ":
        return _affine(bits, scale, offset, symmetric, size)
    bits, wide = entry.get("compressed_bw"), bits
    if type(bits) is not int or wide != 2 * bits or not symmetric:
        raise InputError(f"has compressed_bw {bits!a:.40} and bw {wide!a:.40}, expected a number and twice that")
    steps = _array(entry.get("per_block_int_scale"), blocks, "per_block_int_scale")
    return _affine(bits, scale, np.full_like(scale, -(2 ** (bits - 1))), True, size, steps)


def _parse_2(entry: Mapping[str, Any], shape: tuple[int, ...]) -> Encoding | Float16:
    named = re.fullmatch(r"(u?)int(\d{1,2})", str(entry.get("output_dtype")))
    if not named:
        raise InputError(f"has the output_dtype {entry.get('output_dtype')!a:.40}, expected one such as uint16 or int4")
    signed, bits, axis = not named[1], int(named[2]), entry.get("axis")
    lpbq = "per_block_int_scale" in entry
    size = _block_size(entry, shape) if lpbq or "block_size" in entry else None
    if axis is not None and (type(axis) is not int or axis % max(len(shape), 1) != (1 if size else 0) or not shape):
        raise InputError(f"has axis {axis!a:.40}, expected 0 for rows, 1 for blocks along them, none for a tensor")
    blocks = [shape[0], shape[1] // size] if size else list(shape[:1]) if axis is not None else []
    if lpbq:
        scale = _array(entry.get("per_channel_float_scale"), [shape[0]], "per_channel_float_scale")
        steps = _array(entry.get("per_block_int_scale"), blocks, "per_block_int_scale")
        return _affine(bits, scale, np.full_like(scale, -(2.0 ** (bits - 1))), True, size, steps)
    if isinstance(entry.get("y_scale"), dict):
        raise InputError("has scales of scales, which came with version 2.1.0")
    scale = _array(entry.get("y_scale"), blocks, "y_scale")
    zero = entry.get("y_zero_point")
    zero_point = np.zeros_like(scale) if zero is None else _array(zero, blocks, "y_zero_point")
    offset = 0.0 - zero_point - (2 ** (bits - 1) if signed else 0)
    return _affine(bits, scale, offset, signed, size)


def _affine(bits, scale, offset, symmetric, block_size=None, steps=None) -> Encoding:
    """An Encoding, if its numbers make sense: a float32 step above 0 and whole offsets of the grid's size."""
    if type(bits) is not int or not (2 <= bits <= 16 or bits == 32):
        raise InputError(f"has {bits!a:.40} bits, expected 2 to 16")
    with np.errstate(over="ignore", under="ignore"):
        narrow = scale.astype(np.float32)
    if not (np.isfinite(narrow).all() and (narrow > 0).all()):
        raise InputError("has a scale that is not a positive float32")
    if np.any(offset % 1) or np.any(np.abs(offset) > 2**bits):
        raise InputError(f"has an offset that is not a whole number within {2**bits}")
    if steps is not None and (np.any(steps % 1) or steps.min() < 1 or steps.max() > LPBQ_STEPS):
        raise InputError(f"has a block scale that is not a whole number from 1 to {LPBQ_STEPS}")
    return Encoding(bits, scale, offset, symmetric, block_size, steps)


def _float(bits: Any) -> Float16:
    if bits != 16:
        raise InputError(f"is a float of {bits!a:.40} bits, expected 16")
    return Float16()


def _block_size(entry: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    size = entry.get("block_size")
    if type(size) is not int or size < 1 or len(shape) != 2 or shape[1] % size:
        raise InputError(f"has block_size {size!a:.40}, which does not divide the rows of its shape {shape}")
    return size


def _array(values: Any, shape: list[int], what: str) -> np.ndarray:
    """Numbers as float64 of `shape`, from a number, a list, or lists in a list."""
    flat: list[Any] = [values]
    while any(isinstance(value, list) for value in flat):
        flat = [x for value in flat for x in (value if isinstance(value, list) else [value])]
        if len(flat) > max(math.prod(shape), 1):
            break
    if len(flat) != math.prod(shape):
        wanted = " x ".join(map(str, shape)) or "1"
        raise InputError(f"has {len(flat)} numbers as {what}, expected {wanted}")
    if any(type(x) not in (int, float) or abs(x) > 1e38 or not math.isfinite(x) for x in flat):
        raise InputError(f"has a {what} that is not a number")
    return np.array(flat, np.float64).reshape(shape)
