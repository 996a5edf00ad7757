"""Matrix products of a backward pass on all cores, with the same bits at any number of them.

A BLAS cuts a product by the number of its threads, and the last bits depend on the cut. So here it has one thread
(`one_thread`), and the cut is made outside, by the shapes alone: rows of the result in tiles, each computed as if it
were alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np

TILE = 256  # rows of a result that one thread computes at a time
WORTH = 1 << 21  # multiplications from which on waking a thread pays


@contextmanager
def one_thread() -> Iterator[None]:
    """NumPy's BLAS has one thread."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


@cache
def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep freed memory for the next step, in the whole process; without glibc, does nothing.

    A tape lets go of every activation, so each step would ask the system for new pages: 22,000 of them on the embedded
    model, which take a quarter of the step.
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (R, K) @ b (K, C) -> (R, C)."""
    out = np.empty((len(a), b.shape[1]), np.result_type(a, b))
    _in_tiles(lambda rows: np.matmul(a[rows], b, out=out[rows]), len(a), a.size * b.shape[1])
    return out


def transposed_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """aᵀ b: a (R, O), b (R, I) -> (O, I)."""
    return product(a.T, b)


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (B, K, R, D) @ b (B, K, D, S): head by head."""
    out = np.empty((*a.shape[:-1], b.shape[-1]), np.result_type(a, b))
    places = list(np.ndindex(a.shape[:-2]))

    def one(tile: slice) -> None:
        for place in places[tile]:
            np.matmul(a[place], b[place], out=out[place])

    _in_tiles(one, len(places), a.size * b.shape[-1], tile=1)
    return out


def _in_tiles(function: Callable[[slice], object], rows: int, work: int, tile: int = TILE) -> None:
    tiles = [slice(start, start + tile) for start in range(0, rows, tile)]
    if len(tiles) == 1 or work < WORTH or cores() == 1:
        for one in tiles:
            function(one)
    else:
        list(_pool().map(function, tiles))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), "gradients")


def cores() -> int:
    """The cores that this process may use, as many as Numba would."""
    said = os.environ.get("NUMBA_NUM_THREADS")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(said), allowed) if said and said.isdecimal() and int(said) else allowed
