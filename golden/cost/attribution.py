"""Attribution: how much each tensor's quantization alone adds to the KL divergence.

One tensor at a time goes from the model into its reference; the reference's other tensors stay. The residual stream
before that tensor's layer is the reference's, which is computed once, so only the layers after it run again. The
tensors that cost most deserve more bits, or a better search for their scales.

The KLs of the tensors nearly add up, because KL is quadratic in the logits' error and the errors of different tensors
are nearly independent. Where their sum is far from the KL of the whole model, the errors depend on each other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby, islice

import numpy as np

from golden.cost.quality import Quality, compared, joined, mean_and_error, quality
from golden.cost.reading import AS_USUAL, Reading
from refimpl.errors import InputError, at_most
from refimpl.model import Model
from refimpl.sweep import Result
from refimpl.windows import WINDOW, windows

PIECE = 128  # tokens whose logits are in memory at a time
TILE = 1 << 20  # weights that are compared at a time


@dataclass(frozen=True)
class Share:
    """What one tensor costs alone: the mean KL in nats, its standard error, and how often the top token stays."""

    name: str
    kl: float
    kl_error: float
    same_top: float


@dataclass(frozen=True)
class Attribution:
    """The shares of all tensors that differ, in computing order, and the quality of the whole model."""

    shares: tuple[Share, ...]
    whole: Quality

    @property
    def worst(self) -> list[Share]:
        """The shares, the largest KL first."""
        return sorted(self.shares, key=lambda share: -share.kl)

    @property
    def total(self) -> float:
        """The sum of the mean KLs."""
        return sum(share.kl for share in self.shares)

    def table(self, limit: int = 20) -> str:
        """A line for each of the tensors that cost most, and one for all of them."""
        width = max(len(share.name) for share in self.worst[:limit])
        lines = [f"{'this tensor alone':{width}}  {'KL, nats':19}  of the sum  same top-1"]
        for share in self.worst[:limit]:
            part = share.kl / self.total if self.total else 0.0
            lines.append(f"{share.name:{width}}  {share.kl:.5f} ± {share.kl_error:.5f}  {part:10.1%}  "
                         f"{share.same_top:10.2%}")  # fmt: skip
        if len(self.shares) > limit:
            lines.append(f"and {len(self.shares) - limit} more of smaller KL")
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """The sum of the shares beside the cost of the whole."""
        return (f"alone, the {len(self.shares)} tensors add up to {self.total:.5f} nats; "
                f"together they cost {self.whole.kl_mean:.5f} ± {self.whole.kl_error:.5f}")  # fmt: skip

    def to_json(self) -> str:
        """Everything as JSON."""
        shares = [asdict(share) for share in self.shares]
        return json.dumps({"quality": self.whole.to_dict(), "tensors": shares}, ensure_ascii=False, allow_nan=False)


def attribute(
    model: Model,
    reference: Model,
    ids,
    reading: Reading = AS_USUAL,
) -> Attribution:
    """The share of every tensor in which `model` differs from `reference`, on a text or its ids.

    Memory holds the reference's residual streams of one window and the logits of a few tokens. Raises InputError for
    models of different sizes, and if their weights are the same.
    """
    reading = replace(reading, window=reading.window_or(WINDOW))  # no cache: attention's scores grow with the square
    names = differing(model, reference)
    groups = [tuple(group) for _, group in groupby(names, key=lambda name: _enters(name, reference))]
    whole = quality(model, reference, ids, reading)
    rows = windows(reference, ids, reading.window)
    pieces = [(model, reference, group, row, reading.dtype) for row in rows for group in groups]
    found: list[list[Result]] = [[] for _ in groups]
    for i, result in enumerate(reading.each(alone, pieces, "one tensor at a time")):
        found[i % len(groups)].append({name: result[name] for name in ("kl", "same_top")})
    _streams.cache_clear()
    shares = []
    for group, results in zip(groups, map(joined, found), strict=True):
        for name, kl, same in zip(group, results["kl"], results["same_top"], strict=True):
            shares.append(Share(name.removesuffix(".weight"), *mean_and_error(kl), float(same.mean())))
    return Attribution(tuple(shares), whole)


def differing(model: Model, reference: Model) -> list[str]:
    """The names of the parameters whose values differ, in computing order. Raises InputError if none differs."""
    shapes, others = ({name: weight.shape for name, weight in m.weights.items()} for m in (model, reference))
    if shapes != others:
        odd = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
        raise InputError(
            f"the models differ in the shapes of {at_most(odd, 3)}; only models of the same sizes can be mixed"
        )
    names = [name for name in others if not _same(model.weights[name], reference.weights[name])]
    if not names:
        raise InputError("the models have the same weights, so there is nothing to attribute; give --format or another "
                         "checkpoint")  # fmt: skip
    return sorted(names, key=lambda name: _enters(name, reference))


def _same(a, b) -> bool:
    """Whether two weights have the same values, compared tile by tile."""
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    step = max(1, TILE * a.shape[0] // max(1, int(np.prod(a.shape))))
    tiles = (slice(start, start + step) for start in range(0, a.shape[0], step))
    wide = np.dtype(np.float32)
    return all(np.array_equal(a.read(wide, rows), b.read(wide, rows), equal_nan=True) for rows in tiles)


def _enters(name: str, model: Model) -> int:
    """The layer of a parameter: -1 for the embedding; the number of layers for the last norm and the head."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2])
    return -1 if name == "model.embed_tokens.weight" else model.config.num_hidden_layers


def alone(model: Model, reference: Model, names: tuple[str, ...], ids: np.ndarray, dtype: str) -> Result:
    """The figures of each token of a window, for each of these tensors of one layer: name -> (tensors, n) float64.

    For each, that tensor alone is `model`'s and the others are `reference`'s. See `golden.cost.quality.compared`.
    """
    layers, start = reference.config.num_hidden_layers, _enters(names[0], reference)
    streams = _streams(reference, tuple(ids.tolist()), dtype)
    runs = []
    for name in names:
        weights = reference.weights.replace({name: model.weights[name]})
        changed = Model(reference.config, weights, reference.folder, reference.backend)
        before = None if start < 0 else streams[start]
        stages = changed.stages(ids, dtype, start=max(start, 0), stream=before)
        *_, last = streams[-1], *islice(stages, layers - start)  # without the logits, which are computed in pieces
        runs.append((changed, last))
    found = []
    for begin in range(0, len(ids) - 1, PIECE):
        end = min(begin + PIECE, len(ids) - 1)
        right = reference.head(streams[-1][:, begin:end], dtype)[0]
        following = ids[begin + 1 : end + 1]
        rows = [compared(changed.head(last[:, begin:end], dtype)[0], right, following) for changed, last in runs]
        found.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return joined(found)


@lru_cache(maxsize=1)
def _streams(model: Model, ids: tuple[int, ...], dtype: str) -> list[np.ndarray]:
    """The residual stream (1, T, C) before each layer and after the last one."""
    return list(islice(model.stages(list(ids), dtype), model.config.num_hidden_layers + 1))
