"""Charts of the curation report: SVG text, coloured by the page's CSS variables."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 190, 44, 34, 22
_BINS = 40


def histogram(
    title: str, kept: Sequence[float], dropped: Sequence[float], limits: Sequence[float], *, logarithmic: bool = False
) -> Markup:
    """Counts of kept and dropped clips by a score, with a dashed line at each limit.

    On a logarithmic axis what is 0 stands at the left end.
    """
    finite = [limit for limit in limits if math.isfinite(limit)]
    values = np.array([*kept, *dropped, *finite], float)
    if not len(kept) + len(dropped):
        return Markup()
    least = max(values[values > 0].min(initial=1.0), 1e-4) if logarithmic else 0.0

    def scaled(numbers: Sequence[float] | np.ndarray) -> np.ndarray:
        array = np.asarray(numbers, float)
        return np.log10(np.maximum(array, least)) if logarithmic else array

    low, high = float(scaled(values).min()), float(scaled(values).max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    counts = [np.histogram(scaled(part), edges)[0] for part in (kept, dropped)]
    tallest = max(1, int((counts[0] + counts[1]).max()))

    def x(value: float) -> float:
        return float(_LEFT + (_WIDTH - _LEFT - 10) * (value - edges[0]) / (edges[-1] - edges[0]))

    def y(count: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - count / tallest)

    parts = [f'<text x="{_LEFT}" y="13" class="band-name">{escape(title)}</text>']
    for k in range(_BINS):
        base = 0
        for count, colour in ((counts[0][k], "--c1"), (counts[1][k], "--c2")):
            if count:
                span = f"{_number(edges[k], logarithmic)} to {_number(edges[k + 1], logarithmic)}: {count}"
                parts.append(
                    f'<rect x="{x(edges[k]) + 0.5:.1f}" width="{x(edges[k + 1]) - x(edges[k]) - 1:.1f}" '
                    f'y="{y(base + count):.1f}" height="{y(base) - y(base + count):.1f}" style="fill:var({colour})">'
                    f"<title>{span}</title></rect>"
                )
            base += count
    for limit, place in zip(finite, scaled(finite), strict=True):
        parts.append(f'<line x1="{x(place):.1f}" x2="{x(place):.1f}" y1="{_TOP}" y2="{y(0):.1f}" class="chance"/>')
        parts.append(f'<text x="{x(place) + 4:.1f}" y="{_TOP + 10}" class="chance-name">{limit:g}</text>')
    for place in np.linspace(edges[0], edges[-1], 6):
        text = _number(place, logarithmic)
        parts.append(f'<text x="{x(place):.1f}" y="{_HEIGHT - 14}" text-anchor="middle" class="axis">{text}</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end" class="axis">{tallest}</text>')
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>')


def _number(value: float, logarithmic: bool) -> str:
    return f"{10**value if logarithmic else value:.3g}"
