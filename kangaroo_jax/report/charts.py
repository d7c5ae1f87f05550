"""Charts of the report: plain SVG text, coloured by the page's CSS variables so that they follow its theme.

Every function returns one `<svg>` element that scales with the page. Values are finite numbers; shares run
from 0 to 1.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 960  # of the drawing's own coordinates; the page scales it
SERIES = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")  # CSS variables that hold the series' colours


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>')


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str = "axis") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]], colour: str, cls: str) -> str:
    steps = " ".join(f"{'M' if not i else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{cls}" style="stroke:var({colour})"/>'


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without a bias towards zero at the beginning."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most about `most` points, evenly taken, the last one always."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def loss_chart(stages: Sequence[tuple[str, int, Sequence[tuple[int, float]]]], height: float = 320) -> Markup:
    """Loss over the steps of all stages, one band a stage, on a logarithmic scale.

    `stages` are (name, number of steps, (step, loss) pairs); steps count anew in each stage.
    """
    left, right, top, bottom = 48, 8, 44, 30
    losses = [loss for _, _, pairs in stages for _, loss in pairs if math.isfinite(loss)]
    low, high = max(min(losses, default=0.1), 1e-4), max(max(losses, default=10.0), 1e-3)
    low, high = math.log10(low) - 0.05, math.log10(high) + 0.05
    total = sum(max(steps, 1) for _, steps, _ in stages) or 1
    share = [max(steps, 1) / total for _, steps, _ in stages]
    share = [0.4 / len(stages) + 0.6 * s for s in share]  # a short stage keeps room for its curve

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(max(loss, 1e-4))) / (high - low)

    parts, x0 = [], float(left)
    for tick in (m * 10.0**e for e in range(-4, 3) for m in (1, 3)):
        if low <= math.log10(tick) <= high:
            parts.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>')
            parts.append(_text(left - 8, y(tick) + 4, f"{tick:g}", "end"))
    for i, (name, steps, pairs) in enumerate(stages):
        width = share[i] * (WIDTH - left - right)
        band = (
            f'<rect x="{x0:.1f}" y="{top}" width="{width:.1f}" height="{height - top - bottom}" class="band{i % 2}"/>'
        )
        parts.insert(0, band)
        points = [(x0 + width * step / max(steps, 1), loss) for step, loss in pairs if math.isfinite(loss)]
        colour = SERIES[i % len(SERIES)]
        if points:
            raw = [(px, y(loss)) for px, loss in thin(points)]
            even = zip((p for p, _ in points), smooth([loss for _, loss in points]), strict=True)
            parts += [_path(raw, colour, "raw"), _path([(px, y(v)) for px, v in thin(list(even))], colour, "line")]
        for line, text in enumerate(_two_lines(name)):
            parts.append(_text(x0 + width / 2, 16 + 14 * line, text, "middle", "band-name"))
        parts.append(_text(x0 + width / 2, height - 10, f"{steps} steps", "middle"))
        x0 += width
    return _svg(height, "Loss over the steps of all stages", parts)


def _two_lines(name: str) -> list[str]:
    """A stage's name in at most two lines: `stage1_image_pretrain` gives `Stage 1` and `image pretrain`.

    Stage 0 is none of the curriculum's: `stage0_text_warmup` gives `Text warmup`.
    """
    head, _, rest = name.partition("_")
    number = head.removeprefix("stage")
    if number == "0":
        return [rest.replace("_", " ").capitalize()]
    if head != name and number.isdigit():
        return [f"Stage {number}", rest.replace("_", " ")]
    words = name.replace("_", " ")
    return [words[:1].upper() + words[1:]]


def stage_label(name: str) -> str:
    """A stage's name for a reader: `Stage 1 image pretrain`."""
    return " ".join(_two_lines(name))


def bar_chart(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    chance: float | None = None,
    height: float = 260,
) -> Markup:
    """Grouped bars of shares, with a dashed line at `chance`. A value of None leaves its place empty."""
    left, right, top, bottom = 48, 52, 34, 40
    inner = height - top - bottom

    def y(share: float) -> float:
        return top + inner * (1 - min(max(share, 0), 1))

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>')
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:.0%}", "end"))
    slot = (WIDTH - left - right) / max(len(groups), 1)
    bar = min(slot * 0.8 / max(len(series), 1), 56)
    for g, group in enumerate(groups):
        middle = left + slot * (g + 0.5)
        for s, (name, values) in enumerate(series):
            if (value := values[g]) is None:
                continue
            x, top_y = middle + (s - len(series) / 2) * bar, y(value)
            size = f'x="{x + 1.5:.1f}" y="{top_y:.1f}" width="{bar - 3:.1f}" height="{top + inner - top_y:.1f}"'
            title = f"<title>{escape(group)}, {escape(name)}: {value:.1%}</title>"
            parts.append(f'<rect {size} rx="3" style="fill:var({SERIES[s % len(SERIES)]})">{title}</rect>')
            parts.append(_text(x + bar / 2, y(value) - 5, f"{100 * value:.0f}", "middle", "value"))
        for line, text in enumerate(_two_lines(group)):
            parts.append(_text(middle, height - bottom + 18 + 14 * line, text, "middle"))
    if chance is not None:
        parts.append(
            f'<line x1="{left}" x2="{WIDTH - right}" y1="{y(chance):.1f}" y2="{y(chance):.1f}" class="chance"/>'
        )
        parts.append(_text(WIDTH - right + 6, y(chance) + 4, "chance", cls="chance-name"))
    x = float(left)
    for s, (name, _) in enumerate(series):
        parts.append(
            f'<rect x="{x:.0f}" y="4" width="12" height="12" rx="3" style="fill:var({SERIES[s % len(SERIES)]})"/>'
        )
        parts.append(_text(x + 18, 14, name, cls="legend"))
        x += 40 + 7.2 * len(name)
    return _svg(height, "Accuracy by stage", parts)
