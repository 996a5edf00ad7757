"""How fast each format's quantizer is, in million weights a second of a core: `python tests/bench_formats.py [FORMAT]`

Rows of a bfloat16 matrix are quantized by NumPy and by its Numba twin: rounded to nearest, with a search for the
scales of least squared error, and with importance. Seconds are those of the process, so that other work on the machine
matters little; the best of three. Without an argument: every format that has a twin.
"""

from __future__ import annotations

import sys
import time

import ml_dtypes
import numpy as np

from refimpl_kernels import formats
from refimpl_kernels.fast import search as fast_search
from refimpl_kernels.formats import search

ROWS, COLUMNS = 256, 4096
BACKENDS = {"NumPy": search, "Numba": fast_search}


def rate(weight: np.ndarray, name: str, **options) -> float:
    """Million weights a second."""
    formats.quantize(weight[:2], name, **options)  # compiled, if it has to be
    seconds = []
    for _ in range(3):
        start = time.process_time()
        formats.quantize(weight, name, **options)
        seconds.append(time.process_time() - start)
    return weight.size / min(seconds) / 1e6


def main() -> None:
    """Prints a table."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((ROWS, COLUMNS), np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    importance = rng.lognormal(size=COLUMNS).astype(np.float32)
    names = sys.argv[1:] or [name for name, form in formats.FORMATS.items() if "search" in form.options]
    ways = {"nearest": dict(search=0), "search": dict(search=16), "importance": dict(search=16, importance=importance)}
    print(f"{'':12}" + "".join(f"{way:>22}" for way in ways))
    print(f"{'':12}" + f"{'NumPy':>12}{'Numba':>10}" * len(ways))
    for name in names:
        rates = [rate(weight, name, backend=b, **way) for way in ways.values() for b in BACKENDS.values()]
        print(f"{name:12}" + "".join(f"{a:12.1f}{b:10.1f}" for a, b in zip(rates[::2], rates[1::2], strict=True)))


if __name__ == "__main__":
    main()
