"""Number formats of weights: one table, one dataclass, and matrices to and from blocks in any of them.

Each format's own file explains it, with a pair of functions over (n, b), n blocks of b weights:

    quantize(x, **options) -> {"codes": (n, b), "scales": (n, 1), …}
    dequantize(codes, scales, …) -> (n, b) float32

Here a matrix (O, I) is cut into blocks, and the parts are kept together. Where blocks lie along the rows (axis 1),
each part has O rows, so that rows can be read alone. bitsandbytes' blocks run through the flattened matrix (axis None).

>>> weight = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
>>> blocks = quantize(weight, "int4")
>>> blocks
Blocks int4 (2, 64), block_size 32, 5 bits a weight
>>> blocks.packed.shape, blocks.scales.shape, error_between(weight, dequantize(blocks))
((2, 32), (2, 2), rms 0.0319, at most 0.0664, relative 0.0549, 95.3% changed)
>>> smaller, error = transcode(blocks, "nf4", block_size=64)
>>> smaller, error
(Blocks nf4 (2, 64), block_size 64, 4.5 bits a weight, rms 0.0574, at most 0.143, relative 0.0982, 89.1% changed)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from refimpl_kernels.affine import expect_whole_blocks
from refimpl_kernels.formats import (
    dynamic8,
    fp4,
    int4,
    int8,
    lpbq,
    matmulnbits,
    mxfp4,
    nf4,
    nvfp4,
    q4_0,
    q4_1,
    q4_k,
    q8_0,
    qlinear4,
    qlinear8,
)
from refimpl_kernels.formats import search as numpy_search


@dataclass(frozen=True)
class Part:
    """Numbers that a format stores beside the codes: each has `dtype` here and `bits` in the engine's files.

    `every`: there is one for each "block" or "row", or for so many weights within a block. `limits`: the least and the
    largest, for integers.
    """

    dtype: str
    bits: float
    every: str | int = "block"
    optional: bool = False
    limits: tuple[int, int] | None = None


@dataclass(frozen=True)
class Format:
    """A row of the table: `module` has the pair of functions and packs codes, `parts` lie beside the codes."""

    module: ModuleType
    engine: str
    block_size: int | str  # the usual one
    block_sizes: Sequence[int] | None  # the only ones, or None for any
    parts: Mapping[str, Part]
    axes: Sequence[int | None] = (1,)
    whole_row: bool = False  # a row is one unit: its blocks share something
    code_dtype: str = "uint8"
    padded: bool = False  # an incomplete last block of a row is filled up

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]

    @cached_property
    def options(self) -> tuple[str, ...]:
        """The keywords that `quantize` takes for this format."""
        return tuple(k for k in inspect.signature(self.module.quantize).parameters if k not in ("x", "last", "backend"))


_SCALE, _HALF, _SIX_BITS = Part("float32", 32), Part("float16", 16), Part("uint8", 6, 32, limits=(0, 63))
_OF_ROW, _ZERO_POINT = Part("float32", 32, every="row"), Part("int8", 4, optional=True, limits=(-8, 7))
_ANY, _POWERS = None, (16, 32, 64, 128, 256)
# fmt: off
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(int4, "ONNX", 32, _ANY, {"scales": _SCALE, "zero_points": _ZERO_POINT}, axes=(1, 0, None)),
        Format(nf4, "bitsandbytes", 64, _ANY, {"scales": _SCALE}, axes=(None,)),
        Format(fp4, "bitsandbytes", 64, _ANY, {"scales": _SCALE}, axes=(None,)),
        Format(int8, "bitsandbytes", "channel", _ANY, {"scales": _OF_ROW}, whole_row=True, code_dtype="int8"),
        Format(q4_0, "llama.cpp", 32, (32,), {"scales": _HALF}),
        Format(q4_1, "llama.cpp", 32, (32,), {"scales": _HALF, "mins": _HALF}),
        Format(q4_k, "llama.cpp", 256, (256,),
               {"scales": _HALF, "dmins": _HALF, "sub_scales": _SIX_BITS, "sub_mins": _SIX_BITS}),
        Format(q8_0, "llama.cpp", 32, (32,), {"scales": _HALF}, code_dtype="int8"),
        Format(mxfp4, "llama.cpp", 32, (32,), {"scales": Part("uint8", 8, limits=(0, 254))}),
        Format(nvfp4, "llama.cpp", 16, (16,), {"scales": Part("uint8", 8, limits=(0, 126))}),
        Format(matmulnbits, "onnxruntime", 32, _POWERS,
               {"scales": _SCALE, "zero_points": Part("uint8", 4, optional=True, limits=(0, 15))}, padded=True),
        Format(lpbq, "AIMET", 64, _ANY,
               {"scales": Part("float64", 64, every="row"), "block_scales": Part("uint8", 4, limits=(1, 16))},
               whole_row=True),
        Format(qlinear8, "Baichuan", "channel", _ANY, {"scales": _OF_ROW}, whole_row=True, code_dtype="int8"),
        Format(qlinear4, "Baichuan", "channel", _ANY, {"scales": _OF_ROW}, whole_row=True),
    )
}
# fmt: on
NESTED = ("offset", "nested_scales", "nested_code")  # extras of a matrix whose scales are 8-bit numbers
WIDEST = 4096  # weights of bitsandbytes' widest block, which may be larger than the whole matrix
CHUNK = 1 << 16  # weights quantized at a time, so that intermediate arrays stay in the processor's cache
TABLES = ("code", "nested_code")  # constants of a format, not counted as memory


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix (O, I) in a format: the bytes of its codes, its `scales`, and the other parts of the format.

    axis 1: `packed` is (O, bytes a row), `scales` (O, blocks a row). axis None: both are vectors. axis 0: `packed` is
    as for axis 1, `scales` (blocks a column, I). `extra` has the parts that only some formats have.
    """

    format: str
    shape: tuple[int, int]
    block_size: int
    axis: int | None
    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        bits = round(self.bits_per_weight, 3)
        return f"Blocks {self.format} {self.shape}, block_size {self.block_size}, {bits:g} bits a weight"

    @property
    def codes(self) -> np.ndarray:
        """The codes (O, I) as small integers."""
        module, (rows, columns) = FORMATS[self.format].module, self.shape
        if self.axis is None:
            return module.unpack(self.packed.reshape(1, -1), rows * columns).reshape(self.shape)
        return module.unpack(self.packed, columns)

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The arrays beside the codes, by name."""
        zero_points = {} if self.zero_points is None else {"zero_points": self.zero_points}
        return {"scales": self.scales, **zero_points, **self.extra}

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take here."""
        return self.packed.nbytes + sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Memory per weight in bits, as the engine that defines the format stores it."""
        known = {**FORMATS[self.format].parts, "nested_scales": _SCALE, "offset": _SCALE}
        bits: float = 8 * self.packed.nbytes
        for name, part in self.parts.items():
            if name not in TABLES:
                bits += part.size * (8 if part.dtype == np.uint8 and name == "scales" else known[name].bits)
        return bits / (self.shape[0] * self.shape[1])

    def rows(self, rows: slice | np.ndarray) -> Blocks:
        """The blocks of some rows. Raises ValueError unless blocks lie along the rows."""
        if self.axis != 1:
            raise ValueError(f"the blocks of {self.format} are not made of whole rows; use dequantize(blocks, rows)")
        packed = self.packed[rows]
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        extra = {name: part[rows] for name, part in self.extra.items()}
        shape = (len(packed), self.shape[1])
        return replace(self, shape=shape, packed=packed, scales=self.scales[rows], zero_points=zero_points, extra=extra)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file; `from_arrays` reads them back with `header`."""
        return {"packed": self.packed, **self.parts}

    def header(self) -> dict[str, Any]:
        """Everything that is not an array, for JSON."""
        return {"format": self.format, "shape": list(self.shape), "block_size": self.block_size, "axis": self.axis}


