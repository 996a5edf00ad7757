"""Which matrices become blocks of which number format: a recipe, and the blocks, tile by tile on all cores.

A recipe is the name of a format, for all linears, or a mapping of patterns to formats. The first pattern that matches a
module decides. A module stays unquantized if no pattern matches it, or if its pattern's format is None:

    "q4_0"
    {"lm_head": "q8_0", "*.mlp.*": {"format": "q4_k", "search": "mse"}, "*": "q4_0"}

The embedding is looked up, not multiplied, and stays unquantized. The head is quantized after NormHead, as it is used.
The formats of bitsandbytes follow the official code. Their bare names quantize only the matrices of the layers, which
are read as float16 before and after. NF4 and FP4 have scales of 8 bits. With LLM.int8, a linear quantizes its input,
too.

**Source**: `QLinear` and `quantize_online` in the official quantizer.py.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from refimpl import backends
from refimpl.blocks.importance import Importance
from refimpl.checkpoint.pages import read_ahead
from refimpl.checkpoint.weights import NormHead, QuantizedWeight, Weight, Weights, quantized_weight
from refimpl.errors import InputError, at_most
from refimpl.files import read_json
from refimpl_kernels import formats
from refimpl_kernels.formats import search as numpy_search
from refimpl_kernels.ops import Readable

TILE_ELEMENTS = 1 << 18  # elements that a thread reads and quantizes at a time: 1 MB of float32
TRIES = 16  # scales that a search for the least squared error tries in each block
EMBED = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Scheme:
    """The format that a matrix gets, of `refimpl_kernels.formats`, and its options. None is the format's default.

    `search`: how many scales to try for each block; "mse" tries 16, and 0 rounds to nearest. `symmetric`: False asks
    for zero points (INT4, MatMulNBits). `double`: scales of 8 bits (NF4 and FP4, where it is the default).

    >>> Scheme("int4", block_size=64, search="mse").to_json()
    {'format': 'int4', 'block_size': 64, 'search': 'mse'}
    """

    format: str
    block_size: int | str | None = None
    axis: int | None = None
    search: int | str | None = None
    symmetric: bool = True
    double: bool | None = None

    def __post_init__(self) -> None:
        try:
            form = formats.format_named(self.format if isinstance(self.format, str) else f"{self.format!r:.40}")
        except ValueError as error:
            raise InputError(f"{error}") from None
        if type(self.axis) not in (int, type(None)):
            raise InputError(f"the axis is {self.axis!r:.40}, expected 1, or 0 for blocks down the columns")
        for name, usual in (("symmetric", True), ("double", None)):
            if type(given := getattr(self, name)) is not bool and given is not usual:
                raise InputError(f"{name} is {given!r:.40}, expected true or false")
        if self.search is None:
            return
        if self.search != "mse" and (type(self.search) is not int or not 0 <= self.search <= 1000):
            raise InputError(f"search is {self.search!r:.40}, expected 'mse' or a number of scales to try, 0 to 1000")
        if self.search and "search" not in form.options:
            able = [name for name, other in formats.FORMATS.items() if "search" in other.options]
            raise InputError(f"{self.format} has no search for scales; {', '.join(able)} have")

    @classmethod
    def read(cls, value: Any) -> Scheme:
        """A scheme from a format's name or a JSON object. Raises InputError for any other."""
        if isinstance(value, cls):
            return value
        keys = {"format": value} if isinstance(value, str) else value
        known = [field.name for field in fields(cls)]
        if not isinstance(keys, Mapping) or "format" not in keys or set(keys) - set(known):
            raise InputError(f"the scheme is {value!r:.80}, expected a format's name, or some of {', '.join(known)}")
        return cls(**keys)

    def to_json(self) -> dict[str, Any]:
        """The options that are not the usual ones."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}

    @property
    def official(self) -> bool:
        """Whether it is a format of bitsandbytes, which quantizes float16 and reads back float16."""
        return formats.FORMATS[self.format].engine == "bitsandbytes"

    @property
    def nested(self) -> bool:
        """Whether the scales are numbers of 8 bits."""
        return self.format in ("nf4", "fp4") if self.double is None else self.double

    @property
    def takes_importance(self) -> bool:
        """Whether importance can matter: only a search for scales uses it."""
        return "importance" in formats.FORMATS[self.format].options and self.search != 0

    def layout(self, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, tuple]]:
        """See `formats.layout`."""
        return formats.layout(self.format, shape, self.block_size, self.axis, self.symmetric, self.nested)

    def quantize(
        self, values: np.ndarray, importance: np.ndarray | None, backend: ModuleType = numpy_search
    ) -> formats.Blocks:
        """A matrix, or some of its rows, in blocks. Scales of 8 bits need the whole matrix, and are made afterwards."""
        options: dict[str, Any] = {} if self.symmetric else {"symmetric": False}
        if self.search is not None and "search" in formats.FORMATS[self.format].options:
            options["search"] = TRIES if self.search == "mse" else self.search
        if self.takes_importance:
            options["importance"] = importance
        return formats.quantize(values, self.format, self.block_size, self.axis, backend=backend, **options)

    def tile_rows(self, shape: tuple[int, ...]) -> int:
        """How many rows a tile has: all of them if blocks run down the columns."""
        header, _ = self.layout(shape)
        flat = header["axis"] is None and formats.FORMATS[self.format].axes[0] is not None
        whole = shape[0] if flat else formats.tile_rows(self.format, shape[1], header["block_size"], header["axis"])
        return max(1, TILE_ELEMENTS // shape[1] // whole) * whole


Recipe: TypeAlias = "str | Scheme | Mapping[str, str | Scheme | Mapping[str, Any] | None]"


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a model: the `schemes` of the matrices that change, and the recipe itself, for JSON."""

    schemes: dict[str, Scheme]
    recipe: dict[str, Any]

    def provenance(self, importance: Importance | None) -> dict[str, Any]:
        """The entries of a manifest that say how the matrices were made."""
        about = None if importance is None else {**importance.meta, "sha256": importance.sha256}
        return {"recipe": self.recipe, "importance": about}


