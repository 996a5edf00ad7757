"""How much each tensor's quantization alone adds to the KL divergence: one perturbation at a time.

Of all tensors in which a model differs from its reference, one is put into the reference, and the rest stay as they
are. The stream before the tensor's layer is then the reference's, which is computed once; only what comes after runs
again. The tensors at the top are those that deserve more bits, or a better search for their scales.

Small perturbations add up, nearly: KL is quadratic in the logits' error, and errors of different tensors hardly know
of each other. Where the sum is far from the KL of the whole, they do.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from html import escape
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from golden.cost.quality import Quality, compared, joined, mean_and_error, quality
from refimpl.errors import InputError, at_most
from refimpl.model import Model
from refimpl.sweep import Pool, Result, sweep
from refimpl.windows import WINDOW, windows

PIECE = 128  # tokens whose logits are held at a time
TILE = 1 << 20  # weights that are compared at a time


@dataclass(frozen=True)
class Share:
    """What one tensor does alone: the mean KL in nats and its standard error, and how often the top token stays."""

    name: str
    kl: float
    kl_error: float
    same_top: float


@dataclass(frozen=True)
class Attribution:
    """The shares of all tensors that differ, in computing order, and the quality of the model with all of them."""

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
        """The tensors that cost most, a line each, and what all of them cost."""
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
        """The sum beside the whole."""
        return (f"alone, the {len(self.shares)} tensors add up to {self.total:.5f} nats; "
                f"together they cost {self.whole.kl_mean:.5f} ± {self.whole.kl_error:.5f}")  # fmt: skip

    def to_json(self) -> str:
        """All of it."""
        shares = [asdict(share) for share in self.shares]
        return json.dumps({"quality": self.whole.to_dict(), "tensors": shares}, ensure_ascii=False, allow_nan=False)

    def write_svg(self, path: str | Path) -> None:
        """The picture of `svg`, in a file of that suffix, whole or not at all. Raises InputError if it cannot be."""
        path = expect_svg(path)
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(svg(self), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None


def expect_svg(path: str | Path) -> Path:
    """A path that a picture can have. Raises InputError for another suffix, and in a folder that there is not."""
    if Path(path).suffix.lower() != ".svg":
        raise InputError(f"the picture is SVG; call {path} something that ends in .svg")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: {Path(path).parent} is no folder; make it first")
    return Path(path)


def attribute(
    model: Model,
    reference: Model,
    ids,
    window: int = WINDOW,
    dtype: str = "float32",
    executor: Pool | None = None,
    resume: str | Path | None = None,
) -> Attribution:
    """The share of every tensor in which `model` differs from `reference`, on a text or its ids.

    Memory holds the reference's streams of one window, and logits of a few tokens. `executor`, `resume`: who computes
    the pieces, and where finished ones are kept (`refimpl.sweep`). Raises InputError for models of different sizes,
    and if they do not differ.
    """
    names = differing(model, reference)
    groups = [tuple(group) for _, group in groupby(names, key=lambda name: _enters(name, reference))]
    whole = quality(model, reference, ids, window, dtype, executor, resume)
    rows = windows(reference, ids, window)
    pieces = [(model, reference, group, row, dtype) for row in rows for group in groups]
    found: list[list[Result]] = [[] for _ in groups]
    for i, result in enumerate(sweep(alone, pieces, "one tensor at a time", executor, resume)):
        found[i % len(groups)].append({name: result[name] for name in ("kl", "same_top")})
    _streams.cache_clear()
    shares = []
    for group, results in zip(groups, map(joined, found), strict=True):
        for name, kl, same in zip(group, results["kl"], results["same_top"], strict=True):
            shares.append(Share(name.removesuffix(".weight"), *mean_and_error(kl), float(same.mean())))
    return Attribution(tuple(shares), whole)


def differing(model: Model, reference: Model) -> list[str]:
    """The parameters whose values are not the same, in computing order. Raises InputError if none is."""
    shapes, others = ({name: weight.shape for name, weight in m.weights.items()} for m in (model, reference))
    if shapes != others:
        odd = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
        raise InputError(f"the models differ in the shapes of {at_most(odd, 3)}; only models of one shape can be mixed")
    names = [name for name in others if not _same(model.weights[name], reference.weights[name])]
    if not names:
        raise InputError("the models have the same weights; there is nothing to attribute")
    return sorted(names, key=lambda name: _enters(name, reference))


def _same(a, b) -> bool:
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    step = max(1, TILE * a.shape[0] // max(1, int(np.prod(a.shape))))
    tiles = (slice(start, start + step) for start in range(0, a.shape[0], step))
    wide = np.dtype(np.float32)
    return all(np.array_equal(a.read(wide, rows), b.read(wide, rows), equal_nan=True) for rows in tiles)


def _enters(name: str, model: Model) -> int:
    """The layer that a parameter belongs to: -1 for the embedding, the number of layers for what follows them."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2])
    return -1 if name == "model.embed_tokens.weight" else model.config.num_hidden_layers


