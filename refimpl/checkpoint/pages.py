"""Advice to the operating system about a mapped file: fetch these bytes soon, or let them go."""

import mmap

import numpy as np


def read_ahead(array: np.ndarray) -> None:
    """Asks the system to fetch a mapped array from the disk. Page by page, reading takes several times as long.

    Where a system cannot be asked, or the array is not mapped, nothing happens.
    """
    _advise(array, getattr(mmap, "MADV_WILLNEED", None))


def let_go(array: np.ndarray) -> None:
    """Tells the system that a mapped array has been read. It then no longer counts as memory of this process."""
    _advise(array, getattr(mmap, "MADV_DONTNEED", None))


def _advise(array: np.ndarray, advice: int | None) -> None:
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    mapped = base.base.obj if isinstance(base.base, memoryview) else base.base
    if isinstance(mapped, mmap.mmap) and advice is not None and array.flags.c_contiguous and array.nbytes:
        start = array.ctypes.data - base.ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= 0 and start + array.nbytes <= len(mapped):
            mapped.madvise(advice, first, start + array.nbytes - first)
