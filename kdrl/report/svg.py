"""Small line charts as inline SVG; colours come from CSS variables, so that light and dark both read well.

Left out: logarithmic axes, zooming. A chart is a picture, not an application.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
# More points than a screen has pixels only make the file large.
_MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line; `low` and `high` draw a band around it, `dots` its points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal reference line with words at its right end."""

    label: str
    y: float


@dataclass(frozen=True)
class _Frame:
    """The mapping from data to the picture."""

    x0: float
    x1: float
    y0: float
    y1: float
    left: float
    top: float
    width: float
    height: float

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * self.width

    def py(self, y: float) -> float:
        return self.top + (self.y1 - y) / (self.y1 - self.y0) * self.height


def line_chart(
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    width: int = 400,
    height: int = 200,
    x_label: str = "step",
    y_label: str = "",
    smooth: bool = True,
    style: str = "",
    name: str = "chart",
) -> str:
    """An `<svg>`; `smooth` lays a running mean over long noisy lines, `style` is CSS for a file of its own."""
    series = [s for s in series if len(s.x)]
    frame = _frame(series, levels, width, height)
    body = [_axes(frame, x_label, y_label)]
    for index, line in enumerate(series):
        colour = index if line.colour is None else line.colour
        body.append(_line(frame, line, colour % COLOURS, smooth))
    body += [_level(frame, level) for level in levels]
    css = f"<style>{style}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)}" font-family="system-ui, sans-serif" font-size="11">{css}{"".join(body)}</svg>'
    )


