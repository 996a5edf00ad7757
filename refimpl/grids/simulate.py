"""The model as a quantized device computes it: the same forward, whose taps quantize and dequantize.

The decoder does not change. Three things differ. The tap puts each tensor on its grid before anything else sees it.
`SimulatedWeight` reads as values of its grid. `SimulatedOps` puts tensors that no tap shows on grids that follow from
the others: sigmoid's output on [0, 1], scores + mask on the sum of both ranges, and RoPE's products with cos and
sin on the range of the tensor that is turned. The mask is clipped to its range, so that a number such as -50, not minus
infinity, hides a key.

Two things are not quantized. The inside of an RMSNorm is one operation on a device. And q kᵀ before its scale stands on
the grid of the scores, except for a constant factor.

Sums are float32, as in AIMET's simulation, so their last bits depend on the order in which a BLAS adds. With
`integer=True`, the codes themselves are multiplied and summed exactly, and scaled once. Then every bit is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np

from refimpl.cache import KVCache
from refimpl.checkpoint.weights import KEEP_ELEMENTS
from refimpl.config import Config
from refimpl.decoder import Decoder
from refimpl.errors import InputError
from refimpl.forward import Forward
from refimpl.grids.encodings import COS, MASK, SIN, Encodings, Float16, Grid, feature_grids, grid_of
from refimpl.trace import Tap, silent
from refimpl_kernels.affine import Encoding, Rounding, fake_quantize, from_range, integers
from refimpl_kernels.ops import TILE_BYTES, NumPyOps, Readable


class Simulated(Forward):
    """A forward whose tensors stand on grids. It takes config, weights and decoder from `plain`."""

    def __init__(self, plain: Forward, encodings: Encodings, rounding: Rounding = "away", integer: bool = False):
        if rounding not in get_args(Rounding):
            raise InputError(f"rounding is {rounding!r}, expected {' or '.join(get_args(Rounding))}")
        encodings.check(plain.config, plain.weights)
        self.encodings, self.rounding, self.integer = encodings, rounding, integer
        simulated = {
            name: SimulatedWeight(plain.weights[name], encoding, rounding, input_grid(encodings, plain.config, name))
            for name, encoding in encodings.parameters.items()
            if not name.endswith(".bias")
        }
        super().__init__(
            plain.config, plain.weights.replace(simulated), plain.folder, "numpy", decoder_class=plain.decoder_class
        )

    def decoder(self, ops: NumPyOps, tap: Tap, cache: KVCache | None) -> Decoder:
        """The decoder with operations and a tap that quantize; `tap` sees the quantized tensors."""
        simulated = self.operations(ops.dtype)
        return super().decoder(simulated, simulated.quantizing(then=tap), cache)

    def operations(self, dtype="float32") -> SimulatedOps:
        """The operations of one run, and with `quantizing()` its tap. A run may compute only a part of the model."""
        return SimulatedOps(dtype, self.encodings, self.config, self.rounding, self.integer)

    def position_tables(self, positions, dtype):
        """cos and sin on their grids."""
        tables = super().position_tables(positions, dtype)
        return tuple(self._input(name, x) for name, x in zip((COS, SIN), tables, strict=True))

    def attention_bias(self, mask, tokens, dtype):
        """The mask on its grid, which clips it."""
        return self._input(MASK, super().attention_bias(mask, tokens, dtype))

    def _input(self, name: str, x):
        encoding = self.encodings.activations.get(name)
        return x if x is None or encoding is None else on_grid(x, encoding, self.rounding)

    def new_cache(self, batch: int = 1, capacity: int | None = None, dtype: str | None = None) -> KVCache:
        """An empty cache. Raises InputError for a dtype that would round keys and values once more."""
        if dtype not in (None, "float32"):
            raise InputError(f"the cache's dtype is {dtype!r}, but a simulation keeps keys and values on its grids")
        return super().new_cache(batch, capacity)


class SimulatedOps(NumPyOps):
    """The operations on values that stand on grids. One object serves one forward, because its tap notes the grids.

    `grids`: the last part of a tap's name -> the grid of the latest tensor with that name, None if it has no grid.
    """

    def __init__(self, dtype, encodings: Encodings, config: Config, rounding: Rounding = "away", integer: bool = False):
        super().__init__(dtype)
        self.encodings, self.config, self.rounding, self.integer = encodings, config, rounding, integer
        self.grids: dict[str, Grid | None] = {}
        self.keys_next = False  # whether RoPE has turned a layer's queries and not yet its keys

    def quantizing(self, then: Tap = silent) -> Tap:
        """The tap that puts each tensor on its grid, and passes it on to `then`."""

        def tap(name, x):
            self.grids[name.rpartition(".")[2]] = grid_of(self.encodings, self.config, name)
            return then(name, on_grids(x, feature_grids(self.encodings, self.config, name), self.rounding))

        return tap

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """The sigmoid of x, on a grid over [0, 1] with as many bits as the gate's."""
        gate, y = self.grids.get("gate_proj"), super().sigmoid(x)
        return on_grid(y, from_range(0.0, 1.0, gate.bits), self.rounding) if isinstance(gate, Encoding) else y

    def softmax(self, x: np.ndarray) -> np.ndarray:
        """The softmax of scores + mask, which are first put on a grid that holds any sum of the two."""
        scores, mask = self.grids.get("scores"), self.encodings.activations.get(MASK)
        if isinstance(scores, Encoding) and isinstance(mask, Encoding):
            both = from_range(scores.low + mask.low, scores.high + mask.high, scores.bits)
            x = on_grid(x, both, self.rounding)
        return super().softmax(x)

    def split(self, x: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """The pieces, as usual. Two halves are RoPE's, of the query first and then of the key: they become `Turned`."""
        pieces = super().split(x, sizes)
        if len(sizes) != 2:
            return pieces
        kind = "W_pack" if self.config.qkv_packed else "k_proj" if self.keys_next else "q_proj"
        self.keys_next = not self.keys_next
        grid = self.grids.get(kind)
        if not isinstance(grid, Encoding) or not isinstance(self.encodings.activations.get(COS), Encoding):
            return pieces
        largest = max(-float(grid.low), float(grid.high))
        product = from_range(-largest, largest, grid.bits)
        return [Turned.of(piece, product, self.rounding) for piece in pieces]

    def linear(self, x: np.ndarray, weight: Readable, bias: Readable | None = None) -> np.ndarray:
        """The product, as usual; or, with `integer`, exact sums of codes where both sides have codes."""
        if not (self.integer and isinstance(weight, SimulatedWeight) and isinstance(weight.input, Encoding)):
            return super().linear(x, weight, bias)
        if not isinstance(weight.encoding, Encoding):
            return super().linear(x, weight, bias)
        columns, size = weight.shape[1], weight.encoding.block_size
        a = self._integers(x.reshape(-1, columns), weight.input)
        out = np.empty((len(a), weight.shape[0]))
        step = max(1, TILE_BYTES // 8 // max(columns, len(a) * (columns // size if size else 1)))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            encoding = weight.encoding.rows(rows)
            w = self._integers(weight.weight.read(np.dtype(np.float32), rows), encoding)
            out[:, rows] = integer_product(a, w, encoding) * float(weight.input.scale)
        if bias is not None:
            out += bias.read(np.dtype(np.float64))
        return out.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The product of query and key."""
        return self._product(a, b, "query", "key")

    def weighted_sum(self, probs: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The product of probs and value."""
        return self._product(probs, value, "probs", "value")

    def _product(self, a: np.ndarray, b: np.ndarray, first: str, second: str) -> np.ndarray:
        grid_a, grid_b = self.grids.get(first), self.grids.get(second)
        if not (self.integer and isinstance(grid_a, Encoding) and isinstance(grid_b, Encoding)):
            return super().weighted_sum(a, b) if first == "probs" else super().matmul(a, b)
        sums = np.matmul(self._integers(a, grid_a), self._integers(b, grid_b))
        return (sums * (float(grid_a.scale) * float(grid_b.scale))).astype(b.dtype)

    def _integers(self, x: np.ndarray, encoding: Encoding) -> np.ndarray:
        """Codes as float64. Their sums are exact below 2^53, and a million products of 17 by 16 bits stay below it."""
        return integers(x, encoding, self.rounding).astype(np.float64)


class Turned(np.ndarray):
    """Half of a query or key, whose products with cos and sin are put on a grid."""

    grid: Encoding
    rounding: Rounding

    def __array_finalize__(self, source: Any) -> None:  # as NumPy calls it for copies in another format
        self.grid, self.rounding = getattr(source, "grid", None), getattr(source, "rounding", "away")  # type: ignore

    @classmethod
    def of(cls, x: np.ndarray, grid: Encoding, rounding: Rounding) -> Turned:
        """The same numbers, whose products will be put on this grid."""
        half = x.view(cls)
        half.grid, half.rounding = grid, rounding
        return half

    def __mul__(self, table: np.ndarray) -> np.ndarray:  # type: ignore[override]
        return on_grid(np.multiply(self.view(np.ndarray), table), self.grid, self.rounding)


@dataclass(frozen=True, eq=False)
class SimulatedWeight:
    """A parameter that reads as the values of its grid. `input`: the grid of what a linear multiplies it by."""

    weight: Readable
    encoding: Grid
    rounding: Rounding
    input: Grid | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, dtype: np.dtype, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """The values of these rows, rounded in float32 and then converted to `dtype`."""
        small = int(np.prod(self.shape)) <= KEEP_ELEMENTS
        return (self._kept[rows] if small else self._read(rows)).astype(dtype, copy=False)

    def _read(self, rows: slice | np.ndarray) -> np.ndarray:
        encoding = self.encoding.rows(rows) if isinstance(self.encoding, Encoding) else self.encoding
        return on_grid(self.weight.read(np.dtype(np.float32), rows), encoding, self.rounding)

    @cached_property
    def _kept(self) -> np.ndarray:
        return self._read(slice(None))


def on_grids(x: np.ndarray, grids: Sequence[tuple[int, Grid | None]], rounding: Rounding) -> np.ndarray:
    """x with its features on the grids that `refimpl.grids.encodings.feature_grids` gives them."""
    if len(grids) > 1:
        pieces = np.split(x, np.cumsum([count for count, _ in grids[:-1]]), -1)
        return np.concatenate([on_grids(p, [g], rounding) for p, g in zip(pieces, grids, strict=True)], -1)
    ((_, grid),) = grids
    return x if grid is None else on_grid(x, grid, rounding)


def on_grid(x: np.ndarray, encoding: Grid, rounding: Rounding) -> np.ndarray:
    """x rounded to the grid, in its own number format. The rounding is computed in float32, as the simulation says."""
    if isinstance(encoding, Float16):
        return x.astype(np.float16).astype(x.dtype)
    return fake_quantize(x, encoding, rounding).astype(x.dtype, copy=False)


def integer_product(a: np.ndarray, w: np.ndarray, encoding: Encoding) -> np.ndarray:
    """a (n, I) @ w (O, I).T of whole numbers, times the steps of w: (n, O) in float64.

    The sum over a row, or over each block of a row, is exact. In LPBQ, a block's integer scale is part of the sum.
    """
    if not encoding.block_size:
        return a @ w.T * encoding.scale
    size = encoding.block_size
    sums = np.matmul(a.reshape(len(a), -1, size).transpose(1, 0, 2), w.reshape(len(w), -1, size).transpose(1, 2, 0))
    if encoding.block_scale is None:
        return np.einsum("bno,ob->no", sums, encoding.scale)
    return np.einsum("bno,ob->no", sums, encoding.block_scale) * encoding.scale


def input_grid(encodings: Encodings, config: Config, parameter: str) -> Grid | None:
    """The grid of the input that a linear multiplies by this parameter; None without a grid or without a linear."""
    module = parameter.removesuffix(".weight")
    at, _, kind = module.rpartition(".")
    if kind == "lm_head":
        return encodings.activations.get("model.norm")
    layer = at.rpartition(".")[0]
    inputs = {
        **dict.fromkeys(config.qkv_modules, f"{layer}.input_layernorm"),
        "o_proj": f"{at}.context",
        "gate_proj": f"{layer}.post_attention_layernorm",
        "up_proj": f"{layer}.post_attention_layernorm",
        "down_proj": f"{at}.product",
    }
    return encodings.activations.get(inputs.get(kind, ""))
