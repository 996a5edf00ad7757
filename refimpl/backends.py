"""What computes a model: NumPy, which defines what each operation means, or Numba, at the speed of memory.

NumPy computes every number format. Numba computes float32 and leaves the other formats to NumPy.

`numba` keeps activations in float32. `numba-int16` and `numba-int8` round them to integers, with a scale for each 32,
before they are multiplied by 4-bit blocks. Other engines do the same: it is faster for prompts, and adds an error that
the weights alone do not have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.errors import InputError
from refimpl_kernels.ops import DTYPES, NumPyOps

NAMES = ("numpy", "numba", "numba-int16", "numba-int8")
# With this many weights, one pass saves as much time as importing Numba and its kernels takes. Measured on a Zen 5
# core: the import takes 0.35 s, and a pass saves 4 ns for each 4-bit weight (11 ns in a prompt of 128 tokens).
# Compiling takes seconds more, but once only.
LARGE = 1 << 26


def choose(asked: str | None, weights: Mapping[str, Any]) -> str:
    """The backend that is asked for, else the one that REFIMPL_BACKEND names, else the one that suits the weights.

    Numba suits large matrices. NumPy has to convert blocks and 16-bit formats to float32 for every token, and float32
    products take Numba no longer than they take PyTorch.
    Raises InputError for an unknown name.
    """
    name = asked or os.environ.get("REFIMPL_BACKEND")
    if name:
        if name not in NAMES:
            raise InputError(f"the backend is {name!r}, expected one of {', '.join(NAMES)}")
        return name
    matrices = [w for n, w in weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight"]
    read_in_place = (
        w for w in matrices if "blocks" in dir(w) or np.dtype(getattr(w, "dtype", np.float64)).itemsize <= 4
    )
    return "numba" if sum(math.prod(w.shape) for w in read_in_place) >= LARGE else "numpy"


def ops(backend: str, dtype: str) -> NumPyOps:
    """The operations at a number format. Numba is imported here, when it is needed."""
    if backend != "numpy" and dtype == "float32":
        from refimpl_kernels.fast.ops import NumbaOps

        return NumbaOps(activations=backend.removeprefix("numba").removeprefix("-") or "float32")
    return NumPyOps(DTYPES[dtype])
