"""Pages that are renderings of what was recorded: Jinja templates, which stand beside the module that fills them.

What comes from a file cannot become markup of HTML or SVG, nor end a cell of a table in Markdown. A fact that nobody
recorded shows as `GAP: reason`, never as nothing, and every page writes numbers in the same way.
"""

import functools
import math
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from ledger import numerals
from ledger.record import gap


class _NotRecorded(ChainableUndefined):
    def __str__(self) -> str:
        # An `if` without `else` that does not hold has no name, and is no fact that is missing.
        return "" if self._undefined_name is None else gap("not recorded")


def render(template: Path, **facts: Any) -> str:
    """The page that the template NAME.html.j2, NAME.md.j2 or NAME.txt.j2 makes of these facts."""
    return environment(template.parent).get_template(template.name).render(facts)


@functools.cache
def environment(folder: Path) -> Environment:
    """What the templates of a folder are read with: every function of `numerals` as a filter, `gap`, `is finite`."""
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith((".html.j2", ".svg.j2")),
        undefined=_NotRecorded,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("fixed", "count", "short", "percent", "change", "moment"):
        found.filters[name] = getattr(numerals, name)
    found.tests["finite"] = lambda value: isinstance(value, int | float) and math.isfinite(value)
    found.globals["gap"] = gap
    return found


@pass_context
def _shown(context: Context, value: Any) -> Any:
    """What stands in the page for the value of an expression: a gap for nothing, and in HTML a mark at each gap."""
    if isinstance(value, Markup):
        return value
    words = gap("not recorded") if value is None or value == "" else str(value)
    if context.name and context.name.endswith(".md.j2"):
        return words.replace("|", "\\|")  # it would end a cell
    if context.eval_ctx.autoescape and words.startswith("GAP:"):
        return Markup('<span class="gap">{}</span>').format(words)
    return words
