"""Numbers as people read them; a number that is missing or not finite reads `GAP: reason`."""

import math
from datetime import UTC, datetime
from typing import Any

from ledger.record import gap

_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_number(value: Any) -> float | None:
    """The value as a float, or None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def fixed(value: float | None, digits: int = 2) -> str:
    """A decimal number, with a true minus sign; very large and very small ones with an exponent."""
    if (missing := _missing(value)) is not None:
        return missing
    assert value is not None
    size = abs(value)
    text = f"{value:,.{digits}f}" if size == 0 or 10**-digits <= size < 1e7 else f"{value:.{digits}e}"
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """A whole number: every digit below ten million, three digits and a unit above."""
    if (missing := _missing(value)) is not None:
        return missing
    assert value is not None
    return short(value) if abs(value) >= 1e7 else f"{value:,.0f}".replace("-", "−")


def short(value: float) -> str:
    """A number of any size in few characters, for axes: 0.25, 80k, 1.5B."""
    for unit, suffix in _LARGE:
        if abs(value) >= unit * 0.9995:
            scaled = value / unit
            return (f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:.2e}").replace("-", "−") + suffix
    return f"{value:.3g}".replace("-", "−")


def power(value: float | None) -> str:
    """A number as three digits and a power of ten: 9.40 × 10¹²."""
    if (missing := _missing(value)) is not None:
        return missing
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(_RAISED)}".replace("-", "−")


def plural(number: float | None, noun: str) -> str:
    """A whole number and what it counts: 1 device, 2 devices."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def percent(share: float | None, digits: int = 1, signed: bool = False) -> str:
    """A share of 1 in percent; `signed` for changes."""
    if (missing := _missing(share)) is not None:
        return missing
    assert share is not None
    return f"{share * 100:{'+' if signed else ''},.{digits}f} %".replace("-", "−")


def change(start: float | None, end: float | None) -> str:
    """How far `end` lies from `start`, in percent of `start`."""
    if start is None or end is None:
        return gap("needs a start and an end")
    if not (math.isfinite(start) and math.isfinite(end)) or start == 0:
        return gap("no percentage of such numbers")
    return percent(end / start - 1, signed=True)


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as a date and time of day in UTC."""
    if (missing := _missing(seconds)) is not None:
        return missing
    assert seconds is not None
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return gap(f"{seconds:g} is no date")


def _missing(value: float | None) -> str | None:
    if value is None:
        return gap("not recorded")
    return None if math.isfinite(value) else gap("not a finite number")
