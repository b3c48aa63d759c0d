"""Charts as inline SVG, drawn by a few functions and styled by the page that holds them.

Across, everything is a share of the width, so a chart fits any screen while its text keeps its size; down,
everything is in pixels. Colours come from CSS classes, so one drawing serves light, dark and paper. Values
that are not finite are not drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from marathon.numerals import short

Point = tuple[float, float]

_STRETCHES = 300
"""Of each stretch of a line its lowest and highest point are drawn: no spike is lost, no file grows large."""
_ROW_PX = 22


@dataclass(frozen=True)
class Line:
    """One curve: points by ascending x, and the CSS class that colours it."""

    points: Sequence[Point]
    css: str = "main"


@dataclass(frozen=True)
class Interval:
    """One row of a dot plot: a value, the ends of its interval, and what it is compared with."""

    name: str
    value: float
    low: float
    high: float
    text: str
    reference: float | None = None


@dataclass(frozen=True)
class Axis:
    """A range of values, ends included, and the round numbers to be written along it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def across(self, value: float) -> str:
        """Where a value lies, as a share of the width."""
        return f"{(value - self.low) / (self.high - self.low):.2%}"

    def down(self, value: float, height_px: int) -> float:
        """Where a value lies below the top of a drawing of that height."""
        return round((self.high - value) / (self.high - self.low) * height_px, 1)


def axis(values: Iterable[float], n_ticks: int = 5, from_zero: bool = True) -> Axis:
    """An axis that holds all finite values, with about `n_ticks` round numbers."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = (min(0.0, *finite) if from_zero else min(finite)), max(finite)
    if high - low <= 1e-6 * abs(high):
        high = low + max(abs(low), 1.0)
    step = _round_step((high - low) / (n_ticks - 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)))


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, height_px: int = 280) -> str:
    """A figure: curves over two axes; a dot ends each curve of class `main`."""
    up = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y.down(t, height_px)}" y2="{y.down(t, height_px)}"/>'
        f'<text class="tick" x="0" dx="-8" y="{y.down(t, height_px)}" dy="4" text-anchor="end">{short(t)}</text>'
        for t in y.ticks
    )
    along = "".join(
        f'<text class="tick" x="{x.across(t)}" y="{height_px + 18}" text-anchor="middle">{short(t)}</text>'
        for t in x.ticks
    )
    return _figure(title, "chart", height_px + 24, up + along + _curves(lines, x, y, height_px))


def panel(title: str, lines: Sequence[Line], x: Axis, y: Axis, height_px: int = 58) -> str:
    """A small drawing without axes."""
    base = f'<line class="grid" x1="0" x2="100%" y1="{height_px}" y2="{height_px}"/>'
    return _drawing(title, height_px, base + _curves(lines, x, y, height_px))


def dot_plot(title: str, rows: Sequence[Interval], x: Axis) -> str:
    """A figure: one row for each value with its interval; a small upright stroke marks its reference."""
    height_px = len(rows) * _ROW_PX
    grid = "".join(
        f'<line class="grid" x1="{x.across(t)}" x2="{x.across(t)}" y1="0" y2="{height_px}"/>'
        f'<text class="tick" x="{x.across(t)}" y="{height_px + 16}" text-anchor="middle">{short(t)}</text>'
        for t in x.ticks
    )
    drawn = "".join(_interval(row, x, (n + 0.5) * _ROW_PX) for n, row in enumerate(rows))
    return _figure(title, "dots", height_px + 22, grid + drawn)


def bar(share: float | None, planned: float | None, largest: float) -> str:
    """A bar for a table cell, as long as `share` of `largest`, with a stroke at the planned share."""
    filled = f'<rect class="fill" x="0" y="3" height="8" width="{share / largest:.2%}"/>' if share else ""
    at = f"{planned / largest:.2%}" if planned else ""
    stroke = f'<line class="plan" x1="{at}" x2="{at}" y1="0" y2="14"/>' if planned else ""
    return f'<svg class="bar" width="100%" height="14" aria-hidden="true">{filled}{stroke}</svg>'


def _figure(title: str, css: str, height_px: int, inner: str) -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure class="{css}">{caption}{_drawing(title, height_px, inner)}</figure>'


def _drawing(title: str, height_px: int, inner: str) -> str:
    return f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{height_px}">{inner}</svg>'


def _curves(lines: Sequence[Line], x: Axis, y: Axis, height_px: int) -> str:
    # An inner drawing stretches with the width; its strokes and the dots outside of it do not.
    paths, dots = "", ""
    for line in lines:
        if not (points := _thinned(line.points)):
            continue
        places = (f"{(at - x.low) / (x.high - x.low) * 1000:.1f} {y.down(value, height_px)}" for at, value in points)
        paths += f'<path class="{line.css}" d="M{"L".join(places)}"/>'
        if line.css == "main":
            at, value = points[-1]
            dots += f'<circle class="dot" cx="{x.across(at)}" cy="{y.down(value, height_px)}" r="2.5"/>'
    box = f'viewBox="0 0 1000 {height_px}" preserveAspectRatio="none" width="100%" height="{height_px}"'
    return f'<svg class="plot" {box}>{paths}</svg>{dots}'


def _thinned(points: Sequence[Point]) -> list[Point]:
    finite = [point for point in points if math.isfinite(point[1])]
    size = -(-len(finite) // _STRETCHES) or 1
    stretches = [sorted(finite[n : n + size], key=lambda point: point[1]) for n in range(0, len(finite), size)]
    return [point for stretch in stretches for point in sorted({stretch[0], stretch[-1]})] + finite[-1:]


def _interval(row: Interval, x: Axis, middle_px: float) -> str:
    parts = [f'<text class="name" x="0" dx="-10" y="{middle_px}" dy="4" text-anchor="end">{escape(row.name)}</text>']
    if row.reference is not None:
        at = x.across(row.reference)
        parts.append(f'<line class="plan" x1="{at}" x2="{at}" y1="{middle_px - 7}" y2="{middle_px + 7}"/>')
    if all(map(math.isfinite, (row.low, row.value, row.high))):
        ends = f'x1="{x.across(row.low)}" x2="{x.across(row.high)}"'
        parts.append(f'<line class="interval" {ends} y1="{middle_px}" y2="{middle_px}"/>')
        parts.append(f'<circle class="dot" cx="{x.across(row.value)}" cy="{middle_px}" r="4"/>')
    parts.append(f'<text class="value" x="100%" dx="10" y="{middle_px}" dy="4">{escape(row.text)}</text>')
    return "".join(parts)


def _round_step(rough: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that is nearest to a rough one."""
    power = 10.0 ** math.floor(math.log10(rough))
    return min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
