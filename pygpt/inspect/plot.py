"""The plot of an `Audit`, as the text of an SVG."""

import math
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layers import Audit

OURS, PYTORCHS, FAILS = "#30638e", "#999999", "#d1495b"
LEGEND = {"ours": OURS, "fails": FAILS, "PyTorch's own": PYTORCHS}
LEFT, TOP, RIGHT, WIDTH, HEIGHT = 60, 76, 20, 900, 300  # pixels


def draw(audit: "Audit") -> str:
    """Our errors as dots and PyTorch's as a line over the layers, on a logarithmic scale."""
    finite = [e for layer in audit.layers for e in (layer.ours, layer.torch) if 0 < e < math.inf]
    low, high = math.floor(math.log10(min(finite, default=0.1))), math.ceil(math.log10(max(finite, default=1.0)))
    high = max(high, low + 1)

    def y(error: float) -> float:
        shown = 10.0**high if math.isnan(error) else min(max(error, 10.0**low), 10.0**high)
        return TOP + HEIGHT * (high - math.log10(shown)) / (high - low)

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / max(len(audit.layers), 1)

    def text(at: float, height: float, words: str, more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{height:.1f}" {more}>{escape(words)}</text>'

    bottom = TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" width="{WIDTH}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{bottom + 40}" fill="#ffffff"/>',
        *(text(12, 20 + 16 * i, line, 'font-weight="bold"') for i, line in enumerate(wrap(audit.verdict(), 120)[:2])),
        *(text(LEFT + 100 * i, 60, name, f'fill="{colour}"') for i, (name, colour) in enumerate(LEGEND.items())),
        text(LEFT, bottom + 30, "outputs in the order of forward, then gradients in the order of backward"),
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(text(LEFT - 8, at + 4, f"1e{power}", 'text-anchor="end"'))
    points = " ".join(f"{x(i):.1f},{y(layer.torch):.1f}" for i, layer in enumerate(audit.layers))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{PYTORCHS}"/>')
    for i, layer in enumerate(audit.layers):
        colour = OURS if layer.passed else FAILS
        title = f"<title>{escape(f'{layer.name or audit.model} {layer.what}: {layer.ours:.2e}')}</title>"
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(layer.ours):.1f}" r="3" fill="{colour}">{title}</circle>')
    return "\n".join([*parts, "</svg>", ""])