def _frame(series: Sequence[Series], levels: Sequence[Level], width: int, height: int) -> _Frame:
    xs = [x for s in series for x in s.x] or [0.0, 1.0]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high)] + [level.y for level in levels] or [0.0, 1.0]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    if y1 - y0 < 1e-9 * max(1.0, abs(y1)):
        y0, y1 = (y0 - 0.5 * abs(y0), y1 + 0.5 * abs(y1)) if y1 else (0.0, 1.0)
    else:
        # A share that comes near zero is read from zero; otherwise a little air below and above.
        y0, y1 = (0.0 if 0 <= y0 < 0.4 * y1 else y0 - 0.06 * (y1 - y0)), y1 + 0.06 * (y1 - y0)
    if x1 == x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    left, bottom, right = 48.0, 32.0, 16.0
    return _Frame(x0, x1, y0, y1, left, 8.0, width - left - right, height - 8.0 - bottom)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most about `most` of them."""
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in at most about five characters."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    bottom, right = frame.top + frame.height, frame.left + frame.width
    parts = []
    for y in ticks(frame.y0, frame.y1, max(2, int(frame.height // 36))):
        py = frame.py(y)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6}" y="{py + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(frame.x0, frame.x1, max(2, int(frame.width // 70))):
        px = frame.px(x)
        parts.append(f'<text class="tick" x="{px:.1f}" y="{bottom + 14}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = frame.left + frame.width / 2
    parts.append(f'<text class="tick" x="{middle}" y="{bottom + 28}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        centre = frame.top + frame.height / 2
        where = f'x="12" y="{centre}" transform="rotate(-90 12 {centre})"'
        parts.append(f'<text class="tick" {where} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _level(frame: _Frame, level: Level) -> str:
    py, right = frame.py(level.y), frame.left + frame.width
    # Words go below a line that touches the top edge.
    above = py - 5 if py - frame.top > 16 else py + 13
    return (
        f'<line class="level" x1="{frame.left}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>'
        f'<text class="level-word" x="{right - 2}" y="{above:.1f}" text-anchor="end">{escape(level.label)}</text>'
    )


def thin(x: Sequence[float], y: Sequence[float], most: int = _MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs of neighbours."""
    n = len(x)
    if n <= most:
        return list(x), list(y)
    edges = [i * n // most for i in range(most + 1)]
    spans = list(itertools.pairwise(edges))
    return [sum(x[a:b]) / (b - a) for a, b in spans], [sum(y[a:b]) / (b - a) for a, b in spans]


def running_mean(y: Sequence[float], window: int) -> list[float]:
    """Mean over the neighbours within half a window on both sides, fewer at the ends."""
    half, sums = window // 2, [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(len(y), i + half + 1)) for i in range(len(y))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def noisy(y: Sequence[float]) -> bool:
    """Whether a line is long and goes up and down far more than it moves: only such a one gains from a mean."""
    if len(y) < 24:
        return False
    return sum(abs(b - a) for a, b in itertools.pairwise(y)) > 3 * (max(y) - min(y)) > 0


def _points(frame: _Frame, x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{frame.px(a):.1f},{frame.py(b):.1f}" for a, b in zip(x, y, strict=True))


def _line(frame: _Frame, line: Series, colour: int, smooth: bool) -> str:
    parts = []
    if line.low and line.high:
        edge = _points(frame, [*line.x, *reversed(line.x)], [*line.low, *reversed(line.high)])
        parts.append(f'<polygon class="band f{colour}" points="{edge}"/>')
    x, y = thin(line.x, line.y)
    if smooth and not line.dots and noisy(y):
        parts.append(f'<polyline class="raw s{colour}" points="{_points(frame, x, y)}"/>')
        y = running_mean(y, max(5, len(y) // 12))
    if len(x) == 1:
        parts.append(_dot(frame, line.label, x[0], y[0], colour))
    else:
        parts.append(f'<polyline class="line s{colour}" points="{_points(frame, x, y)}"/>')
        if line.dots:
            parts += [_dot(frame, line.label, a, b, colour) for a, b in zip(x, y, strict=True)]
    return "".join(parts)


def _dot(frame: _Frame, label: str, x: float, y: float, colour: int) -> str:
    title = f"<title>{escape(label)}: {y:.4g} at {x:,.0f}</title>"
    return f'<circle class="f{colour}" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.6">{title}</circle>'


_LIGHT = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#64748b")
_DARK = ("#60a5fa", "#fbbf24", "#34d399", "#e879f9", "#f87171", "#22d3ee", "#a3e635", "#94a3b8")


def _variables(colours: Sequence[str], ink: str, soft: str, grid: str, ground: str) -> str:
    lines = "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))
    return f"{lines}--ink:{ink};--soft:{soft};--grid:{grid};--ground:{ground};"


def chart_css(root: str = ":root") -> str:
    """The variables for light and dark and the classes of the charts; shared by the pages and by SVG files."""
    light = _variables(_LIGHT, "#1b1f24", "#5b6472", "#e4e7ec", "#ffffff")
    dark = _variables(_DARK, "#e6e8eb", "#9aa4b2", "#2c323b", "#14171c")
    lines = "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(COLOURS))
    return (
        f"{root}{{{light}}}@media (prefers-color-scheme:dark){{{root}{{{dark}}}}}{lines}"
        ".line{fill:none;stroke-width:1.8;stroke-linejoin:round}.raw{fill:none;stroke-width:1;opacity:.3}"
        ".band{opacity:.15}.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}.tick{fill:var(--soft)}"
        ".level{stroke:var(--soft);stroke-dasharray:5 4}.word{fill:var(--ink)}"
        ".level-word{fill:var(--soft);stroke:var(--ground);stroke-width:4;paint-order:stroke;stroke-linejoin:round}"
    )


def legend(labels: Sequence[str], x: float, y: float) -> str:
    """A row of coloured words at (x, y), for an SVG file that stands alone."""
    parts, at = [], x
    for index, label in enumerate(labels):
        parts.append(f'<rect class="f{index % COLOURS}" x="{at:.0f}" y="{y - 9:.0f}" width="14" height="4" rx="2"/>')
        parts.append(f'<text class="word" x="{at + 19:.0f}" y="{y - 3:.0f}">{escape(label)}</text>')
        at += 34 + 6.4 * len(label)
    return "".join(parts)
