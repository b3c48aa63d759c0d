"""Where the points of a chart lie; `charts.svg.j2` draws them.

Across, everything is a share of the width, so a chart fits any screen while its text keeps its size; down,
everything is in pixels. Values that are not finite are not drawn.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Point = tuple[float, float]

_STRETCHES = 300
"""Of each stretch of a line its lowest and highest point are drawn: no spike is lost, no file grows large."""


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


@dataclass(frozen=True)
class Frame:
    """What curves are drawn into: two axes, and a height in pixels."""

    x: Axis
    y: Axis
    height_px: int

    def trace(self, points: Iterable[Point]) -> list[Point]:
        """What is drawn of a curve by ascending x: thousandths of the width, and pixels from the top."""
        range_ = self.x.high - self.x.low
        return [
            (round((at - self.x.low) / range_ * 1000, 1), self.y.down(value, self.height_px))
            for at, value in _thinned(points)
        ]


def axis(values: Iterable[float], n_ticks: int = 5, from_zero: bool = True) -> Axis:
    """An axis that holds all finite values, with about `n_ticks` round numbers."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = (min(0.0, *finite) if from_zero else min(finite)), max(finite)
    if high - low <= 1e-6 * abs(high):
        high = low + max(abs(low), 1.0)
    rough = (high - low) / (n_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)))


def _thinned(points: Iterable[Point]) -> list[Point]:
    finite = [point for point in points if math.isfinite(point[1])]
    size = -(-len(finite) // _STRETCHES) or 1
    stretches = [sorted(finite[n : n + size], key=lambda point: point[1]) for n in range(0, len(finite), size)]
    return [point for stretch in stretches for point in sorted({stretch[0], stretch[-1]})] + finite[-1:]
