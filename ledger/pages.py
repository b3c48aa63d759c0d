"""Pages that are renderings of what was recorded: Jinja templates, which stand beside the module that fills them.

What comes from a file cannot become markup of HTML or SVG, nor end a cell of a table in Markdown. A fact that nobody
recorded, or a number that is not finite, shows as `GAP: reason`; a reason in its place stands for itself.
"""

import functools
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from ledger.record import gap

Told = float | str | None  # a number, the reason why there is none, or nothing

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))


class _NotRecorded(ChainableUndefined):
    def __str__(self) -> str:
        # An `if` without `else` that does not hold has no name, and is no fact that is missing.
        return "" if self._undefined_name is None else gap("not recorded")


def render(template: Path, **facts: Any) -> str:
    """The page that the template NAME.html.j2, NAME.md.j2 or NAME.txt.j2 makes of these facts."""
    return environment(template.parent).get_template(template.name).render(facts)


@functools.cache
def environment(folder: Path) -> Environment:
    """What the templates of a folder are read with: the filters for numbers, `gap`, `is finite`."""
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith((".html.j2", ".svg.j2")),
        undefined=_NotRecorded,
        finalize=_in_place,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update({form.__name__: form for form in (fixed, count, short, percent, change, moment)})
    found.tests["finite"] = lambda value: isinstance(value, int | float) and math.isfinite(value)
    found.globals["gap"] = gap
    return found


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


@pass_context
def _in_place(context: Context, value: Any) -> Any:
    """What stands in the page for the value of an expression: a gap for nothing, and in HTML a mark at each gap."""
    if isinstance(value, Markup):
        return value
    words = gap("not recorded") if value is None or value == "" else str(value)
    if context.name and context.name.endswith(".md.j2"):
        return words.replace("|", "\\|")  # it would end a cell
    if context.eval_ctx.autoescape and words.startswith("GAP:"):
        return Markup('<span class="gap">{}</span>').format(words)
    return words


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
