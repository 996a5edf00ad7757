"""Keys and values of the tokens so far: with them, a new token costs one row of attention instead of all rows."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

from refimpl.errors import InputError
from refimpl_kernels.formats.q8_rows import BLOCK, Q8Rows

UNIX = hasattr(mmap, "MAP_PRIVATE")
DTYPES = ("float32", "float16", "int8")  # the formats in which a cache may keep what a float32 run computes


def room(shape: tuple[int, ...], dtype: Any) -> Any:
    """Room for keys or values (B, K, S, D): an array, or Q8_0's blocks of 32 for int8.

    NumPy asks the system for huge pages of 2 MiB. With these, the first token of each head makes the system fill all of
    the head's room with zeros. That takes longer than all other work on a short prompt. The mapping here has pages of
    4 KiB.
    """
    if dtype == "int8":
        return Q8Rows(room(shape, np.int8), room((*shape[:-1], shape[-1] // BLOCK), np.float16))
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        # Private: what a forked child writes stays its own.
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if UNIX else mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            mapped.madvise(mmap.MADV_NOHUGEPAGE)
    except (OSError, OverflowError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(
            f"there is no memory for a cache of {nbytes / 1e9:.1f} GB: {said}; ask for fewer tokens"
        ) from None
    return np.frombuffer(mapped, dtype).reshape(shape)


def expect_dtype(dtype: str | None, head_dim: int) -> None:
    """Raises InputError for a dtype that a cache with heads of this size cannot keep. None: the dtype of the run."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"the cache's dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if dtype == "int8" and head_dim % BLOCK:
        raise InputError(
            f"an int8 cache keeps blocks of {BLOCK}, and head_dim {head_dim} is not a multiple; use float16"
        )


def no_cache(layer: int, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stands in for a cache when there is no past: attention sees only the new keys and values."""
    return key, value


def expect_fits(cache: Any, batch: int, layers: int, weights: Any) -> None:
    """Raises InputError unless a cache is one for `batch` sequences of a model, and empty or filled by that model."""
    if not isinstance(cache, KVCache):
        raise InputError(f"the cache is a {type(cache).__name__}, expected a KVCache; make one with new_cache({batch})")
    if (cache.batch, cache.layers) != (batch, layers):
        said = f"{cache.batch} sequences of {cache.layers} layers"
        raise InputError(f"the cache is for {said}, not for this call; make one with new_cache({batch})")
    if cache.length and cache.weights is not weights:
        raise InputError("the cache was filled by another model; each model needs one of its own: new_cache()")


class KVCache:
    """Room for `capacity` tokens of `batch` sequences, filled in place and handed out as views.

    `length` tokens are in it; `mask` (batch, length) says which of them are padding. The arrays (batch, K, capacity, D)
    are made when the first keys arrive, in their number format or in `dtype`. They take memory only as they are
    written. A narrower `dtype` rounds once, on writing, so that a token sees itself as later tokens will see it. A
    call that fails leaves the cache as it was, for `advance` comes last.
    """

    def __init__(self, layers: int, capacity: int, batch: int = 1, dtype: str | None = None):
        if capacity < 1 or batch < 1:
            raise InputError(f"a cache for {batch} sequences of {capacity} tokens; expected at least one of each")
        self.layers, self.capacity, self.batch, self.dtype = layers, capacity, batch, dtype
        self.length = 0
        self.weights: Any = None  # of the model that filled it
        self.mask = np.zeros((batch, 0), np.int64)
        self._pairs: list[tuple[Any, Any] | None] = [None] * layers

    def __call__(self, layer: int, key: np.ndarray, value: np.ndarray) -> tuple[Any, Any]:
        """Takes the new keys and values (B, K, T, D) of a layer; returns views of all of them, (B, K, S, D)."""
        batch, heads, tokens, dim = key.shape
        pair = self._pairs[layer]
        if pair is None or self.length == 0:
            expect_dtype(self.dtype, dim)
            shape = (batch, heads, self.capacity, dim)
            pair = self._pairs[layer] = room(shape, self.dtype or key.dtype), room(shape, self.dtype or value.dtype)
        if key.dtype != (pair[0].dtype if self.dtype is None else "float32"):
            raise InputError(f"the cache holds {pair[0].dtype}, but this call computes in {key.dtype}; use one dtype")
        stop = self.length + tokens
        for array, new in zip(pair, (key, value), strict=True):
            array[:, :, self.length : stop] = new
        return pair[0][:, :, :stop], pair[1][:, :, :stop]

    def __getitem__(self, layer: int) -> tuple[Any, Any]:
        """Views of a layer's keys and values, (B, K, length, D) each."""
        pair = self._pairs[layer]
        if pair is None or not self.length:
            raise InputError(f"layer {layer} of the cache is empty; run the model with it first")
        return pair[0][:, :, : self.length], pair[1][:, :, : self.length]

    def extended_mask(self, mask: np.ndarray | None, tokens: int) -> np.ndarray:
        """The mask (B, S) of the past and `tokens` more. Raises InputError if they do not fit.

        `mask` (B, S) covers both, as in transformers. None keeps the mask of the past, and none of the new tokens is
        padding.
        """
        if self.length + tokens > self.capacity:
            raise InputError(
                f"{self.length} tokens in the cache and {tokens} new ones exceed its capacity of {self.capacity}; "
                "ask for a larger one with new_cache(capacity=...) or feed fewer"
            )
        return np.pad(self.mask, ((0, 0), (0, tokens)), constant_values=1) if mask is None else mask

    def advance(self, mask: np.ndarray, weights: Any = None) -> None:
        """Makes the new tokens part of the past. `mask` (B, S) covers all of it; `weights` made the keys and values."""
        self.mask, self.length, self.weights = mask, mask.shape[1], weights
