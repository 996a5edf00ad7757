"""Quantized matrices as bitsandbytes has left them in a checkpoint, in its three layouts.

    official     K.data (n, 1) uint8, and K.quant_state, a list: what Baichuan2's quantizer.py saved with 0.39 to 0.41
                 [absmax, shape, dtype, 64, nested, "nf4", code], nested: None or [offset, [absmax2, code2, 256, ...]]
    4 bits       K (n, 1) uint8, K.absmax, K.quant_map, K.quant_state.bitsandbytes__nf4 (JSON as bytes) and, where the
                 scales are 8-bit numbers themselves, K.nested_absmax and K.nested_quant_map: what transformers saves
    8 bits       K (O, I) int8 and its scales (O,) float32 under the module's name and SCB

K is a weight's name. Codes lie in blocks over the flattened matrix: see kernels/nf4.py. The state's dtype is the format
of the matrix that was quantized; bitsandbytes rounds to it when it reads the matrix back.

Source: `init_model_weight_int4` in the official quantizer.py; `QuantState.as_dict` in bitsandbytes/functional.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from kernels import formats
from refimpl.errors import InputError

STATE, DATA, LIST = ".quant_state.bitsandbytes__", ".data", ".quant_state"
PARTS = {"absmax": "scales", "quant_map": "code", "nested_absmax": "nested_scales", "nested_quant_map": "nested_code"}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def split(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[formats.Blocks, np.dtype]]]:
    """The tensors that are as they are, and K -> (blocks, format that they are read in) of the quantized matrices.

    Raises InputError for a matrix whose parts are missing, of another size, or not understood.
    """
    rest, found = dict(tensors), {}
    for name in tensors:
        key = name.removesuffix(".weight")
        if name.endswith(DATA) and f"{name.removesuffix(DATA)}{LIST}" in tensors:
            key = name.removesuffix(DATA)
            read = _checked(key, _official, rest.pop(name), rest.pop(f"{key}{LIST}"))
        elif STATE in name:
            key, _, kind = name.partition(STATE)
            parts = {part: rest.pop(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in rest}
            read = _checked(key, _four_bits, kind, rest.pop(key, None), rest.pop(name), parts)
        elif f"{key}.SCB" in tensors and name != key:
            rest.pop(f"{key}.weight_format", None)  # 0: the rows in their order, the only one written today
            key, read = name, _checked(name, _eight_bits, rest.pop(name), rest.pop(f"{key}.SCB"))
        else:
            continue
        found[key] = read
    return rest, found


def _checked(name: str, read: Any, *parts: Any) -> tuple[formats.Blocks, np.dtype]:
    """What `read` makes of a matrix's parts; whatever it stumbles over is their fault, and is said in one line."""
    try:
        return read(*parts)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"the quantized {name} is not what bitsandbytes writes: {error}") from None


def _official(packed: np.ndarray, state: list) -> tuple[formats.Blocks, np.dtype]:
    match state:
        case [absmax, tuple(shape), np.dtype() as dtype, int(size), None, str(kind), code]:
            nested = {}
        case [
            absmax,
            tuple(shape),
            np.dtype() as dtype,
            int(size),
            [offset, [scales, values, 256, *_]],
            str(kind),
            code,
        ]:
            nested = dict(offset=offset.reshape(()), nested_scales=scales, nested_code=values)
        case _:
            raise ValueError("its quant_state is another list")
    return _blocks(kind, shape, size, packed, dict(scales=absmax, code=code, **nested)), dtype


def _four_bits(
    kind: str, packed: np.ndarray, state: np.ndarray, parts: dict[str, np.ndarray]
) -> tuple[formats.Blocks, np.dtype]:
    keys = json.loads(state.tobytes())
    named = {PARTS[part]: array for part, array in parts.items()}
    if "nested_scales" in named:
        if keys["nested_blocksize"] != 256:
            raise ValueError(f"nested_blocksize is {keys['nested_blocksize']!r}, expected 256")
        named["offset"] = np.array(keys["nested_offset"], np.float32)
    if keys["quant_type"] != kind:
        raise ValueError(f"quant_type is {keys['quant_type']!r}, expected {kind!r}")
    return _blocks(kind, keys["shape"], keys["blocksize"], packed, named), np.dtype(DTYPES[keys["dtype"]])


def _eight_bits(codes: np.ndarray, scales: np.ndarray) -> tuple[formats.Blocks, np.dtype]:
    if codes.dtype != np.int8 or codes.ndim != 2 or scales.dtype != np.float32:
        raise ValueError(f"it is {codes.dtype} {codes.shape} with {scales.dtype} scales, expected int8 with float32")
    header = {"format": "int8", "shape": codes.shape, "block_size": codes.shape[1], "axis": 1}
    return formats.from_arrays(header, {"packed": codes, "scales": scales.reshape(-1, 1)}), np.dtype(np.float16)


def _blocks(kind: str, shape: Any, size: Any, packed: np.ndarray, parts: dict[str, np.ndarray]) -> formats.Blocks:
    """The blocks of a matrix, whose parts must be of the sizes and formats that its shape implies."""
    if (
        kind not in ("nf4", "fp4")
        or len(shape) != 2
        or not all(type(n) is int and 0 < n < 1 << 24 for n in (*shape, size))
    ):
        raise ValueError(f"its format {kind!r} of shape {shape!r} in blocks of {size!r} is not known")
    for part, count in (("code", 16), ("nested_code", 256), ("offset", 1)):
        if part in parts and (parts[part].size != count or parts[part].dtype != np.float32):
            raise ValueError(f"its {part} is {parts[part].dtype} {parts[part].shape}, expected {count} of float32")
    flat = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)  # bnb_4bit_quant_storage may be another format
    header = {"format": kind, "shape": tuple(shape), "block_size": size, "axis": None}
    return formats.from_arrays(header, {"packed": flat, **{name: part for name, part in parts.items()}})
