"""Arrays as pictures: plain SVG, in two languages, the same bytes each time.

    figures.heatmap(trace["model.layers.0.self_attn.probs"][0, 0], title=text(en="one head", zh="一个注意力头"))

Colours are CSS variables with a value in case a page sets none, so that a page may have a dark mode. The two ends of
`heatmap` are blue and orange, which people who are colour-blind can tell apart. Every picture has a title for screen
readers, and every mark says its number under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np

from refimpl.errors import visible

INK, FAINT, PAPER = "var(--ink, #222)", "var(--faint, #999)", "var(--paper, #fff)"
LOW, MIDDLE, HIGH = (33, 102, 172), (247, 247, 247), (201, 88, 10)  # blue, nearly white, orange
SERIES = tuple(
    f"var(--series-{i}, {colour})"
    for i, colour in enumerate(("#2166ac", "#c9580a", "#1b7f5c", "#8e5ab5", "#8a6d00", "#555555"))
)
WIDTH = 640  # of a picture, in pixels; a page may show it narrower
FONT = "font:12px system-ui,sans-serif"


@dataclass(frozen=True)
class Text:
    """A label in both languages."""

    en: str
    zh: str

    def of(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


def text(en: str, zh: str) -> Text:
    """A label in both languages."""
    return Text(en, zh)


Label: TypeAlias = str | Text


@dataclass(frozen=True)
class Figure:
    """A picture: `svg("en")` or `svg("zh")`. `draw` yields its marks in a language."""

    title: Label
    width: float
    height: float
    draw: Callable[[str], Iterator[str]]

    def svg(self, language: str = "en") -> str:
        """The picture as an `<svg>` element."""
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" style="{FONT};max-width:100%;height:auto">'
        title = said(self.title, language)
        shown = _words(self.width / 2, 16, self.title, language, "middle", "font-weight:600")
        return "\n".join([head, f"<title>{title}</title>", shown, *self.draw(language), "</svg>"])


def said(label: Label, language: str) -> str:
    """A label in a language, fit for markup."""
    return escape(visible(label.of(language) if isinstance(label, Text) else str(label)))


def heatmap(
    x: np.ndarray, rows: Sequence[Label] = (), columns: Sequence[Label] = (), title: Label = "",
    lowest: float | None = None, highest: float | None = None, numbers: bool | None = None,
) -> Figure:  # fmt: skip
    """A matrix (R, C) as coloured cells: white is 0, orange above it and blue below.

    `lowest`, `highest`: the values of the deepest colours; without them, the largest magnitude. `numbers`: write each
    value into its cell (default: where there is room).
    """
    x = np.asarray(x, np.float64)
    count, across = x.shape
    reach = float(np.abs(x).max()) or 1.0
    low, high = -reach if lowest is None else lowest, reach if highest is None else highest
    left = 12 + 8 * max([_length(label) for label in rows] + [0])
    top = 30 + (
        7 * max([_length(label) for label in columns] + [0]) if _crowded(columns, across) else 22 * bool(columns)
    )
    cell = min(44.0, (WIDTH - left - 8) / across)
    tall = max(min(cell, 26.0), 300 / count if cell * count > 300 else 0.0, 14.0 if rows else 2.0)
    written = cell >= 34 and tall >= 13 if numbers is None else numbers

    def draw(language: str) -> Iterator[str]:
        for j, label in enumerate(columns):
            at = left + (j + 0.5) * cell
            turned = f"rotate(-60 {_n(at)} {_n(top - 6)})" if _crowded(columns, across) else ""
            yield _words(at, top - 6, label, language, "start" if turned else "middle", turn=turned)
        for i in range(count):
            if i < len(rows):
                yield _words(left - 6, top + (i + 0.5) * tall + 4, rows[i], language, "end")
            for j in range(across):
                value = float(x[i, j])
                colour, dark = _colour(value, low, high)
                place = f'x="{_n(left + j * cell)}" y="{_n(top + i * tall)}" width="{_n(cell)}" height="{_n(tall)}"'
                where = _where(rows, i, columns, j, language)
                yield f'<rect {place} fill="{colour}"><title>{where}{value:.4g}</title></rect>'
                if written:
                    ink = "fill:#fff" if dark else "fill:#222"
                    yield _words(
                        left + (j + 0.5) * cell, top + (i + 0.5) * tall + 4, f"{value:.2g}", language, "middle", ink
                    )

    return Figure(title, left + across * cell + 8, top + count * tall + 8, draw)


def attention(probs: np.ndarray, tokens: Sequence[Label], title: Label = "") -> Figure:
    """The attention (T, S) of one head: who looks (down), and at whom (across), from 0 to 1."""
    return heatmap(probs, tokens, tokens, title, lowest=-1.0, highest=1.0, numbers=False)


def bars(values: Mapping[str, float] | Sequence[float], labels: Sequence[Label] = (), title: Label = "") -> Figure:
    """Numbers as bars from 0, one below the other, each with its number."""
    names: list[Label] = list(labels) or (list(values) if isinstance(values, Mapping) else [""] * len(values))
    numbers = [float(v) for v in (values.values() if isinstance(values, Mapping) else values)]
    left = 14 + 8 * max([_length(name) for name in names] + [0])
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    scale = (WIDTH - left - 70) / ((high - low) or 1.0)
    zero = left - low * scale

    def draw(language: str) -> Iterator[str]:
        for i, (name, value) in enumerate(zip(names, numbers, strict=True)):
            y, length = 28 + i * 20, abs(value) * scale
            colour = SERIES[0] if value >= 0 else SERIES[1]
            yield _words(left - 6, y + 12, name, language, "end")
            size = f'x="{_n(zero if value >= 0 else zero - length)}" y="{y}" width="{_n(length)}" height="15"'
            yield f'<rect {size} fill="{colour}"/>'
            yield _words(zero + max(value, 0.0) * scale + 5, y + 12, f"{value:.4g}", language)
        yield f'<line x1="{_n(zero)}" x2="{_n(zero)}" y1="24" y2="{28 + 20 * len(numbers)}" stroke="{INK}"/>'

    return Figure(title, WIDTH, 36 + 20 * len(numbers), draw)


def line(
    series: Mapping[str, Sequence[float]] | Sequence[float], x: Sequence[float] | None = None, title: Label = "",
    across: Label = "", up: Label = "", log: bool = False,
) -> Figure:  # fmt: skip
    """Curves over a common axis. `across` and `up` name the axes; `log`: powers of ten upwards."""
    curves = {
        str(k): np.asarray(v, np.float64) for k, v in (series if isinstance(series, Mapping) else {"": series}).items()
    }
    places = np.arange(max(len(v) for v in curves.values()), dtype=float) if x is None else np.asarray(x, np.float64)
    heights = {k: np.log10(np.maximum(v, 1e-300)) if log else v for k, v in curves.items()}
    low, high = (float(f(np.concatenate(list(heights.values())))) for f in (np.min, np.max))
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    left, right, top, bottom = 66.0, WIDTH - 12.0, 30.0, 250.0

    def at(px: float, py: float) -> tuple[float, float]:
        span = float(places.max() - places.min()) or 1.0
        return (
            left + (px - float(places.min())) / span * (right - left),
            bottom - (py - low) / (high - low) * (bottom - top),
        )

    def draw(language: str) -> Iterator[str]:
        yield f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{INK}"/>'
        for tick in _ticks(low, high):
            y = at(float(places.min()), tick)[1]
            yield f'<line x1="{left - 4}" x2="{right}" y1="{_n(y)}" y2="{_n(y)}" stroke="{FAINT}" stroke-width="0.4"/>'
            yield _words(left - 7, y + 4, f"{10**tick:.1g}" if log else f"{tick:.4g}", language, "end")
        for tick in _ticks(float(places.min()), float(places.max())):
            yield _words(at(tick, low)[0], bottom + 16, f"{tick:.4g}", language, "middle")
        for i, (name, curve) in enumerate(heights.items()):
            points = " ".join(",".join(map(_n, at(a, b))) for a, b in zip(places, curve, strict=False))
            yield f'<polyline points="{points}" fill="none" stroke="{SERIES[i % len(SERIES)]}" stroke-width="1.8"/>'
            if name:
                yield _words(left + 10, top + 14 + 16 * i, name, language, style=f"fill:{SERIES[i % len(SERIES)]}")
        yield _words((left + right) / 2, bottom + 34, across, language, "middle")
        yield _words(8, top - 8, up, language)

    return Figure(title, WIDTH, bottom + 44, draw)


def clock(angles: Sequence[float], labels: Sequence[Label] = (), title: Label = "") -> Figure:
    """Hands on one dial each, turned counter-clockwise by their angle in radians from the right: RoPE's pairs."""
    each = min(120.0, WIDTH / max(1, len(angles)))
    radius = each / 2 - 10

    def draw(language: str) -> Iterator[str]:
        for i, angle in enumerate(angles):
            cx, cy = (i + 0.5) * each, 34 + radius
            yield f'<circle cx="{_n(cx)}" cy="{_n(cy)}" r="{_n(radius)}" fill="none" stroke="{FAINT}"/>'
            tip = f'x2="{_n(cx + radius * math.cos(angle))}" y2="{_n(cy - radius * math.sin(angle))}"'
            hand = f'<line x1="{_n(cx)}" y1="{_n(cy)}" {tip} stroke="{SERIES[0]}" stroke-width="3">'
            yield f"{hand}<title>{angle:.4g} rad</title></line>"
            if i < len(labels):
                yield _words(cx, cy + radius + 18, labels[i], language, "middle")

    return Figure(title, max(each * len(angles), 200.0), 34 + 2 * radius + (28 if labels else 10), draw)


