"""Numbers as people read them; a number that is missing or not finite reads `GAP: reason`."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from ledger.record import gap

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))


def fixed(value: float | None, digits: int = 2) -> str:
    """A decimal number with a true minus sign."""
    return _shown(value, lambda v: f"{v:,.{digits}f}")


def count(value: float | None) -> str:
    """A whole number: every digit below ten million, three digits and a unit above."""
    return _shown(value, lambda v: f"{v:,.0f}" if abs(v) < 1e7 else short(v))


def short(value: float | None) -> str:
    """A number of any size in few characters: 0.25, 80k, 1.5B, 3.2e18."""
    return _shown(value, _scaled)


def percent(share: float | None, sign: str = "") -> str:
    """A share of 1 in percent; `sign="+"` for changes."""
    return _shown(share, lambda v: f"{v * 100:{sign},.1f} %")


def change(start: float | None, end: float | None) -> str:
    """How far `end` lies from `start`, in percent of `start`."""
    return percent(end / start - 1, "+") if start and end is not None else gap("needs a start and an end")


def plural(number: float | None, noun: str) -> str:
    """A whole number and what it counts: 1 device, 2 devices."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def moment(seconds: float | None) -> str:
    """Seconds since 1970 as a date and time of day in UTC."""
    return gap("not recorded") if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _scaled(value: float) -> str:
    if abs(value) >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    # Half a digit below a unit rounds up to it: 999,960 is 1M.
    unit, suffix = next((u for u in _UNITS if abs(value) >= u[0] * 0.9995), (1, ""))
    return f"{value / unit:.3g}{suffix}"


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    if value is None:
        return gap("not recorded")
    return form(value).replace("-", "−") if math.isfinite(value) else gap("not a finite number")
