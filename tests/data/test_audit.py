import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data.audit import EXAMPLES, READ, UNKNOWN, Audit, write_page

HOSTILE = "<script>alert('x')</script>\" onload=\"x & <b>"

STEPS = ["read", "identify", "quality", "dedup"]
LANGUAGES = ["de", "fr", ""]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["", *STEPS]),
        st.sampled_from(LANGUAGES),
        st.sampled_from(LANGUAGES),
        st.integers(0, 1000),
    ),
    max_size=40,
)
Event = tuple[str, str, str, str, int]
"""Source of a document, the step that rejects it, its language before and after "identify", its bytes."""


def told(events: list[Event], first: int = 0) -> Audit:
    """What an audit says that has seen these documents, one after another."""
    audit = Audit(STEPS)
    for i, (source, rejecting, lang, found, n_bytes) in enumerate(events, first):
        audit.count_record(source, lang, n_bytes, "bad" if rejecting == READ else "")
        if rejecting != READ and found != lang:
            audit.move("identify", (lang, n_bytes), (found, n_bytes + 1))
            lang, n_bytes = found, n_bytes + 1
        if rejecting:
            place = {"source": source, "location": f"{i}", "excerpt": f"text {i}"}
            audit.tally(rejecting, lang).reject("bad", 1, n_bytes, [place])
    audit.follow()
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
    Audit.load(*paths).save(tmp_path / "sum.json")
    assert json.loads((tmp_path / "sum.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_what_comes_to_a_step_is_what_the_one_before_left_for_every_language(events: list[Event]) -> None:
    """Against counting each document at each step."""
    audit, there = told(events), events
    for step in STEPS:
        came = {lang: [e for e in there if e[2] == lang] for lang in LANGUAGES}
        if step == "identify":
            there = [(s, r, b, b, n + (a != b)) for s, r, a, b, n in there]
        there = [e for e in there if e[1] != step]
        left = {lang: [e for e in there if e[2] == lang] for lang in LANGUAGES}
        for lang in LANGUAGES:
            tally = audit.tally(step, lang)
            assert tally.came == [len(came[lang]), sum(e[4] for e in came[lang])]
            assert tally.left == [len(left[lang]), sum(e[4] for e in left[lang])]


def test_the_first_examples_are_kept_and_the_language_may_be_unknown() -> None:
    audit = told([("a", "read", "", "", 5)] * (EXAMPLES + 2))
    assert audit.steps["read"].keys() == {UNKNOWN}
    assert [e["location"] for e in audit.steps["read"][UNKNOWN].examples["bad"]] == ["0", "1", "2"]
    assert audit.steps["read"][UNKNOWN].rejected == {"bad": [5, 25]}


def test_a_source_that_is_bad_is_refused_with_examples_of_its_own(tmp_path: Path) -> None:
    bad: list[Event] = [("a", "read", "", "", 1), ("b", "read", "", "", 1), ("b", "read", "", "", 1)]
    audit = told([*bad, *[("b", "", "de", "de", 1)] * 6, ("a", "", "de", "de", 1)])
    audit.refuse_bad_share("b", 0.25)  # exactly so many
    audit.refuse_bad_share("a", 0.5)
    audit.refuse_bad_share("nothing was read of it", 0.0)
    with pytest.raises(UserError) as error:
        audit.refuse_bad_share("b", 0.249)
    assert "corpus.sources.b: 2 of 8 records are bad (bad 2)" in error.value.found
    assert '"excerpt": "text 1"' in error.value.found and '"excerpt": "text 0"' not in error.value.found
    assert "at most the share corpus.max_bad_share = 0.249 may be bad" in error.value.rule
    with pytest.raises(UserError) as error:
        audit.refuse_bad_share("b", 0.249, tmp_path)
    assert f"{tmp_path}/b/*/rejected.jsonl.zst" in error.value.repair


def test_rejections_of_later_steps_are_no_bad_records() -> None:
    told([("a", "quality", "de", "de", 1)] * 5).refuse_bad_share("a", 0.0)


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    audit, place = Audit(), {"source": HOSTILE, "location": HOSTILE, "excerpt": HOSTILE}
    audit.count_record(HOSTILE, HOSTILE, 20, HOSTILE)
    audit.tally(HOSTILE, HOSTILE).reject(HOSTILE, 1, 10, [place])
    audit.follow()
    write_page(audit, HOSTILE, {HOSTILE: HOSTILE}, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("<b>") == 1, "the one of the page itself"
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34; onload=&#34;x &amp; &lt;b&gt;") >= 14


def test_the_page_has_the_counts_of_every_step_and_language(tmp_path: Path) -> None:
    audit = told([("a", "", "de", "de", 2_000_000)] * 1500 + [("a", "quality", "fr", "fr", 10)] * 4)
    write_page(audit, "Title", {"documents": "documents-0"}, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    for expected in ("1,500", "3,000.00", "bad 4", "documents-0", "100.0%", "0.0%", "text 1500", "a · 1500"):
        assert expected in page, expected
    assert page.count("<blockquote>") == EXAMPLES
    write_page(Audit(), "Title", {}, tmp_path / "audit.html")


def test_the_saved_audit_does_not_depend_on_who_came_first(tmp_path: Path) -> None:
    languages = ["fr", "de", "mt"]
    for name, order in (("one", languages), ("two", languages[::-1])):
        told([("a", "", lang, lang, 1) for lang in order]).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert [*Audit.load(tmp_path / "one").steps] == STEPS
