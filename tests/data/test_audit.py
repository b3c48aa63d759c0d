import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data.audit import EXAMPLES, READ, UNKNOWN, Audit, write_page

HOSTILE = "<script>alert('x')</script>\" onload=\"x & <b>"

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["read", "quality", "dedup"]),
        st.sampled_from(["de", "fr", ""]),
        st.sampled_from(["", "too_short", "copy"]),
        st.integers(0, 1000),
    ),
    max_size=40,
)
Event = tuple[str, str, str, str, int]


def told(events: list[Event], first: int = 0) -> Audit:
    """What an audit says that has seen these documents, one after another."""
    audit = Audit()
    for i, (source, step, lang, reason, n_bytes) in enumerate(events, first):
        audit.count_record(source, reason if step == READ else "")
        tally = audit.tally(step, lang)
        for pair in (tally.came, *([] if reason else [tally.left])):
            pair[0], pair[1] = pair[0] + 1, pair[1] + n_bytes
        tally.changed += n_bytes % 2
        if reason:
            audit.reject(step, lang, reason, n_bytes, {"source": source, "location": f"{i}", "excerpt": f"text {i}"})
    return audit


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS, st.data())
def test_parts_add_up_to_the_whole_wherever_it_is_cut(tmp_path: Path, events: list[Event], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=4)))
    bounds = [0, *cuts, len(events)]
    paths = []
    for k, (first, end) in enumerate(pairwise(bounds)):
        paths.append(tmp_path / f"{k}.json")
        told(events[first:end], first).save(paths[-1])
    told(events).save(tmp_path / "whole.json")
    Audit.total(paths).save(tmp_path / "sum.json")
    assert json.loads((tmp_path / "sum.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    for step, counts in Audit.total(paths).sums().items():
        here = [event for event in events if event[1] == step]
        assert counts["came"] == [len(here), sum(n for *_, n in here)]
        for i in (0, 1):
            assert counts["came"][i] == counts["left"][i] + sum(pair[i] for pair in counts["rejected"].values())


def test_the_first_examples_are_kept_and_the_language_may_be_unknown() -> None:
    audit = told([("a", "read", "", "too_short", 5)] * (EXAMPLES + 2))
    assert audit.steps["read"].keys() == {UNKNOWN}
    assert [e["location"] for e in audit.steps["read"][UNKNOWN].examples["too_short"]] == ["0", "1", "2"]
    assert audit.steps["read"][UNKNOWN].rejected == {"too_short": [5, 25]}


def test_a_source_that_is_bad_is_refused_with_examples_of_its_own() -> None:
    bad: list[Event] = [("a", "read", "", "copy", 1), ("b", "read", "", "too_short", 1), ("b", "read", "", "copy", 1)]
    audit = told([*bad, *[("b", "read", "de", "", 1)] * 6, ("a", "read", "de", "", 1)])
    audit.refuse_bad_share("b", 0.25)  # exactly so many
    audit.refuse_bad_share("a", 0.5)
    audit.refuse_bad_share("nothing was read of it", 0.0)
    with pytest.raises(UserError) as error:
        audit.refuse_bad_share("b", 0.249)
    assert "corpus.sources.b: 2 of 8 records are bad (too_short 1, copy 1)" in error.value.found
    assert '"excerpt": "text 1"' in error.value.found and '"excerpt": "text 0"' not in error.value.found
    assert error.value.rule == "corpus.max_bad_share = 0.249"


def test_rejections_of_later_steps_are_no_bad_records() -> None:
    told([("a", "quality", "de", "too_short", 1)] * 5).refuse_bad_share("a", 0.0)


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    audit, place = Audit(), {"source": HOSTILE, "location": HOSTILE, "excerpt": HOSTILE}
    audit.count_record(HOSTILE, HOSTILE)
    audit.tally(HOSTILE, HOSTILE).came[:] = [2, 20]
    audit.reject(HOSTILE, HOSTILE, HOSTILE, 10, place)
    write_page(audit, HOSTILE, {HOSTILE: HOSTILE}, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("<b>") == 1, "the one of the page itself"
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34; onload=&#34;x &amp; &lt;b&gt;") >= 14


def test_the_page_has_the_counts_of_every_step_and_language(tmp_path: Path) -> None:
    audit = told([("a", "read", "de", "", 2_000_000)] * 1500 + [("a", "quality", "fr", "too_short", 10)] * 4)
    write_page(audit, "Title", {"documents": "documents-0"}, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    for expected in ("1,500", "3,000.00", "too_short 4", "documents-0", "100.0%", "0.0%", "text 1500", "a · 1500"):
        assert expected in page, expected
    assert page.count("<blockquote>") == EXAMPLES
    write_page(Audit(), "Title", {}, tmp_path / "audit.html")


def test_the_saved_audit_does_not_depend_on_who_came_first(tmp_path: Path) -> None:
    languages = ["fr", "de", "mt"]
    for name, order in (("one", languages), ("two", languages[::-1])):
        told([("a", "read", lang, "", 1) for lang in order]).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert Audit.load(tmp_path / "one").steps.keys() == {"read"}
