"""Quantized matrices of bitsandbytes, in the three layouts in which checkpoints hold them.

    official     K.data (n, 1) uint8, and K.quant_state, a list: what Baichuan2's quantizer.py saved with 0.39 to 0.41
                 [absmax, shape, dtype, 64, nested, "nf4", code], nested: None or [offset, [absmax2, code2, 256, ...]]
    4 bits       K (n, 1) uint8, K.absmax, K.quant_map, K.quant_state.bitsandbytes__nf4 (JSON as bytes) and, where the
                 scales are 8-bit numbers themselves, K.nested_absmax and K.nested_quant_map: what transformers saves
    8 bits       K (O, I) int8 and its scales (O,) float32 under the module's name and SCB

K is a weight's name. Codes lie in blocks over the flattened matrix: see nf4.py. The state's dtype is the format
of the matrix that was quantized; bitsandbytes rounds to it when it reads the matrix back.

Source: `init_model_weight_int4` in the official quantizer.py; `QuantState.as_dict` in bitsandbytes/functional.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.errors import InputError
from refimpl_kernels import formats

STATE, DATA, LIST = ".quant_state.bitsandbytes__", ".data", ".quant_state"
PARTS = {"absmax": "scales", "quant_map": "code", "nested_absmax": "nested_scales", "nested_quant_map": "nested_code"}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
IN_ORDER = np.array(0, np.uint8)  # the weight_format of rows in their usual order
STATE_LIMIT = 4096  # bytes of JSON; bitsandbytes writes about 200


def collect(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[formats.Blocks, np.dtype]]]:
    """The tensors that are not quantized; and for each quantized matrix, K -> (its blocks, the format it is read in).

    Raises InputError for a matrix whose parts are missing, of another size, or not understood.
    """
    rest, found = dict(tensors), {}
    for name in tensors:
        if name not in rest:  # a part of a matrix that is found already
            continue
        key, module = name, name.removesuffix(".weight")
        try:
            if name.endswith(DATA) and f"{name.removesuffix(DATA)}{LIST}" in rest:
                key = name.removesuffix(DATA)
                matrix = _official(rest.pop(name), rest.pop(f"{key}{LIST}"))
            elif STATE in name:
                key, _, kind = name.partition(STATE)
                parts = {PARTS[part]: rest.pop(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in rest}
                matrix = _four_bits(kind, rest.pop(name), rest.pop(key, None), parts)
            elif f"{module}.SCB" in rest and name != module:
                order = rest.pop(f"{module}.weight_format", IN_ORDER)
                matrix = _eight_bits(rest.pop(name), rest.pop(f"{module}.SCB"), order)
            else:
                continue
            if key in found or key in rest:
                raise ValueError("it is stored twice")
        except ValueError as error:
            raise InputError(f"the quantized {key} is not what bitsandbytes writes: {error}") from None
        found[key] = matrix
    return rest, found


def _official(packed: Any, state: Any) -> tuple[formats.Blocks, np.dtype]:
    match state:
        case [absmax, tuple() as shape, np.dtype() as dtype, size, nested, str() as kind, code]:
            parts = {"scales": absmax, "code": code}
        case _:
            raise ValueError("its quant_state is another list")
    match nested:
        case [offset, [scales, table, int(n), *_]] if n == formats.dynamic8.BLOCK_SIZE:
            parts |= {"offset": offset, "nested_scales": scales, "nested_code": table}
        case _ if nested is not None:
            raise ValueError("its scales are quantized by other than 256 of them at once")
    if dtype not in DTYPES.values():
        raise ValueError(f"it was made of {dtype}, expected {' or '.join(DTYPES)}")
    return _blocks(kind, shape, size, packed, parts), dtype


def _four_bits(kind: str, state: Any, packed: Any, parts: dict[str, Any]) -> tuple[formats.Blocks, np.dtype]:
    if not isinstance(state, np.ndarray) or state.dtype != np.uint8 or state.size > STATE_LIMIT:
        raise ValueError(f"its quant_state is not JSON in {STATE_LIMIT} bytes")
    try:
        keys = json.loads(state.tobytes().decode())
    except RecursionError:
        keys = None
    match keys:
        case {"quant_type": str() as said, "shape": list() as shape, "blocksize": size, "dtype": str() as dtype}:
            if said != kind or dtype not in DTYPES:
                raise ValueError(f"its quant_type is {said!r:.40} in {dtype!r:.40}, expected {kind!r} in float16")
        case _:
            raise ValueError("its quant_state lacks quant_type, shape, blocksize or dtype")
    if "nested_scales" in parts:
        match keys.get("nested_blocksize"), keys.get("nested_offset"):
            case formats.dynamic8.BLOCK_SIZE, float() as offset if abs(offset) < 1e38:
                parts = parts | {"offset": np.array(offset, np.float32)}
            case other:
                raise ValueError(f"its nested_blocksize and nested_offset are {other!s:.60}, expected 256, 0.5")
    return _blocks(kind, tuple(shape), size, packed, parts), np.dtype(DTYPES[dtype])


def _eight_bits(codes: Any, scales: Any, order: Any) -> tuple[formats.Blocks, np.dtype]:
    match codes, scales, order:
        case np.ndarray(dtype=np.int8, ndim=2), np.ndarray(dtype=np.float32, ndim=1), np.ndarray(size=1) if not order:
            header = {"format": "int8", "shape": codes.shape, "block_size": codes.shape[1], "axis": 1}
            return formats.from_arrays(header, {"packed": codes, "scales": scales[:, None]}), np.dtype(np.float16)
    raise ValueError("it is not an int8 matrix with a float32 scale for each row, the rows in their order")


def _blocks(kind: Any, shape: tuple, size: Any, packed: Any, parts: dict[str, Any]) -> formats.Blocks:
    """The blocks of a matrix. Raises ValueError unless its parts have the sizes and formats that its shape implies."""
    whole = all(type(n) is int and 0 < n < 1 << 24 for n in (*shape, size))
    if kind not in ("nf4", "fp4") or len(shape) != 2 or not whole:
        raise ValueError(f"its format {kind!r:.40} of shape {shape!r:.40} in blocks of {size!r:.40} is not known")
    for part, array in {"packed": packed, **parts}.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"its {part} is not a tensor")
    if packed.nbytes != -(-shape[0] * shape[1] // 2):
        raise ValueError(f"its packed codes have {packed.nbytes} bytes, too few or too many for shape {shape}")
    if not packed.flags.c_contiguous:  # such as few bytes that are expanded to many
        raise ValueError("its packed codes do not lie one after the other")
    flat = packed.reshape(-1).view(np.uint8)  # bnb_4bit_quant_storage may be another format
    header = {"format": kind, "shape": shape, "block_size": size, "axis": None}
    return formats.from_arrays(header, {"packed": flat, **parts})
