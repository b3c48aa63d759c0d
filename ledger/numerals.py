"""Numbers as people read them; one that is missing or not finite reads `GAP: reason`. A reason stands for itself."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from ledger.record import gap

Told = float | str | None
"""A number, the reason why there is none, or nothing."""

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))


def fixed(value: Told, digits: int = 2) -> str:
    """A decimal number with a true minus sign."""
    return _shown(value, lambda v: f"{v:,.{digits}f}")


def count(value: Told) -> str:
    """A whole number: every digit below ten million, three digits and a unit above."""
    return _shown(value, lambda v: f"{v:,.0f}" if abs(v) < 1e7 else short(v))


def short(value: Told) -> str:
    """A number of any size in few characters: 0.25, 80k, 1.5B, 3.2e18."""
    return _shown(value, _scaled)


def percent(share: Told, sign: str = "") -> str:
    """A share of 1 in percent; `sign="+"` for changes."""
    return _shown(share, lambda v: f"{v * 100:{sign},.1f} %")


def change(start: Told, end: Told) -> str:
    """How far `end` lies from `start`, in percent of `start`."""
    if start and isinstance(start, int | float) and isinstance(end, int | float):
        return percent(end / start - 1, "+")
    return gap("needs a start and an end")


def moment(seconds: Told) -> str:
    """Seconds since 1970 as a date and time of day in UTC."""
    return _shown(seconds, lambda s: f"{datetime.fromtimestamp(s, UTC):%Y-%m-%d %H:%M} UTC", minus="-")


def _scaled(value: float) -> str:
    if abs(value) >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    # Half a digit below a unit rounds up to it: 999,960 is 1M.
    unit, suffix = next((u for u in _UNITS if abs(value) >= u[0] * 0.9995), (1, ""))
    return f"{value / unit:.3g}{suffix}"


def _shown(value: Told, form: Callable[[float], str], minus: str = "−") -> str:
    if not isinstance(value, int | float):
        return value if isinstance(value, str) and value else gap("not recorded")
    return form(value).replace("-", minus) if math.isfinite(value) else gap("not a finite number")
