"""Charts as inline SVG, drawn by a few functions and styled by the page that holds them.

Across, everything is a share of the width, so a chart fits any screen while its text keeps its size; down,
everything is in pixels. Colours come from CSS classes, so one drawing serves light, dark and paper. No
drawing holds an address, a font or a script. A value that is not finite breaks its line.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from marathon.markup import escape
from marathon.numerals import short

Point = tuple[float, float]

_LARGEST = 1e200
"""Beyond it a range may overflow; such a value is drawn like one that is not finite."""
_MAX_POINTS = 600
"""Points drawn of one line: finer than the pixels of a wide screen."""
_ROW_PX = 22
_LABEL_PX = 13
"""Least distance of two labels at line ends."""


@dataclass(frozen=True)
class Line:
    """One curve: points by ascending x, and the CSS class that colours it; `end` is written at its end."""

    name: str
    points: Sequence[Point]
    css: str = "main"
    end: str = ""


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

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Iterable[float], n_ticks: int = 5, from_zero: bool = False, rounded: bool = False) -> Axis:
    """An axis that holds all finite values, with about `n_ticks` round numbers; `rounded` ends on such numbers too."""
    finite = [v for v in values if _drawable(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1 / _LARGEST):
        around = max(abs(low), 1) / 2
        low, high = (0.0, 1.0) if from_zero else (low - around, high + around)
    step = _round_step((high - low) / max(n_ticks - 1, 1))
    if rounded:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)))


def line_chart(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    hover: Sequence[tuple[float, str]] = (),
    marks: Sequence[float] = (),
    height_px: int = 240,
) -> str:
    """A figure: curves over two axes, dashed verticals at `marks`, texts shown where a pointer comes near."""

    def down(value: float) -> float:
        return round((1 - y.share(value)) * height_px, 1)

    grid = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{down(t)}" y2="{down(t)}"/>'
        f'<text class="tick" x="0" dx="-8" y="{down(t)}" dy="4" text-anchor="end">{escape(short(t))}</text>'
        for t in y.ticks
    )
    along = "".join(
        f'<text class="tick" x="{_across(x, t)}" y="{height_px + 18}" text-anchor="{_anchor(x.share(t))}">'
        f"{escape(short(t))}</text>"
        for t in x.ticks
    )
    dashes = "".join(
        f'<line class="mark" x1="{_across(x, m)}" x2="{_across(x, m)}" y1="0" y2="{height_px}"/>'
        for m in marks
        if _drawable(m) and x.low <= m <= x.high
    )
    ends = _end_labels(lines, down)
    dots = "".join(_end_dot(line, x, y, height_px) for line in lines if line.css == "main")
    css = "chart with-ends" if ends else "chart"
    return (
        f'<figure class="{css}"><figcaption>{escape(title)}<output></output></figcaption>'
        f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{height_px + 24}"{_hover(hover, x)}>'
        f"{grid}{along}{dashes}{_curves(lines, x, y, height_px)}{dots}{ends}{_cursor(hover, height_px)}</svg></figure>"
    )


def panel(
    line: Line, behind: Line, x: Axis, y: Axis, hover: Sequence[tuple[float, str]] = (), height_px: int = 58
) -> str:
    """A small drawing without axes: a curve before a pale one to compare it with."""
    return (
        f'<svg class="panel" role="img" aria-label="{escape(line.name)}" width="100%" height="{height_px}"'
        f'{_hover(hover, x)}><line class="grid" x1="0" x2="100%" y1="{height_px}" y2="{height_px}"/>'
        f"{_curves([behind, line], x, y, height_px)}{_end_dot(line, x, y, height_px)}"
        f"{_cursor(hover, height_px)}</svg>"
    )


def dot_plot(title: str, rows: Sequence[Interval], x: Axis) -> str:
    """A figure: one row for each value with its interval; a small upright stroke marks its reference."""
    height_px = len(rows) * _ROW_PX
    grid = "".join(
        f'<line class="grid" x1="{_across(x, t)}" x2="{_across(x, t)}" y1="0" y2="{height_px}"/>'
        f'<text class="tick" x="{_across(x, t)}" y="{height_px + 16}" text-anchor="middle">{escape(short(t))}</text>'
        for t in x.ticks
    )
    drawn = "".join(_interval(row, x, (n + 0.5) * _ROW_PX) for n, row in enumerate(rows))
    return (
        f'<figure class="dots"><figcaption>{escape(title)}</figcaption>'
        f'<svg role="img" aria-label="{escape(title)}" width="100%" height="{height_px + 22}">{grid}{drawn}</svg>'
        "</figure>"
    )


def bar(share: float | None, planned: float | None, largest: float) -> str:
    """A bar for a table cell, as long as `share` of `largest`, with a stroke at the planned share."""
    length = share / largest if share is not None and _drawable(share) and largest > 0 else 0.0
    stroke = ""
    if planned is not None and _drawable(planned) and largest > 0:
        at = f"{min(max(planned / largest, 0), 1):.2%}"
        stroke = f'<line class="plan" x1="{at}" x2="{at}" y1="0" y2="14"/>'
    filled = f'<rect class="fill" x="0" y="3" height="8" width="{min(max(length, 0), 1):.2%}"/>'
    return f'<svg class="bar" width="100%" height="14" aria-hidden="true">{filled}{stroke}</svg>'


def _curves(lines: Sequence[Line], x: Axis, y: Axis, height_px: int) -> str:
    # An inner drawing stretches with the width; its strokes do not.
    paths = "".join(
        f'<path class="{escape(li.css)}" d="{path}"/>' for li in lines if (path := _path(li, x, y, height_px))
    )
    return (
        f'<svg class="plot" viewBox="0 0 1000 {height_px}" preserveAspectRatio="none" width="100%" '
        f'height="{height_px}">{paths}</svg>'
    )


def _path(line: Line, x: Axis, y: Axis, height_px: int) -> str:
    steps, pen_is_down = [], False
    for at, value in thinned(line.points):
        if not (_drawable(at) and _drawable(value)):
            pen_is_down = False
            continue
        place = f"{x.share(at) * 1000:.1f} {(1 - y.share(value)) * height_px:.1f}"
        # h0 after every move: a point without neighbours is drawn as the round cap of an empty stroke.
        steps.append(f"L{place}" if pen_is_down else f"M{place}h0")
        pen_is_down = True
    return "".join(steps)


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [p for p in stretch if _drawable(p[1])]
        if finite:
            kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
        if len(finite) < len(stretch):
            kept.append((stretch[-1][0], math.nan))
    return kept


def _end_dot(line: Line, x: Axis, y: Axis, height_px: int) -> str:
    finite = [point for point in line.points if _drawable(point[0]) and _drawable(point[1])]
    if not finite:
        return ""
    at, value = finite[-1]
    return f'<circle class="dot" cx="{_across(x, at)}" cy="{(1 - y.share(value)) * height_px:.1f}" r="2.5"/>'


def _end_labels(lines: Sequence[Line], down: Callable[[float], float]) -> str:
    ends = []
    for line in lines:
        finite = [value for _, value in line.points if _drawable(value)]
        if line.end and finite:
            ends.append((down(finite[-1]), line))
    placed, lowest_px = [], -math.inf
    for wanted_px, line in sorted(ends, key=lambda end: end[0]):
        lowest_px = max(wanted_px, lowest_px + _LABEL_PX)
        placed.append(
            f'<text class="end {escape(line.css)}" x="100%" dx="6" y="{lowest_px:.1f}" dy="4">{escape(line.end)}</text>'
        )
    return "".join(placed)


def _interval(row: Interval, x: Axis, middle_px: float) -> str:
    parts = [f'<text class="name" x="0" dx="-10" y="{middle_px}" dy="4" text-anchor="end">{escape(row.name)}</text>']
    if row.reference is not None and _drawable(row.reference):
        at = _across(x, row.reference)
        parts.append(f'<line class="plan" x1="{at}" x2="{at}" y1="{middle_px - 7}" y2="{middle_px + 7}"/>')
    if _drawable(row.low) and _drawable(row.high):
        ends = f'x1="{_across(x, row.low)}" x2="{_across(x, row.high)}"'
        parts.append(f'<line class="interval" {ends} y1="{middle_px}" y2="{middle_px}"/>')
    if _drawable(row.value):
        parts.append(f'<circle class="dot" cx="{_across(x, row.value)}" cy="{middle_px}" r="4"/>')
    parts.append(f'<text class="value" x="100%" dx="10" y="{middle_px}" dy="4">{escape(row.text)}</text>')
    return "".join(parts)


def _hover(texts: Sequence[tuple[float, str]], x: Axis) -> str:
    rows = [[round(x.share(at), 4), text] for at, text in texts if _drawable(at)]
    return f' data-hover="{escape(json.dumps(rows, ensure_ascii=False))}"' if rows else ""


def _cursor(texts: Sequence[tuple[float, str]], height_px: int) -> str:
    return f'<line class="cursor" x1="0" x2="0" y1="0" y2="{height_px}"/>' if texts else ""


def _across(x: Axis, value: float) -> str:
    return f"{min(max(x.share(value), 0), 1):.2%}"


def _anchor(share: float) -> str:
    return "start" if share < 0.02 else "end" if share > 0.98 else "middle"


def _round_step(rough: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that is nearest to a rough one."""
    power = 10.0 ** math.floor(math.log10(rough))
    return min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST
