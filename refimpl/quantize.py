"""Which parameters become 4-bit blocks, and a parameter that reads as what its blocks stand for."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from kernels import formats
from refimpl.errors import InputError
from refimpl.weights import Weights

TILE_ELEMENTS = 16 << 20  # rows are quantized this many elements at a time, so that float32 copies stay small


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A parameter in 4-bit blocks. It reads like any other: as the values that the blocks stand for."""

    blocks: formats.Blocks

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The dequantized values of these rows: float32 by definition of the format, then converted to `dtype`."""
        return formats.dequantize(self.blocks, rows).astype(dtype, copy=False)


def quantize_weights(weights: Weights, scheme: str, block_size: int, keep: Sequence[str]) -> Weights:
    """`weights` with every matrix of a linear in 4-bit blocks, but for those whose module matches a glob in `keep`.

    The embedding is a table that is looked up, and stays. The head is quantized as it is used: after NormHead.
    Raises InputError for an unknown scheme, a block size that does not fit, or a pattern that matches nothing.
    """
    if scheme != "int4":
        raise InputError(f"the format is {scheme!r}, expected 'int4'")
    matrices = [n for n, w in weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight"]
    kept = {n for n in matrices for pattern in keep if fnmatch.fnmatchcase(n.removesuffix(".weight"), pattern)}
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(n.removesuffix(".weight"), pattern) for n in matrices):
            raise InputError(f"keep={pattern!r} matches no matrix; they are called {matrices[0]}, …, {matrices[-1]}")
    quantized = {}
    for name in tqdm([n for n in matrices if n not in kept], desc="quantizing", disable=None, leave=False):
        weight = weights[name]
        out_features, in_features = weight.shape
        step = max(1, TILE_ELEMENTS // in_features)
        try:
            tiles = [
                formats.quantize(weight.read(np.dtype(np.float32), slice(start, start + step)), scheme, block_size)
                for start in range(0, out_features, step)
            ]
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        quantized[name] = QuantizedWeight(formats.join(tiles))
    return weights.replace(quantized)