def from_arrays(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Blocks:
    """The blocks that `header` and `arrays` describe.

    Raises ValueError for an unknown format, and for an array that is missing or unknown, has another size or dtype than
    the header implies (as when a file was cut short), or holds integers outside the format's limits.
    """
    name, shape, block_size, axis = (header[k] for k in ("format", "shape", "block_size", "axis"))
    form = format_named(name)
    template = _layout(form, tuple(shape), _fitting(form, tuple(shape), block_size, axis)[0], axis)
    if form.module in (nf4, fp4):
        template |= _nested_layout(template) if any(part in arrays for part in NESTED) else {}
        template |= {"code": ((16,), "float32")}
    arrays = dict(arrays)
    for part in {*TABLES, "offset"} & template.keys() & arrays.keys():
        if arrays[part].size == math.prod(template[part][0]):  # bitsandbytes has an offset in both shapes
            arrays[part] = arrays[part].reshape(template[part][0])
    for part, (size, dtype) in template.items():
        optional = part in TABLES or (part in form.parts and form.parts[part].optional)
        if part not in arrays:
            if optional:
                continue
            raise ValueError(f"{name} of {tuple(shape)} has no array {part!r}; it has {', '.join(arrays)}")
        found = arrays[part]
        if found.shape != size or found.dtype != dtype:
            raise ValueError(
                f"{part} of {name} {tuple(shape)} is {found.dtype} {found.shape}, expected {dtype} {size}; "
                "the file is cut short or was made for another shape"
            )
        limits = form.parts[part].limits if part in form.parts else None
        if limits and not limits[0] <= found.min() <= found.max() <= limits[1]:
            raise ValueError(
                f"{part} of {name} has numbers from {found.min()} to {found.max()}, expected {limits[0]} to {limits[1]}"
            )
    unknown = [part for part in arrays if part not in template]
    if unknown:
        raise ValueError(f"{name} has no part called {unknown[0]!r}; it has {', '.join(template)}")
    extra = {k: v for k, v in arrays.items() if k not in ("packed", "scales", "zero_points")}
    return Blocks(
        name, tuple(shape), block_size, axis, arrays["packed"], arrays["scales"], arrays.get("zero_points"), extra
    )


def layout(
    format: str,
    shape: tuple[int, ...],
    block_size: int | str | None = None,
    axis: int | None = None,
    symmetric: bool = True,
    double: bool = False,
) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """The header of a matrix (O, I) in blocks, and name -> (shape, dtype) of its arrays, before there are any weights.

    Raises ValueError for arguments that `quantize` refuses whatever the weights are.
    """
    form = format_named(format)
    axis, size, _ = _placed(form, shape, block_size, axis)
    arrays = _layout(form, shape, size, axis)
    if symmetric:
        arrays = {name: one for name, one in arrays.items() if name not in form.parts or not form.parts[name].optional}
    elif "symmetric" not in form.options:
        raise ValueError(f"{format} has no option 'symmetric'; its options: {', '.join(form.options) or 'none'}")
    if double:
        if format not in ("nf4", "fp4"):
            raise ValueError(f"{format} has no scales to quantize again; nf4 and fp4 with float32 scales have")
        arrays |= _nested_layout(arrays)
    header = {"format": format, "shape": list(shape), "block_size": size, "axis": axis}
    return header, {name: (size, np.dtype(dtype)) for name, (size, dtype) in arrays.items()}


def _nested_layout(arrays: Mapping[str, tuple]) -> dict[str, tuple]:
    """The layout of the arrays into which `nest` turns the scales."""
    count = arrays["scales"][0][0]
    groups = -(-count // dynamic8.BLOCK_SIZE)
    return {
        "scales": ((count,), "uint8"), "offset": ((), "float32"), "nested_scales": ((groups,), "float32"),
        "nested_code": ((len(dynamic8.VALUES),), "float32"),
    }  # fmt: skip


def format_named(name: str) -> Format:
    """A format's row of the table. Raises ValueError, which lists all formats, for an unknown one."""
    if name not in FORMATS:
        raise ValueError(f"the format is {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def quantize(
    weight: np.ndarray,
    format: str,
    block_size: int | str | None = None,
    axis: int | None = None,
    importance: np.ndarray | None = None,
    double: bool = False,
    backend: ModuleType = numpy_search,
    **options: Any,
) -> Blocks:
    """A float matrix (O, I) in blocks of a format.

    `block_size`: a number, "channel" (a row is a block) or "tensor" (INT4 only); by default the format's usual one.
    `axis`: 1, blocks along the rows, is the default; 0 is down the columns (INT4 only). `importance` (I,): what an
    error in each input column costs. It starts a search, of 16 scales unless `search` says otherwise (see search.py).
    `double`: 8-bit scales for NF4 and FP4. `backend`: the module that rounds formats with a search, `search` or its
    Numba twin; both give the same bytes. The other options are the keywords of the format's own `quantize`.

    Raises ValueError for an unknown format, axis or option, a block size that does not fit, a weight that is NaN or
    infinite, and a scale that the format cannot hold.
    """
    form = format_named(format)
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype.kind == "c":
        found = f"{weight.dtype} of shape {weight.shape}"
        raise ValueError(f"the weight is {found}, expected a matrix (O, I) of floats that is not empty")
    axis, block_size, unit = _placed(form, weight.shape, block_size, axis)
    unknown = [k for k in options if k not in form.options]
    if unknown or (importance is not None and "importance" not in form.options):
        known = ", ".join(form.options) or "none"
        raise ValueError(f"{format} has no option {(unknown or ['importance'])[0]!r}; its options: {known}")
    if importance is not None:
        options.setdefault("search", 16)
    tries = options.get("search", 0)
    if type(tries) is not int or tries < 0 or (importance is not None and not tries):
        raise ValueError(f"search is {tries!r}, expected how many scales to try, above 0 for importance to matter")
    with np.errstate(over="ignore"):
        x = np.asarray(weight, np.float32)
    if not np.isfinite(x).all():
        raise ValueError("a weight is NaN or infinite; no scale fits it")
    if importance is not None:
        importance = np.asarray(importance, np.float32)
        if importance.shape != weight.shape[1:] or not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise ValueError(
                f"importance has shape {importance.shape}, expected one number for each of {weight.shape[1]} columns, "
                "finite and not negative"
            )
        importance = _cut(np.broadcast_to(importance, weight.shape), unit, axis)
    if form.whole_row and "block_size" in form.options:
        options["block_size"] = block_size
    if "search" in form.options:
        options["backend"] = backend
    parts = _quantize_units(form, _cut(x, unit, axis), importance, weight.size % unit if axis is None else 0, options)
    if not all(np.isfinite(parts[part]).all() for part in parts if parts[part].dtype.kind == "f"):
        largest = float(np.abs(x).max())
        raise ValueError(f"a scale of {format} overflows for weights as large as {largest:.3g}; scale the layer down")
    return _assemble(form, weight.shape, block_size, axis, parts, double)


def _quantize_units(
    form: Format, units: np.ndarray, importance: np.ndarray | None, last: int, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The format's parts of units (n, b), made some at a time. The last unit has `last` weights, if that is not 0."""
    step = max(1, CHUNK // units.shape[1])
    found = []
    for start in range(0, len(units), step):
        if importance is not None:
            options["importance"] = importance[start : start + step]
        if last and start + step >= len(units) and form.module in (nf4, fp4):
            options["last"] = last
        with np.errstate(over="ignore", invalid="ignore"):  # the scale is infinite then, and refused
            found.append(form.module.quantize(units[start : start + step], **options))
    return {name: np.concatenate([parts[name] for parts in found]) for name in found[0]}


def _names(items) -> str:
    return f"its axes: {', '.join(map(str, items)) or 'none, its blocks run through the flattened matrix'}"


def _placed(
    form: Format, shape: tuple[int, ...], block_size: int | str | None, axis: int | None
) -> tuple[int | None, int, int]:
    """The axis, the block size as a number, and how many weights are quantized as one unit."""
    if axis is not None and (type(axis) is not int or not {axis, axis + 2} & {*form.axes}):
        raise ValueError(f"{form.name} has no axis {axis!r}; {_names(a for a in form.axes if a is not None)}")
    axis = None if block_size == "tensor" else form.axes[0] if axis is None else axis % 2
    return axis, *_fitting(form, shape, block_size, axis)


def _fitting(form: Format, shape: tuple[int, ...], block_size: int | str | None, axis: int | None) -> tuple[int, int]:
    """The block size as a number, and how many weights are quantized as one unit."""
    length = shape[0] * shape[1] if axis is None else shape[axis]
    size = form.block_size if block_size is None else block_size
    if form.whole_row and form.block_size == "channel" and size not in ("channel", length):
        raise ValueError(f"{form.name} has one scale a row; leave block_size at 'channel', not {size!r}")
    if size in ("channel", "tensor"):
        if (size == "channel") != (axis is not None) or (form.block_sizes and length not in form.block_sizes):
            raise ValueError(f"block_size {size!r} does not exist in {form.name}; use {form.block_size}")
        size = length
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
        raise ValueError(f"block_size is {size!r}, expected a positive number, 'channel' or 'tensor'")
    if form.block_sizes and size not in form.block_sizes:
        raise ValueError(
            f"block_size {size} does not exist in {form.name}; use {', '.join(map(str, form.block_sizes))}"
        )
    if axis is None and size > max(length, WIDEST):
        raise ValueError(f"block_size {size} is more than the {length} weights that there are; use {form.block_size}")
    if axis is not None and not form.padded:
        which, otherwise = "row" if axis == 1 else "column", "use another format for this matrix, or keep it"
        expect_whole_blocks(length, int(size), which, form.block_sizes or (), otherwise)
    return int(size), length if form.whole_row else int(size)


def _cut(x: np.ndarray, unit: int, axis: int | None) -> np.ndarray:
    """A matrix as units (n, unit). The last one of each row, or of the flattened matrix, is filled up with zeros."""
    lines = x.reshape(1, -1) if axis is None else np.moveaxis(x, axis, -1)
    missing = -lines.shape[1] % unit
    if missing:
        lines = np.pad(lines, ((0, 0), (0, missing)))
    return lines.reshape(-1, unit)


def _assemble(
    form: Format, shape: tuple[int, ...], block_size: int, axis: int | None, parts: dict[str, np.ndarray], double: bool
) -> Blocks:
    """Parts of units as `Blocks`: codes packed, and every part in rows again."""
    rows, columns = shape
    codes = parts.pop("codes")
    if axis is None:
        packed = form.module.pack(codes.reshape(1, -1)[:, : rows * columns]).reshape(-1)
        parts = {name: part.reshape(-1) for name, part in parts.items()}
    else:
        lines = codes.reshape(shape[1 - axis], -1)
        packed = form.module.pack(lines if axis == 1 else np.ascontiguousarray(lines.T))
        parts = {name: part.reshape(shape[1 - axis], -1) for name, part in parts.items()}
        if axis == 0:
            parts = {name: np.ascontiguousarray(part.T) for name, part in parts.items()}
    blocks = Blocks(
        form.name, (rows, columns), block_size, axis, packed, parts.pop("scales"), parts.pop("zero_points", None), parts
    )
    return nest(blocks) if double else blocks


def _layout(form: Format, shape: tuple[int, ...], block_size: int, axis: int | None) -> dict[str, tuple]:
    """name -> (shape, dtype) of the arrays of a matrix in blocks, from the format's row of the table."""
    rows, columns = shape
    lines, length = (1, rows * columns) if axis is None else (shape[1 - axis], shape[axis])
    blocks = -(-length // block_size)
    counts = {"block": blocks, "row": 1}
    found = {}
    for name, part in form.parts.items():
        count = counts[part.every] if isinstance(part.every, str) else length // part.every
        size = (count,) if axis is None else (lines, count) if axis == 1 else (count, lines)
        found[name] = (size, part.dtype)
    stored = 2 if axis is None else blocks * block_size if form.padded else columns  # two codes take one byte, or two
    row = form.module.pack(np.zeros((1, stored), form.code_dtype))
    packed = (-(-length * row.shape[1] // 2),) if axis is None else (rows, row.shape[1])
    return {"packed": (packed, str(row.dtype)), **found}


def nest(blocks: Blocks) -> Blocks:
    """NF4 or FP4 with 8-bit scales ("double quantization"), of a whole matrix: the offset is the mean of all scales."""
    if blocks.format not in ("nf4", "fp4") or "nested_scales" in blocks.extra:
        raise ValueError(f"{blocks!r} has no scales to quantize again; nf4 and fp4 with float32 scales have")
    parts = dynamic8.nest(blocks.scales)
    return replace(blocks, scales=parts.pop("scales"), extra={**blocks.extra, **parts})


def place(tile: Blocks, arrays: Mapping[str, np.ndarray], row: int, rows: int) -> None:
    """Writes a tile, which holds a matrix's rows from `row` on, into the arrays of the whole matrix of `rows` rows.

    `arrays`: as in `layout`. Scales of 8 bits belong to a whole matrix: make them afterwards, with `nest`. Where blocks
    run through the flattened matrix, or down its columns, every tile but the last needs a multiple of `tile_rows` rows.
    """
    for name, part in tile.arrays().items():
        start = row * len(arrays[name]) // rows  # exact where a tile begins with a block
        arrays[name][start : start + len(part)] = part


def tile_rows(format: str, in_features: int, block_size: int | None = None, axis: int | None = None) -> int:
    """The least number of rows that ends on a block and on a byte: a tile for `place` has a multiple of it."""
    form = format_named(format)
    if axis == 0:
        return block_size or int(form.block_size)
    if form.axes[0] is not None:
        return 1
    whole = int(np.lcm(block_size or int(form.block_size), 2))
    return whole // int(np.gcd(whole, in_features))


def dequantize(blocks: Blocks, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """The float32 matrix that the blocks stand for, or some of its rows (a slice or an array of row numbers)."""
    form = FORMATS[blocks.format]
    if rows is not None and not len(np.arange(blocks.shape[0])[rows]):
        return np.zeros((0, blocks.shape[1]), np.float32)
    if blocks.axis is None:
        return _dequantize_flat(form, blocks, slice(None) if rows is None else rows)
    if blocks.axis == 0:
        codes = np.ascontiguousarray(blocks.codes.T)
        parts = {name: part.T for name, part in blocks.parts.items()}
        whole = _dequantize_lines(form, blocks.block_size, codes, parts).T
        return np.ascontiguousarray(whole if rows is None else whole[rows])
    if rows is not None:
        blocks = blocks.rows(rows)
    stored = -(-blocks.shape[1] // blocks.block_size) * blocks.block_size if form.padded else blocks.shape[1]
    codes = form.module.unpack(blocks.packed, stored)
    values = _dequantize_lines(form, blocks.block_size, codes, blocks.parts)
    return values if stored == blocks.shape[1] else np.ascontiguousarray(values[:, : blocks.shape[1]])


def _dequantize_lines(form: Format, block_size: int, codes: np.ndarray, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    unit = codes.shape[1] if form.whole_row else block_size
    count = codes.size // unit
    units = {name: part.reshape(count, -1) for name, part in parts.items()}
    return form.module.dequantize(codes=codes.reshape(count, unit), **units).reshape(codes.shape)


def _dequantize_flat(form: Format, blocks: Blocks, rows: slice | np.ndarray) -> np.ndarray:
    """Some rows, where blocks run through the flattened matrix: each weight gets the scale of its block, as (k, 1)."""
    columns, extra = blocks.shape[1], dict(blocks.extra)
    wanted = np.arange(blocks.shape[0])[rows]
    if wanted.size and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + wanted.size)):
        first, end = int(wanted[0]) * columns, int(wanted[-1] + 1) * columns
        start = first // 2 * 2  # a byte holds two codes
        bytes_ = blocks.packed[start // 2 : -(-end // 2)] if form.code_dtype != "int8" else blocks.packed[first:end]
        codes = form.module.unpack(bytes_.reshape(1, -1), end - start)[0, first - start :]
        which = np.arange(first // blocks.block_size, -(-end // blocks.block_size))
        repeat = np.repeat(np.arange(len(which)), blocks.block_size)[first % blocks.block_size :][: end - first]
    else:
        elements = (wanted[:, None] * columns + np.arange(columns)).reshape(-1)
        pairs = form.module.unpack(blocks.packed[elements // 2].reshape(-1, 1), 2)
        codes = pairs[np.arange(len(elements)), elements % 2]
        which, repeat = np.unique(elements // blocks.block_size, return_inverse=True)
    scales = blocks.scales[which]
    if "nested_scales" in extra:
        scales = dynamic8.unnest(scales, which, **{name: extra.pop(name) for name in NESTED if name in extra})
    units = {"scales": scales[repeat][:, None]}
    if blocks.zero_points is not None:
        units["zero_points"] = blocks.zero_points[which][repeat][:, None]
    return form.module.dequantize(codes=codes[:, None], **units, **extra).reshape(-1, columns)


@dataclass(frozen=True)
class AddedError:
    """The error that a second quantization adds to the values of the first: exact differences, in float64."""

    rms: float
    max_abs: float
    relative: float  # rms over the rms of the values
    changed: float  # share of the values that are not the same float32

    def __repr__(self) -> str:
        return (
            f"rms {self.rms:.3g}, at most {self.max_abs:.3g}, relative {self.relative:.3g}, {self.changed:.1%} changed"
        )


def error_between(reference: np.ndarray, values: np.ndarray) -> AddedError:
    """How far `values` are from `reference`, of the same shape."""
    difference = values.astype(np.float64) - reference
    rms, size = (float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) for a in (difference, reference))
    relative = rms / size if size else 0.0
    return AddedError(rms, float(np.abs(difference).max()), relative, float(np.mean(difference != 0)))


def transcode(
    blocks: Blocks, format: str, block_size: int | str | None = None, **options: Any
) -> tuple[Blocks, AddedError]:
    """The same matrix in another format, and the error that this adds to the values of the blocks."""
    values = dequantize(blocks)
    recoded = quantize(values, format, block_size, **options)
    return recoded, error_between(values, dequantize(recoded))
