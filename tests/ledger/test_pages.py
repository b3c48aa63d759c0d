"""Pages: numbers as people read them, gaps for what is not there, and nothing from a file that becomes markup."""

import math

import pytest

from ledger.pages import change, count, fixed, moment, percent, render, short


def test_numbers_read_as_people_write_them() -> None:
    assert (count(983_040), count(1.5e9), count(None)) == ("983,040", "1.5B", "GAP: not recorded")
    assert (short(80_000), short(0.25), short(999_960)) == ("80k", "0.25", "1M")
    assert (fixed(-0.5), fixed(math.nan)) == ("−0.50", "GAP: not a finite number")
    assert (percent(0.4137), change(4.0, 1.0), change(0.0, 1.0)[:3]) == ("41.4 %", "−75.0 %", "GAP")
    assert (short(3.19e18), short(9.4e12), short(0.0), short(-1500.0)) == ("3.19e18", "9.4T", "0", "−1.5k")
    assert moment(1_764_000_000) == "2025-11-24 16:00 UTC" and moment(None).startswith("GAP")


def test_a_reason_stands_for_itself():
    assert count("GAP: no meter") == fixed("GAP: no meter") == short("GAP: no meter") == "GAP: no meter"


@pytest.mark.parametrize(
    ("template", "page"),
    [
        ("{{ run.nothing.at.all }}", "GAP: not recorded"),
        ("{{ none }}{{ run.empty }}", "GAP: not recordedGAP: not recorded"),
        ("{{ run.nothing|count }}", "GAP: not recorded"),
        ('a{{ ", b" if run.nothing }}', "a"),
        ("{{ run.zero }}", "0"),
        ("{{ run.nan is finite }}, {{ run.zero is finite }}", "False, True"),
    ],
)
def test_what_is_missing_is_a_gap(tmp_path, template, page):
    (tmp_path / "page.txt.j2").write_text(template)
    assert render(tmp_path / "page.txt.j2", run={"empty": "", "zero": 0, "nan": math.nan}) == page


def test_text_from_files_becomes_no_markup_of_the_page(tmp_path):
    for kind in ("html", "md", "txt"):
        (tmp_path / f"page.{kind}.j2").write_text("{{ a }} {{ gap(a) }}")
    page = {kind: render(tmp_path / f"page.{kind}.j2", a="<b>|") for kind in ("html", "md", "txt")}
    assert page == {
        "html": '&lt;b&gt;| <span class="gap">GAP: &lt;b&gt;|</span>',
        "md": "<b>\\| GAP: <b>\\|",
        "txt": "<b>| GAP: <b>|",
    }
