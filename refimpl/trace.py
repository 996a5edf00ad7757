"""A trace: the tensors of one run in computing order; and what a tap may do with each tensor.

NumPy, PyTorch with hooks, ONNX Runtime and a phone all end in a `Trace`. Comparing needs nothing else.

A tap is a function `tap(name, x) -> x`. The forward calls it on each tensor and goes on with what it returns. So one
mechanism records a run, replaces its values, quantizes them or breaks them on purpose:

>>> trace = Trace()
>>> tap = recording(trace, then=feeding({"b": 5.0}))
>>> tap("a", 1.0) + tap("b", 2.0)       # "b" goes on as 5.0, and what was computed, 2.0, is on record
6.0
>>> dict(trace)
{'a': 1.0, 'b': 2.0}
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from refimpl.errors import InputError

Tap = Callable[[str, Any], Any]


class Trace(dict):
    """An ordered mapping name -> array, in computing order, with `meta`: a JSON-like dict of where it came from."""

    def __init__(self, tensors: Mapping | Iterable = (), meta: dict | None = None):
        super().__init__(tensors)
        self.meta: dict = dict(meta or {})

    def __repr__(self) -> str:
        total = sum(getattr(array, "nbytes", 0) for array in self.values())
        return f"Trace({len(self)} tensors, {total / 1e6:.1f} MB, {self.meta})"


def prompt_of(ids: np.ndarray) -> list | str:
    """Token ids (B, T) as a trace's `meta["ids"]` has them: up to 512 in full, more as their sha256."""
    if ids.size <= 512:
        return ids.tolist()
    return f"{ids.shape} sha256 {hashlib.sha256(ids.astype('<i8').tobytes()).hexdigest()}"


def expect_same_prompt(a: Mapping, b: Mapping) -> None:
    """Raises InputError if two traces name different token ids. A trace that names none fits any other."""
    one, other = (getattr(side, "meta", {}).get("ids") for side in (a, b))
    if one is not None and other is not None and one != other:
        raise InputError(f"one trace is of the ids {one!s:.40}, the other of {other!s:.40}; run both on the same ids")


def silent(name: str, x):
    """The tap that only passes tensors on."""
    return x


def feeding(values: Mapping, then: Tap = silent) -> Tap:
    """Replaces each tensor that is in `values` by its value there, so that errors are not inherited.

    Raises InputError if the shapes differ, as those of a trace of another prompt do.
    """

    def tap(name, x):
        if name not in values:
            return then(name, x)
        value = values[name]
        shape, expected = getattr(value, "shape", ()), getattr(x, "shape", ())
        if shape != expected:
            raise InputError(f"the fed {name} has shape {shape}, this run's {expected}; feed a trace of the same ids")
        return then(name, value.astype(x.dtype) if hasattr(x, "astype") else value)

    return tap


def recording(trace: dict, pattern: str | None = None, then: Tap = silent) -> Tap:
    """Writes each tensor into `trace` as it was computed, and passes it on to `then`.

    `pattern` is a glob on names (`*.self_attn.*`); `None` records everything.
    """

    def tap(name, x):
        if pattern is None or fnmatch.fnmatchcase(name, pattern):
            trace[name] = x
        return then(name, x)

    return tap
