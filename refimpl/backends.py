"""Who computes a model: NumPy, which says what each operation means, or Numba, at the speed of memory.

NumPy computes every number format. Numba computes float32; for the others, it too leaves the work to NumPy.

`numba` keeps activations as they are. `numba-int16` and `numba-int8` round them to integers, a scale for each 32, where
they meet 4-bit blocks, as other engines do: faster for prompts, and no longer what the weights alone say.
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
# From so many weights on, one pass saves what importing Numba and its kernels costs. Measured on a Zen 5 core: 0.35 s,
# and 4 ns for each 4-bit weight (11 ns in a prompt of 128 tokens). Compiling, once and for all, costs seconds more.
LARGE = 1 << 26


def choose(asked: str | None, weights: Mapping[str, Any]) -> str:
    """The backend that is asked for, else that of REFIMPL_BACKEND, else the one that suits the weights.

    Numba suits large matrices: blocks and 16-bit formats, which NumPy must convert to float32 for every token, and
    float32, whose products it computes no slower than PyTorch does.
    Raises InputError for a name that is not known.
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