def plan(weights: Mapping[str, Any], recipe: Recipe, keep: Sequence[str] = (), **options: Any) -> Plan:
    """Which matrix gets which scheme. No weight is read. `options`: the fields of `Scheme`, if a recipe is one name.

    Raises InputError if a pattern matches nothing, or only what earlier patterns took, if a format or option is
    unknown, and if a matrix does not fit its format.
    """
    matrices = {n: w.shape for n, w in weights.items() if len(w.shape) == 2 and n != EMBED}
    rules: list[tuple[str, Scheme | None]] = [
        (pattern, None) for pattern in ([keep] if isinstance(keep, str) else keep)
    ]
    if isinstance(recipe, Mapping) and "format" not in recipe:
        if options:
            raise InputError(f"{next(iter(options))} goes with a format's name; a recipe's formats have their own")
        if not recipe:
            raise InputError("the recipe is empty; expected patterns and formats such as {'*': 'q4_0'}")
        for pattern, value in recipe.items():
            try:
                rules.append((pattern, None if value is None else Scheme.read(value)))
            except InputError as error:
                raise InputError(f"{pattern!r:.80}: {error}") from None
    else:
        given = {name: value for name, value in options.items() if value is not None}
        scheme = Scheme.read({**Scheme.read(recipe).to_json(), **given})
        rules.append(("model.layers.*" if scheme.official else "*", scheme))
    left, schemes = dict(matrices), {}
    for pattern, rule in rules:
        found = [name for name in left if _matches(name, pattern)]
        if not found:
            taken = [name for name in matrices if _matches(name, pattern)]
            first = f"{at_most(taken, 1)} is another pattern's already; the first that matches decides"
            every = f"they are called {at_most([name.removesuffix('.weight') for name in matrices], 3)}"
            raise InputError(f"{pattern!r:.80} matches no matrix{' that is left: ' + first if taken else '; ' + every}")
        for name in found:
            shape = left.pop(name)
            if rule is not None:
                schemes[name] = rule
                try:
                    rule.layout(shape)
                except (ValueError, TypeError) as error:
                    raise InputError(f"{name}: {error}") from None
    if not schemes:
        raise InputError("the recipe quantizes no matrix; give a format to at least one")
    ordered = {name: schemes[name] for name in weights if name in schemes}
    return Plan(ordered, {pattern: rule and rule.to_json() for pattern, rule in rules})


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def read_recipe(path: Any) -> dict[str, Any]:
    """A recipe from a JSON file of patterns and formats. Raises InputError for any other file."""
    return read_json(path, limit=1 << 20)


