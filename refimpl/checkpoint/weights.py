"""Parameters as the decoder reads them: stored in any format, converted tile by tile, in blocks, or normalised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from refimpl_kernels import formats
from refimpl_kernels.formats import int8

FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)  # what parameters may be stored as
# Converted copies of up to this many elements are kept. Small models get faster, and large ones hardly larger.
KEEP_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter as stored. `array` is mapped: only the rows that are read are fetched from the disk."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The values of these rows in `dtype`: a view of the file where nothing is to be converted.

        Some files hold numbers at places that are not multiples of their size. These are copied: NumPy would not hand
        them to BLAS, and another sum would have other last bits.
        """
        if self.array.size > KEEP_ELEMENTS:
            return self._convert(self.array[rows], dtype)
        if dtype not in self._kept:
            self._kept[dtype] = self._convert(self.array, dtype)
        return self._kept[dtype][rows]

    @property
    def in_place(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The array, and the lengths (O,) float32 by which a reader divides its rows; None if there are none."""
        return self.array, None

    def _convert(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.require(values.astype(dtype, copy=False), requirements=["ALIGNED"])

    @cached_property
    def _kept(self) -> dict:
        return {}


class NormHead(Weight):
    """The head of Baichuan2: each row divided by its Euclidean length, in the format that is computed in.

    A logit is then the cosine between the hidden state and the token's row, times the length of the hidden state. So a
    rare token is not held back because training left its row short. The lengths do not depend on the tokens: dividing
    once, offline, gives a plain head with the same answers (`refimpl convert --normalize-head`).

    Source: `NormHead` in the official modeling_baichuan.py, `nn.functional.normalize(weight)`. It rounds the length to
    the weight's format and does not let it fall below 1e-12, so that a row of zeros stays zero. (In float16, the
    official code makes such a row NaN, because 1e-12 is zero there. Here it stays zero.)
    """

    def read(self, dtype, rows=slice(None)):
        """These rows, divided. The lengths are computed once for each format and kept."""
        if self.array.size <= KEEP_ELEMENTS:
            return super().read(dtype, rows)
        return self._divided(self.array[rows], dtype, self.lengths(dtype)[rows])

    @property
    def in_place(self):
        return self.array, self.lengths(np.dtype(np.float32))[:, 0]

    def lengths(self, dtype: np.dtype) -> np.ndarray:
        """The lengths (O, 1) of the rows, rounded to `dtype` and at least 1e-12."""
        if ("lengths", dtype) not in self._kept:
            step = max(1, KEEP_ELEMENTS // self.shape[1])
            tiles = [_lengths(self.array[i : i + step], dtype) for i in range(0, self.shape[0], step)]
            self._kept["lengths", dtype] = np.concatenate(tiles)
        return self._kept["lengths", dtype]

    def _convert(self, values, dtype):
        return self._divided(values, dtype, _lengths(values, dtype))

    def _divided(self, values, dtype, lengths):
        return (_wide(values, dtype) / lengths).astype(dtype, copy=False)


def _wide(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values rounded to `dtype`, in the format that PyTorch computes their length in."""
    return values.astype(dtype, copy=False).astype(np.float64 if dtype == np.float64 else np.float32, copy=False)


def _lengths(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The lengths (O, 1) of rows, rounded to `dtype` and at least 1e-12."""
    wide = _wide(values, dtype)
    return np.maximum(row_lengths(wide)[:, None].astype(dtype).astype(wide.dtype), 1e-12)


def row_lengths(rows: np.ndarray) -> np.ndarray:
    """The Euclidean length of each row (O, I) -> (O,), computed in the rows' own format."""
    return np.sqrt((rows * rows).sum(-1))


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix in blocks of a number format. It is read like any other: as the values that the blocks stand for."""

    blocks: formats.Blocks
    rounded: np.dtype | None = None  # what values are rounded to: bitsandbytes reads a matrix back in its old format

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The dequantized values of these rows: float32 by definition of the format, then converted to `dtype`."""
        values = formats.dequantize(self.blocks, rows)
        if self.rounded is not None:
            values = values.astype(self.rounded, copy=False)
        return values.astype(dtype, copy=False)


class Int8Weight(QuantizedWeight):
    """A matrix of LLM.int8. Its `linear` quantizes the input, too; `read` gives the values of the matrix alone."""

    def linear(self, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """x (..., I) @ weight.T + bias -> (..., O) in the format of x; outliers from 6.0 on are multiplied apart."""
        return int8.linear(x, self.blocks.packed, self.blocks.scales, bias=bias)


def quantized_weight(blocks: formats.Blocks, rounded: np.dtype | None = None) -> QuantizedWeight:
    """The weight that reads blocks as their engine does. `rounded`: the format to round to, if not the usual one."""
    return (Int8Weight if blocks.format == "int8" else QuantizedWeight)(blocks, rounded or rounded_by(blocks.format))


def rounded_by(format: str) -> np.dtype | None:
    """The format that an engine rounds to when it reads its blocks back; None if it gives float32."""
    return np.dtype(np.float16) if formats.FORMATS[format].engine == "bitsandbytes" else None


class Weights(Mapping[str, Any]):
    """Parameter name -> what `ops` reads. Immutable; `replace` makes another with some entries changed.

    `provenance`: how quantized weights were made, if that is known (`recipe`, `importance`: see `blocks.quantize`).
    """

    def __init__(self, entries: Mapping[str, Any], provenance: Mapping[str, Any] | None = None):
        self._entries = dict(entries)
        self.provenance: dict[str, Any] = dict(provenance or {})

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, entries: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> Weights:
        return Weights({**self._entries, **entries}, self.provenance if provenance is None else provenance)

    def without(self, prefixes: tuple[str, ...]) -> Weights:
        """These weights without those whose names begin with a prefix."""
        kept = {name: weight for name, weight in self._entries.items() if not name.startswith(prefixes)}
        return Weights(kept, self.provenance)