def alone(model: Model, reference: Model, names: tuple[str, ...], ids: np.ndarray, dtype: str) -> Result:
    """The figures of each token of a window with each of some tensors of one layer: name -> (tensors, n) float64.

    Each tensor is `model`'s in an otherwise unchanged `reference`. See `golden.cost.quality.compared`.
    """
    layers, start = reference.config.num_hidden_layers, _enters(names[0], reference)
    streams = _streams(reference, tuple(ids.tolist()), dtype)
    runs = []
    for name in names:
        weights = reference.weights.replace({name: model.weights[name]})
        changed = Model(reference.config, weights, reference.folder, reference.backend)
        before = None if start < 0 else streams[start]
        stages = changed.stages(ids, dtype, start=max(start, 0), stream=before)
        *_, last = streams[-1], *islice(stages, layers - start)  # not the logits, which come in pieces
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
    """The stream (1, T, C) before each layer, and after the last."""
    return list(islice(model.stages(list(ids), dtype), model.config.num_hidden_layers + 1))


# --- the picture ------------------------------------------------------------------------------------------------------

CELL, ROW, LEFT, TOP = 96, 22, 84, 92
STOPS = ((255, 250, 235), (253, 190, 110), (222, 74, 56), (94, 10, 60))  # from little to much


def svg(found: Attribution) -> str:
    """A heat map of the KL that each tensor adds alone: a row for each layer, a column for each module.

    The colours are logarithmic. It is a file of its own: no script, no font, nothing from elsewhere; a tensor's
    figures appear where the pointer rests.
    """
    inside: dict[tuple[int, str], Share] = {}
    outside = []
    for share in found.shares:
        if share.name.startswith("model.layers."):
            layer, module = share.name.removeprefix("model.layers.").split(".", 1)
            inside[int(layer), module] = share
        else:
            outside.append(share)
    rows, columns = sorted({layer for layer, _ in inside}), list(dict.fromkeys(module for _, module in inside))
    values = [share.kl for share in found.shares if share.kl > 0] or [1.0]
    low, high = np.log(max(min(values), max(values) * 1e-4)), np.log(max(values))

    def cell(share: Share, column: int, y: int) -> str:
        heat = (np.log(max(share.kl, 1e-300)) - low) / (high - low) if high > low else 1.0
        heat = float(np.clip(heat, 0, 1))
        said = f"{share.name}: KL {share.kl:.6f} ± {share.kl_error:.6f} nats, same top-1 {share.same_top:.2%}"
        ink = "#fff" if heat > 0.6 else "#222"
        x = LEFT + column * CELL
        return (f'<g><title>{escape(said)}</title><rect x="{x}" y="{y}" width="{CELL - 2}" height="{ROW - 2}" '
                f'fill="{_colour(heat)}"/><text x="{x + CELL / 2 - 1}" y="{y + 14}" fill="{ink}" '
                f'text-anchor="middle">{share.kl:.2g}</text></g>')  # fmt: skip

    def label(x: float, y: float, text: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(text, quote=False)}</text>'

    drawn = [
        label(8, 22, "KL divergence that each tensor adds alone, in nats", 'class="title"'),
        label(8, 42, found.summary),
    ]
    for i, column in enumerate(columns):
        short = column.removeprefix("self_attn.").removeprefix("mlp.")
        drawn.append(label(LEFT + i * CELL + CELL / 2 - 1, TOP - 8, short, 'text-anchor="middle"'))
    for i, row in enumerate(rows):
        drawn.append(label(LEFT - 8, TOP + i * ROW + 14, f"layer {row}", 'text-anchor="end"'))
    drawn += [cell(share, columns.index(m), TOP + rows.index(layer) * ROW) for (layer, m), share in inside.items()]
    bottom = TOP + len(rows) * ROW + (8 if outside and rows else 0)
    for i, share in enumerate(outside):
        short = share.name.removeprefix("model.")
        drawn.append(label(LEFT - 8, bottom + i * ROW + 14, short, 'text-anchor="end"'))
        drawn.append(cell(share, 0, bottom + i * ROW))
    bottom += len(outside) * ROW + 16
    steps = 24
    for i in range(steps):
        drawn.append(f'<rect x="{LEFT + i * 8}" y="{bottom}" width="8" height="10" fill="{_colour(i / (steps - 1))}"/>')
    drawn.append(label(LEFT - 8, bottom + 9, f"{np.exp(low):.1g}", 'text-anchor="end"'))
    drawn.append(label(LEFT + steps * 8 + 8, bottom + 9, f"{np.exp(high):.1g} nats"))
    width, height = max(620, LEFT + max(1, len(columns)) * CELL + 16), bottom + 26
    style = "text{font:12px sans-serif}.title{font-size:15px;font-weight:600}"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f"<style>{style}</style>", ground, *drawn, "</svg>\n"])


def _colour(heat: float) -> str:
    """Between STOPS, at 0 to 1."""
    place = heat * (len(STOPS) - 1)
    i = min(int(place), len(STOPS) - 2)
    mixed = [a + (b - a) * (place - i) for a, b in zip(STOPS[i], STOPS[i + 1], strict=True)]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
