"""Which tensor of a model stands on which grid."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from refimpl.checkpoint.weights import Weights
from refimpl.config import Config
from refimpl.errors import InputError, near
from refimpl.names import taps
from refimpl_kernels.affine import Encoding, for_weight, from_range

MASK, COS, SIN = INPUTS = "attention_mask", "position_ids_cos", "position_ids_sin"  # as export calls them
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TILE_ELEMENTS = 4 << 20  # elements of a weight that are read at a time


@dataclass(frozen=True)
class Float16:
    """Stands for an `Encoding` where a tensor is kept as a 16-bit float."""

    bits: int = 16


Grid: TypeAlias = Encoding | Float16


@dataclass(frozen=True)
class Encodings:
    """The grids of a model. A tensor in neither mapping is not quantized.

    `activations`: a tap's name, or an input's (`attention_mask`, `position_ids_cos`, `position_ids_sin`) -> its grid.
    `parameters`: a weight's name -> its grids.
    """

    activations: Mapping[str, Grid]
    parameters: Mapping[str, Grid] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.activations) + len(self.parameters)

    def __iter__(self) -> Iterator[str]:
        yield from self.activations
        yield from self.parameters

    def __getitem__(self, name: str) -> Grid:
        return self.activations[name] if name in self.activations else self.parameters[name]

    def check(self, config: Config, weights: Mapping) -> Encodings:
        """These encodings, if names and counts fit a model. Raises InputError if they do not."""
        shapes = {name: weights[name].shape for name in weights}
        known = {*taps(config), *INPUTS}
        for name, where in [(n, known) for n in self.activations] + [(n, set(shapes)) for n in self.parameters]:
            if name not in where:
                raise InputError(f"there is an encoding for {name!a:.99}, which this model lacks{near(name, where)}")
        for name in self:
            encoding = self[name]
            if isinstance(encoding, Encoding) and not name.endswith(".bias"):
                _check_counts(name, encoding, shapes.get(name, ()))
                if encoding.bits > 16:
                    raise InputError(f"the encoding of {name} has {encoding.bits} bits, expected 2 to 16")
        return self

    def of(self, config: Config, weights: Mapping) -> Encodings:
        """These encodings without those of tensors that a model lacks."""
        known = {*taps(config), *INPUTS}
        return Encodings({name: e for name, e in self.activations.items() if name in known},
                         {name: e for name, e in self.parameters.items() if name in weights})  # fmt: skip

    def raised(self, pattern: str, bits: int, weights: Weights) -> Encodings:
        """These encodings, with at least `bits` for each name that the glob matches, over the same range.

        The grids of matrices are made anew from `weights`, which are the model's, in rows or blocks as before.
        Raises InputError if the glob matches nothing, or if bits is not a whole number from 2 to 16.
        """
        if not 2 <= bits <= 16:
            raise InputError(f"bits is {bits}, expected 2 to 16")
        matched = [name for name in self if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(f"no encoding is called {pattern!a:.99}{near(pattern, set(self))}")
        activations, parameters = dict(self.activations), dict(self.parameters)
        for name in matched:
            old = self[name]
            if isinstance(old, Float16) or old.bits >= bits:
                continue
            if old.scale.ndim:
                granularity = (old.block_size, old.block_scale is not None)
                parameters[name] = matrix_encoding(name, weights[name], bits, *granularity)
            else:
                new = from_range(old.low, old.high, bits, old.symmetric)
                (activations if name in activations else parameters)[name] = new
        return Encodings(activations, parameters)


def moves_data(config: Config, kind: str) -> bool:
    """Whether a tap shows another tensor's values in another order. It then stands on that tensor's grid.

    Without RoPE, queries are such a tap. v_proj is one, too: its output is the values, which have their own grid.
    """
    return kind == "v_proj" or (kind == "query" and not config.rope_theta)


def feature_grids(encodings: Encodings, config: Config, tap: str) -> list[tuple[int, Grid | None]]:
    """The grids of a tap's features, and how many features stand on each; -1 is all.

    W_pack has up to three grids. Its values, and without RoPE its keys, are only moved to become `value` and `key`, so
    they stand on those grids from the start: moving data is no reason to round it twice. (A device computes W_pack as
    three linears.)
    """
    own, (at, _, kind) = encodings.activations.get(tap), tap.rpartition(".")
    if kind != "W_pack":
        return [(-1, own)]
    width = config.num_key_value_heads * config.head_dim
    key = None if config.rope_theta else encodings.activations.get(f"{at}.key")
    value = encodings.activations.get(f"{at}.value")
    return [(config.num_attention_heads * config.head_dim, own), (width, key or own), (width, value or own)]


def grid_of(encodings: Encodings, config: Config, tap: str) -> Grid | None:
    """The grid that a tap's values stand on: its own, or that of the tensor it is cut from."""
    found = encodings.activations.get(tap)
    if found is None and tap.endswith(".query") and moves_data(config, "query"):
        at = tap.removesuffix("query")
        found = encodings.activations.get(at + config.qkv_modules[0])
    return found