def rulers(values: Sequence[float], levels: Mapping[str, Sequence[float]], title: Label = "") -> Figure:
    """A block's numbers (dots, on top) over the numbers that each format can represent (ticks, a ruler each)."""
    every = np.concatenate([np.asarray(values, float), *(np.asarray(v, float) for v in levels.values())])
    low, high = float(every.min()), float(every.max())
    left = 16 + 8 * max(_length(name) for name in levels)

    def at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (WIDTH - left - 14)

    def draw(language: str) -> Iterator[str]:
        for value in values:
            dot = f'<circle cx="{_n(at(float(value)))}" cy="36" r="4" fill="{SERIES[1]}" fill-opacity="0.6">'
            yield f"{dot}<title>{float(value):.4g}</title></circle>"
        for i, (name, marks) in enumerate(levels.items()):
            y = 64 + 30 * i
            yield _words(left - 8, y + 4, name, language, "end")
            yield f'<line x1="{left}" x2="{WIDTH - 14}" y1="{y}" y2="{y}" stroke="{FAINT}"/>'
            for mark in marks:
                tick = f'<line x1="{_n(at(float(mark)))}" x2="{_n(at(float(mark)))}" y1="{y - 8}" y2="{y + 8}" '
                yield f'{tick}stroke="{SERIES[0]}" stroke-width="1.6"><title>{float(mark):.4g}</title></line>'

    return Figure(title, WIDTH, 70 + 30 * len(levels), draw)