def quantize_weights(
    weights: Weights, recipe: Recipe, keep: Sequence[str] = (), importance: Importance | None = None, **options: Any
) -> Weights:
    """`weights` with matrices in blocks, as the recipe says. Modules that a glob in `keep` matches stay unquantized.

    `importance`: what an error in each input column costs (`refimpl.blocks.importance`), for the formats that search.
    Raises InputError for what `plan` refuses, importance of another model, and weights that are NaN or infinite.
    """
    planned = plan(weights, recipe, keep, **options)
    quantized: dict[str, QuantizedWeight] = {}
    with quantizing(weights, planned.schemes, importance) as blocks:
        for name in tqdm(planned.schemes, desc="quantizing", disable=None, leave=False):
            quantized[name] = quantized_weight(blocks(name))
    return weights.replace(quantized, planned.provenance(importance))


@contextmanager
def quantizing(
    weights: Mapping[str, Readable],
    schemes: Mapping[str, Scheme],
    importance: Importance | None = None,
    threads: int | None = None,
) -> Iterator[Any]:
    """A function name -> blocks, to be called in the order of `schemes`. It works on all cores, one matrix ahead.

    The blocks do not depend on the number of threads, because tiles depend only on the matrix's shape.
    """
    columns = _columns(weights, schemes, importance)
    backend: ModuleType = numpy_search
    if backends.choose(None, weights) != "numpy":
        from refimpl_kernels.fast import search as fast_search

        backend = fast_search
    order = list(schemes)
    running: dict[str, tuple[dict[str, np.ndarray], list]] = {}

    def start(name: str) -> None:
        weight, scheme = weights[name], schemes[name]
        if isinstance(weight, Weight):
            read_ahead(weight.array)
        _, arrays = replace(scheme, double=False).layout(weight.shape)
        whole = {part: np.empty(size, dtype) for part, (size, dtype) in arrays.items()}

        def fill(at: int) -> None:
            rows = slice(at, at + step)
            formats.place(_tile(weight, rows, scheme, columns.get(name), backend), whole, at, weight.shape[0])

        step = scheme.tile_rows(weight.shape)
        running[name] = whole, [pool.submit(fill, at) for at in range(0, weight.shape[0], step)]

    def blocks(name: str) -> formats.Blocks:
        at = order.index(name)
        for wanted in order[at : at + 2]:
            if wanted not in running:
                start(wanted)
        whole, tiles = running.pop(name)
        header, _ = schemes[name].layout(weights[name].shape)
        try:
            for one in tiles:
                one.result()
            made = formats.from_arrays(header, whole)
            return formats.nest(made) if schemes[name].nested else made
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None

    pool = ThreadPoolExecutor(threads or _cores())
    try:
        yield blocks
    finally:
        pool.shutdown(cancel_futures=True)


def _tile(
    weight: Any, rows: slice, scheme: Scheme, importance: np.ndarray | None, backend: ModuleType
) -> formats.Blocks:
    if isinstance(weight, NormHead):  # of these rows alone; else each thread would first compute all lengths
        weight, rows = NormHead(weight.array[rows]), slice(None)
    with np.errstate(over="ignore"):  # an infinite weight is refused, in words
        values = weight.read(np.dtype(np.float16 if scheme.official else np.float32), rows)
    if scheme.official and np.isinf(values).any() and np.isfinite(weight.read(np.dtype(np.float32), rows)).all():
        raise ValueError(
            f"a weight is beyond 65504, the largest float16, which {scheme.format} rounds to first; use another format"
        )
    return scheme.quantize(values, importance, backend)


def _columns(
    weights: Mapping[str, Readable], schemes: Mapping[str, Scheme], importance: Importance | None
) -> dict[str, np.ndarray]:
    """The importance of each matrix's columns, where a search asks for it."""
    if importance is None:
        return {}
    searched = [name for name, scheme in schemes.items() if scheme.takes_importance]
    if not searched:
        raise InputError("no format of the recipe searches for scales, so importance does nothing; leave it out")
    return {name: importance.columns(name, weights[name].shape[1]) for name in searched}


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
