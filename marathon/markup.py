"""Pieces of the report's HTML. Whatever came from a file passes through `text` and cannot become markup."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from babel import Locale

from ledger.record import gap

_ENGLISH = Locale("en")


def text(value: Any) -> str:
    """A value as escaped text; a fact that is missing is marked, never left blank."""
    words = gap("not recorded") if value is None or value == "" else str(value)
    return f'<span class="gap">{escape(words)}</span>' if words.startswith("GAP:") else escape(words)


def language_name(code: str) -> str:
    """The English name of a BCP-47 code, or the code itself where it has none."""
    return str(_ENGLISH.languages.get(code.split("-")[0], code))


def section(anchor: str, title: str, parts: Iterable[str]) -> str:
    """A part of the page under its heading."""
    return f'<section id="{anchor}"><h2>{title}</h2>\n' + "\n".join(parts) + "\n</section>"


def note(words: str) -> str:
    """A quiet sentence beside a chart; `words` is text, not markup."""
    return f'<p class="note">{escape(words)}</p>'


def missing(reason: str) -> str:
    """What stands in place of a chart or table that cannot be drawn."""
    return f"<p>{text(gap(reason))}</p>"


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values in columns."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{inner}</dl>'


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers that come first: name, value, and a quiet line beneath."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{text(value)}<small>{text(below)}</small></dd></div>"
        for name, value, below in rows
    )
    return f'<dl class="tiles">{inner}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], n_words: int = 1) -> str:
    """A table of cells that are markup already; columns after the first `n_words` hold numbers."""
    css = ["" if n < n_words else ' class="num"' for n in range(len(head))]
    top = "".join(f"<th{c}>{escape(name)}</th>" for c, name in zip(css, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(css, row, strict=True)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def hash_digits(value: str) -> str:
    """A hash, cut short to the eye; copying and printing give all of it."""
    return f'<code class="hash" title="{escape(value)}">{escape(value)}</code>'
