"""What an error in each input column of a matrix costs, from the activations of a text, in one pass.

An output of a linear is Σ_j w_j x_j. If columns are uncorrelated, an error e_j of the weights costs Σ_j e_j² E[x_j²].
So the importance of column j is the mean of x_j² over a text. A search for scales (`formats.search`) weighs errors with
it. llama.cpp keeps the same numbers in its imatrix, and AWQ scales columns by them.

**Source**: Lin 2023, "AWQ"; llama.cpp tools/imatrix.

>>> some = Importance({"lm_head": np.ones(4, np.float32)}, {"tokens": 7})
>>> some
Importance of 1 matrices, from 7 tokens
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.checkpoint.safetensors_files import map_safetensors
from refimpl.errors import InputError
from refimpl.files import write_safetensors
from refimpl.names import input_of
from refimpl.sweep import Pool, Result, sweep
from refimpl.windows import WINDOW, cut

if TYPE_CHECKING:
    from refimpl.forward import Forward

KIND = "importance of input columns: mean squares"


class Importance(dict):
    """A matrix's module -> the mean square of each of its inputs, (I,) float32. `meta` describes the text."""

    def __init__(self, columns: dict[str, np.ndarray], meta: dict[str, Any] | None = None):
        super().__init__(columns)
        self.meta: dict[str, Any] = dict(meta or {})

    def __repr__(self) -> str:
        return f"Importance of {len(self)} matrices, from {self.meta.get('tokens', '?')} tokens"

    def columns(self, name: str, count: int) -> np.ndarray:
        """The numbers of a matrix with `count` columns. Raises InputError unless there are `count` of them."""
        module = name.removesuffix(".weight")
        if module not in self:
            raise InputError(f"there is no importance of {module}; collect it from this model")
        if self[module].shape != (count,):
            found = self[module].shape
            raise InputError(f"importance of {module} has shape {found}, expected ({count},): it is of another model")
        return self[module]

    @property
    def sha256(self) -> str:
        """A digest of the numbers and the matrices that they belong to."""
        digest = hashlib.sha256()
        for module in sorted(self):
            digest.update(module.encode() + np.ascontiguousarray(self[module], "<f4").tobytes())
        return digest.hexdigest()


def observe_importance(
    model: Forward,
    ids,
    window: int = WINDOW,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Importance:
    """The importance of every linear's inputs over a text or its ids, window by window.

    Memory holds a few tensors of one window, and a float64 for each column. `executor`, `resume`: who computes the
    windows, and where finished ones are kept (`refimpl.sweep`). Raises InputError for ids outside the vocabulary, and
    if NaN or infinity is computed.
    """
    ids = model.token_ids(ids)[0]
    matrices = [n for n, w in model.weights.items() if len(w.shape) == 2 and n != "model.embed_tokens.weight"]
    inputs = {name.removesuffix(".weight"): input_of(name.removesuffix(".weight")) for name in matrices}
    wanted = tuple(sorted(set(inputs.values())))
    pieces = [(model, wanted, row, dtype) for row in cut(model, ids, window)]
    squares: dict[str, np.ndarray] = {}
    for found in sweep(sums_of_squares, pieces, "collecting importance", executor, resume):
        squares = {name: squares.get(name, 0.0) + found[name] for name in wanted}
    means = {name: (total / len(ids)).astype(np.float32) for name, total in squares.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise InputError(f"{name}: the text makes this NaN or infinite, so nothing says how important it is")
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    meta = {"family": model.config.family, "tokens": len(ids), "ids_sha256": digest, "window": window}
    return Importance({module: means[tap] for module, tap in inputs.items()}, meta)


def sums_of_squares(model: Forward, wanted: tuple[str, ...], ids: np.ndarray, dtype: str) -> Result:
    """The squares of some tensors (…, I) of one forward, summed over its tokens: name -> (I,) float64."""
    squares: dict[str, np.ndarray] = {}

    def tap(name, x):
        if name in wanted:
            wide = x.reshape(-1, x.shape[-1]).astype(np.float64)
            squares[name] = np.einsum("ti,ti->i", wide, wide)
        return x

    model.forward(ids, dtype, None, None, tap)
    return squares


def write_importance(path: str | Path, importance: Importance) -> None:
    """Writes a safetensors file, whole or not at all."""
    about = {"kind": KIND, **importance.meta}
    write_safetensors(Path(path), dict(sorted(importance.items())), {"about": json.dumps(about)})


def read_importance(path: str | Path) -> Importance:
    """The Importance in a file that `write_importance` has written. Raises InputError for any other file."""
    from safetensors import safe_open

    path = Path(path)
    columns = map_safetensors(path)
    with safe_open(path, framework="numpy") as file:
        about = (file.metadata() or {}).get("about", "")
    try:
        meta = json.loads(about)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or meta.pop("kind", None) != KIND:
        raise InputError(f"{path} holds no importance; make such a file with refimpl importance")
    for module, numbers in columns.items():
        if numbers.ndim != 1 or numbers.dtype != np.float32 or not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise InputError(f"{path}: {module!a:.99} is not a row of finite numbers from 0 on in float32")
    return Importance(columns, meta)
