"""A picture of a run: the loss of each step, and its running mean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

WIDTH, HEIGHT, LEFT, TOP = 720, 320, 64, 40


def curve(losses: Sequence[float]) -> str:
    """A self-contained SVG: no script, no font, nothing from elsewhere.

    >>> curve([3.0, 2.0, 2.5]).count("<polyline")
    2
    """
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def points(values: Sequence[float]) -> str:
        step = (WIDTH - LEFT - 16) / max(1, len(values) - 1)
        return " ".join(
            f"{LEFT + i * step:.1f},{TOP + (high - y) / span * (HEIGHT - TOP - 40):.1f}" for i, y in enumerate(values)
        )

    smooth = list(accumulate(losses, lambda mean, y: 0.9 * mean + 0.1 * y))
    floor = HEIGHT - 40
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        "<style>text{font:12px sans-serif}polyline{fill:none}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="8" y="22">loss over {len(losses)} steps: {losses[0]:.4f} to {losses[-1]:.4f}</text>',
        f'<text x="{LEFT - 8}" y="{TOP + 4}" text-anchor="end">{high:.3f}</text>',
        f'<text x="{LEFT - 8}" y="{floor + 4}" text-anchor="end">{low:.3f}</text>',
        f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH - 16}" y2="{floor}" stroke="#bbb"/>',
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 20}" text-anchor="end">step {len(losses)}</text>',
        f'<polyline points="{points(losses)}" stroke="#bcd" stroke-width="1"/>',
        f'<polyline points="{points(smooth)}" stroke="#d4483a" stroke-width="2"/>',
        "</svg>\n",
    ])  # fmt: skip
