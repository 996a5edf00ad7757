"""Which parameters become blocks of a number format; those of bitsandbytes as the official code makes them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from kernels import formats
from kernels.ops import Readable
from refimpl.errors import InputError
from refimpl.weights import Int8Weight, QuantizedWeight, Weights

TILE_ELEMENTS = 16 << 20  # rows are quantized this many elements at a time, so that float32 copies stay small


def quantize_weights(weights: Weights, scheme: str, block_size: int | None, keep: Sequence[str]) -> Weights:
    """`weights` with matrices in blocks of the format `scheme`, but for those whose module matches a glob in `keep`.

    The embedding is a table that is looked up, and stays. The head is quantized as it is used: after NormHead. The
    formats of bitsandbytes are applied as the official code does it: to the matrices of the layers as float16, in NF4
    and FP4 with scales of 8 bits, and read back as float16; with LLM.int8 a linear quantizes its input, too.

    Raises InputError for an unknown scheme, a block size that does not fit, or a pattern that matches nothing.

    Source: `QLinear` and `quantize_online` in the official quantizer.py.
    """
    try:
        official = formats.format_named(scheme).engine == "bitsandbytes"
    except ValueError as error:
        raise InputError(str(error)) from None
    within = "model.layers." if official else ""
    matrices = [n for n, w in weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight"]
    matrices = [n for n in matrices if n.startswith(within)]
    kept = {n for n in matrices for pattern in keep if fnmatch.fnmatchcase(n.removesuffix(".weight"), pattern)}
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(n.removesuffix(".weight"), pattern) for n in matrices):
            raise InputError(f"keep={pattern!r} matches no matrix; they are called {matrices[0]}, …, {matrices[-1]}")
    quantized: dict[str, QuantizedWeight] = {}
    for name in tqdm([n for n in matrices if n not in kept], desc="quantizing", disable=None, leave=False):
        try:
            blocks = _quantized(weights[name], scheme, block_size, np.dtype(np.float16 if official else np.float32))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        if scheme == "int8":
            quantized[name] = Int8Weight(blocks, np.dtype(np.float16))
        elif official:
            quantized[name] = QuantizedWeight(formats.nest(blocks), np.dtype(np.float16))
        else:
            quantized[name] = QuantizedWeight(blocks)
    return weights.replace(quantized)


def _quantized(weight: Readable, scheme: str, block_size: int | None, dtype: np.dtype) -> formats.Blocks:
    """A matrix in blocks, read in `dtype` and quantized some rows at a time. Raises ValueError if it cannot be."""
    out_features, in_features = weight.shape
    whole = formats.tile_rows(scheme, in_features, block_size)
    step = max(1, TILE_ELEMENTS // in_features // whole) * whole
    tiles = []
    for start in range(0, out_features, step):
        with np.errstate(over="ignore"):  # an infinite weight is refused, in words
            values = weight.read(dtype, slice(start, start + step))
        tiles.append(formats.quantize(values, scheme, block_size))
    return formats.join(tiles)