def matrix_encoding(name: str, weight, bits: int, block_size: int | None = None, lpbq: bool = False) -> Encoding:
    """Symmetric grids for a parameter (O, I), read some rows at a time."""
    pieces = []
    for start in range(0, weight.shape[0], rows_at_a_time(weight)):
        rows = weight.read(np.dtype(np.float32), slice(start, start + rows_at_a_time(weight)))
        try:
            pieces.append(for_weight(rows, bits, block_size, lpbq))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
    scale, offset = (np.concatenate([getattr(p, part) for p in pieces]) for part in ("scale", "offset"))
    steps = np.concatenate([p.block_scale for p in pieces if p.block_scale is not None]) if lpbq else None
    return replace(pieces[0], scale=scale, offset=offset, block_scale=steps)


def weight_range(name: str, weight) -> tuple[float, float]:
    """The smallest and largest value of a parameter. Raises InputError if one is not finite."""
    low, high = np.inf, -np.inf
    for start in range(0, weight.shape[0], rows_at_a_time(weight)):
        rows = weight.read(np.dtype(np.float32), slice(start, start + rows_at_a_time(weight)))
        low, high = min(low, float(rows.min())), max(high, float(rows.max()))
        if not np.isfinite((low, high)).all():
            raise InputError(f"{name}: a weight is NaN or infinite; no scale fits it")
    return low, high


def rows_at_a_time(weight) -> int:
    """How many rows of a parameter are read at once, so that memory does not grow with its size."""
    return max(1, TILE_ELEMENTS // int(np.prod(weight.shape[1:])))


def _check_counts(name: str, encoding: Encoding, shape: tuple[int, ...]) -> None:
    """Raises InputError unless the encoding has a scale for the tensor, or one for each row or block of a matrix."""
    size, steps = encoding.block_size, encoding.block_scale
    rows: tuple[int, ...] = shape[:1] if len(shape) == 2 and encoding.scale.ndim else ()
    if size and (not rows or shape[1] % size):
        raise InputError(f"the encoding of {name} has block_size {size}, which does not divide rows of {shape}")
    blocks = (*rows, shape[1] // size) if size else rows
    expected = blocks if steps is None else rows
    for what, found, wanted in (
        ("scales", encoding.scale.shape, expected),
        ("offsets", encoding.offset.shape, expected),
        ("block scales", blocks if steps is None else steps.shape, blocks),
    ):
        if found != wanted:
            counts = (" x ".join(map(str, counted)) or "1" for counted in (found, wanted))
            raise InputError("the encoding of {} has {} {}, expected {} for {}".format(
                name, next(counts), what, next(counts), f"shape {shape}" if shape else "a tensor"))  # fmt: skip