def _colour(value: float, low: float, high: float) -> tuple[str, bool]:
    """The colour of a value, and whether it is so dark that letters on it have to be white."""
    end, reach = (HIGH, high) if value >= 0 else (LOW, -low)
    share = min(1.0, abs(value) / reach) if reach > 0 and math.isfinite(value) else float(not math.isfinite(value))
    mixed = [round(a + (b - a) * share) for a, b in zip(MIDDLE, end, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed), share > 0.6


def _where(rows: Sequence[Label], i: int, columns: Sequence[Label], j: int, language: str) -> str:
    """The names of a cell's row and column, for the pointer."""
    names = [said(labels[at], language) for labels, at in ((rows, i), (columns, j)) if at < len(labels)]
    return f"{' → '.join(names)}: " if names else f"({i}, {j}): "


def _crowded(columns: Sequence[Label], across: int) -> bool:
    return any(_length(label) * 8 > WIDTH / max(across, 1) - 4 for label in columns)


def _length(label: Label) -> float:
    """About how many letters wide a label is: Chinese ones are twice as wide."""
    widest = max((label.en, label.zh), key=len) if isinstance(label, Text) else str(label)
    return sum(1.7 if ord(letter) > 0x2E80 else 1.0 for letter in widest)


def _words(
    x: float, y: float, label: Label, language: str, anchor: str = "start", style: str = "", turn: str = ""
) -> str:
    turned = f' transform="{turn}"' if turn else ""
    styled = style if "fill:" in style else f"fill:{INK};{style}"
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" style="{styled}"{turned}>{said(label, language)}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two."""
    step = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    step *= next((k for k in (0.2, 0.5, 1.0, 2.0) if (high - low) / (step * k) <= 7), 5.0)
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _n(x: float) -> str:
    """A number of pixels, short and the same on every machine."""
    return f"{x:.1f}".removesuffix(".0")
