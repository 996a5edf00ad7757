"""A graph's weights: the rows of a parameter, their places in `model.data`, and the file itself, written tile by tile.

A `Parameter` enters a graph as a place in `model.data`; its values stay in the checkpoint until `write_data` copies
them. The protobuf holds no weight, so neither its limit of 2 GiB nor the computer's memory limits the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto

from refimpl.checkpoint.pages import let_go, read_ahead
from refimpl.errors import InputError
from refimpl_kernels.ops import TILE_BYTES, Readable

ALIGNMENT = 4096  # of a weight in model.data: a page, so that a runtime can map it
BITS: dict[int, int] = {  # of an element in model.data; all other types have 32
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8,
    TensorProto.INT16: 16, TensorProto.UINT16: 16,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """An initializer that holds rows of a parameter: its `name` in the graph, and the name `of` the parameter."""

    name: str
    of: str
    weight: Readable
    rows: range

    @classmethod
    def whole(cls, name: str, weight: Readable) -> Parameter:
        """All of a parameter, under its own name."""
        return cls(name, name, weight, range(weight.shape[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.weight.shape[1:])

    def part(self, start: int, stop: int, suffix: str) -> Parameter:
        """Some of its rows: `W_pack.weight` and "0.7" make `W_pack.0.7.weight`."""
        module, _, kind = self.name.rpartition(".")
        return Parameter(f"{module}.{suffix}.{kind}", self.of, self.weight, self.rows[start:stop])

    def tiles(self) -> Iterator[np.ndarray]:
        """The values in float32, TILE_BYTES of rows at a time."""
        step = max(1, TILE_BYTES // 4 // math.prod(self.shape[1:]))
        for i in range(0, len(self.rows), step):
            rows, more = self.rows[i : i + step], self.rows[i + step : i + 2 * step]
            stored = getattr(self.weight, "array", np.empty(0))  # read ahead while this tile is written, then let go
            read_ahead(stored[more.start : more.stop])
            yield self.weight.read(np.dtype(np.float32), slice(rows.start, rows.stop)).astype("<f4", copy=False)
            let_go(stored[rows.start : rows.stop])


@dataclass(frozen=True)
class Built:
    """A finished graph: the ONNX model without its weights, and where in `model.data` each weight lies."""

    proto: ModelProto
    layout: dict[str, tuple[int, int]]  # initializer -> (offset, length) in bytes
    tiles: dict[str, Callable[[], Iterator[np.ndarray]]]  # initializer -> its values, a few rows at a time
    shown: dict[str, str]  # a head's value -> the tap that it is a piece of
    parameters: dict[str, Parameter]  # initializer in float32 -> the rows that it holds


def assign_offsets(parameters: Iterable[TensorProto]) -> dict[str, tuple[int, int]]:
    """Places initializers in `model.data`, one after the other: name -> (offset, length) in bytes."""
    layout, end = {}, 0
    for proto in parameters:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        length = -(-math.prod(proto.dims) * BITS.get(proto.data_type, 32) // 8)
        layout[proto.name] = (offset, length)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.data"), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        end = offset + length
    return layout


def write_data(file: BinaryIO, built: Built) -> str:
    """Fills `model.data` tile by tile, and returns its sha256. Equal weights give equal bytes.

    One tile is hashed while it is written and the next one computed. Raises InputError for weights that are NaN or
    infinite: every answer of such a graph would be NaN, and would pass as right.
    """
    digest, end = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as other:
        hashed = other.submit(digest.update, b"")

        def write(data) -> int:
            nonlocal hashed
            hashed.result()
            hashed = other.submit(digest.update, data)
            return file.write(data)

        for name, (offset, length) in built.layout.items():
            end += write(bytes(offset - end))
            written = sum(write(expect_finite(name, tile).data.cast("B")) for tile in built.tiles[name]())
            if written != length:
                raise ValueError(f"{name} has {written} bytes, the graph says {length}")
            end += written
    return digest.hexdigest()


def expect_finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array, contiguous. Raises InputError if it holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise InputError(f"{name} holds {count} numbers that are NaN or infinite, so nothing computed from it "
                         "is right; take weights that are whole")  # fmt: skip
    return np.ascontiguousarray(array)
