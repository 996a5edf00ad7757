"""The picture of an attribution: a heat map in SVG, with a row for each layer and a column for each module.

The colours are logarithmic. The file needs nothing else: no script, no font, no network. The figures of a tensor appear
where the pointer rests.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from golden.cost.attribution import Attribution, Share
from refimpl.errors import InputError, visible
from refimpl.files import write_whole

CELL, ROW, LEFT, TOP = 96, 22, 84, 92  # pixels: a cell's width, a row's height, the margins
STOPS = ((255, 250, 235), (253, 190, 110), (222, 74, 56), (94, 10, 60))  # colours from little to much
STEPS = 24  # of the scale below the map
STYLE = "text{font:12px sans-serif}.title{font-size:15px;font-weight:600}"


def write_svg(found: Attribution, path: str | Path) -> None:
    """Writes the picture to a file, whole or not at all. Raises InputError if it cannot be written."""
    write_whole(expect_svg(path), svg(found))


def expect_svg(path: str | Path) -> Path:
    """The path of a picture. Raises InputError if its suffix is not .svg, or its folder does not exist."""
    if Path(path).suffix.lower() != ".svg":
        raise InputError(f"the picture is SVG; call {path} something that ends in .svg")
    if not Path(path).parent.is_dir():
        raise InputError(f"cannot write {path}: {Path(path).parent} is not a folder; make it first")
    return Path(path)


def svg(found: Attribution) -> str:
    """The picture as text."""
    inside: dict[tuple[int, str], Share] = {}
    outside = []
    for share in found.shares:
        if share.name.startswith("model.layers."):
            number, module = share.name.removeprefix("model.layers.").split(".", 1)
            inside[int(number), module] = share
        else:
            outside.append(share)
    layers, modules = sorted({layer for layer, _ in inside}), list(dict.fromkeys(module for _, module in inside))
    heat = Heat(found.shares)
    drawn = [
        _label(8, 22, "KL divergence that each tensor adds alone, in nats", 'class="title"'),
        _label(8, 42, found.summary),
    ]
    for i, module in enumerate(modules):
        short = module.removeprefix("self_attn.").removeprefix("mlp.")
        drawn.append(_label(LEFT + i * CELL + CELL / 2 - 1, TOP - 8, short, 'text-anchor="middle"'))
    for i, layer in enumerate(layers):
        drawn.append(_label(LEFT - 8, TOP + i * ROW + 14, f"layer {layer}", 'text-anchor="end"'))
    for (layer, module), share in inside.items():
        drawn.append(_cell(share, heat, modules.index(module), TOP + layers.index(layer) * ROW))
    bottom = TOP + len(layers) * ROW + (8 if outside and layers else 0)
    for i, share in enumerate(outside):
        drawn.append(_label(LEFT - 8, bottom + i * ROW + 14, share.name.removeprefix("model."), 'text-anchor="end"'))
        drawn.append(_cell(share, heat, 0, bottom + i * ROW))
    bottom += len(outside) * ROW + 16
    return _page([*drawn, *_scale(heat, bottom)], max(620, LEFT + max(1, len(modules)) * CELL + 16), bottom + 26)


class Heat:
    """From the KL of a share to a number from 0, the least, to 1, the most: logarithmic, over four powers of ten."""

    def __init__(self, shares: tuple[Share, ...]):
        values = [share.kl for share in shares if share.kl > 0] or [1.0]
        self.low, self.high = np.log(max(min(values), max(values) * 1e-4)), np.log(max(values))

    def of(self, share: Share) -> float:
        """The heat of one share."""
        if self.high <= self.low:
            return 1.0
        return float(np.clip((np.log(max(share.kl, 1e-300)) - self.low) / (self.high - self.low), 0, 1))


def _page(drawn: list[str], width: int, height: int) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *drawn, "</svg>\n"])


def _label(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(visible(text), quote=False)}</text>'


def _cell(share: Share, heat: Heat, column: int, y: int) -> str:
    """The coloured box of a share, with its KL in it and all its figures under the pointer."""
    x, warmth = LEFT + column * CELL, heat.of(share)
    figures = f"{share.name}: KL {share.kl:.6f} ± {share.kl_error:.6f} nats, same top-1 {share.same_top:.2%}"
    ink = "#fff" if warmth > 0.6 else "#222"
    return (f'<g><title>{escape(visible(figures))}</title><rect x="{x}" y="{y}" width="{CELL - 2}" height="{ROW - 2}" '
            f'fill="{_colour(warmth)}"/><text x="{x + CELL / 2 - 1}" y="{y + 14}" fill="{ink}" '
            f'text-anchor="middle">{share.kl:.2g}</text></g>')  # fmt: skip


def _scale(heat: Heat, y: int) -> list[str]:
    """The colours from least to most, with their KLs."""
    drawn = [f'<rect x="{LEFT + i * 8}" y="{y}" width="8" height="10" fill="{_colour(i / (STEPS - 1))}"/>'
             for i in range(STEPS)]  # fmt: skip
    drawn.append(_label(LEFT - 8, y + 9, f"{np.exp(heat.low):.1g}", 'text-anchor="end"'))
    drawn.append(_label(LEFT + STEPS * 8 + 8, y + 9, f"{np.exp(heat.high):.1g} nats"))
    return drawn


def _colour(warmth: float) -> str:
    """Between STOPS, at 0 to 1."""
    place = warmth * (len(STOPS) - 1)
    i = min(int(place), len(STOPS) - 2)
    mixed = [a + (b - a) * (place - i) for a, b in zip(STOPS[i], STOPS[i + 1], strict=True)]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
