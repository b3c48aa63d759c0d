import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from babel import Locale
from babel.units import format_unit

from configs.errors import UserError
from configs.schema import SuiteConfig
from eval.suites import FAMILIES, LANGUAGES, build_suite

BOTH = SuiteConfig(tasks=["agreement", "countries"], max_items_per_language=40)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return build_suite(BOTH, LANGUAGES, tmp_path_factory.mktemp("suites"))


def items_of(suite: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (suite / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def index_of(suite: Path) -> dict:
    return json.loads((suite / "suite.json").read_text(encoding="utf-8"))


def test_every_language_is_asked_and_the_rest_is_named(suite):
    index = index_of(suite)
    assert index["left_out"] == {"agreement_hu": 0}
    assert index["tasks"].keys() == {f"{f}_{lang}" for f in FAMILIES for lang in LANGUAGES} - {"agreement_hu"}
    for task, facts in index["tasks"].items():
        assert len(items_of(suite, task)) == facts["items"] <= min(40, facts["items_found"])
        assert facts["items"] >= 16


def test_items_are_well_formed(suite):
    for task, facts in index_of(suite)["tasks"].items():
        items = items_of(suite, task)
        assert len({(item["query"], *sorted(item["choices"])) for item in items}) > 0.9 * len(items)
        for item in items:
            assert len(set(item["choices"])) == len(item["choices"]) == round(1 / facts["chance"])
            assert 0 <= item["gold"] < len(item["choices"])
            assert not item["query"].endswith(" ")
            assert all(choice.startswith(" ") == bool(item["query"]) for choice in item["choices"])
            assert "\u00a0" not in item["query"] + "".join(item["choices"])


def test_right_choices_stand_at_every_place(suite):
    for family, n_choices in (("agreement", 2), ("countries", 4)):
        places = Counter(item["gold"] for lang in LANGUAGES if (family, lang) != ("agreement", "hu")
                         for item in items_of(suite, f"{family}_{lang}"))  # fmt: skip
        assert len(places) == n_choices
        assert max(places.values()) < 1.2 * places.total() / n_choices


@pytest.mark.parametrize("lang", ["cs", "en", "fr", "ga", "lv", "mt", "pl", "pt", "ro", "sl"])
def test_agreement_is_what_babel_formats(lang):
    locale = Locale.parse({"pt": "pt_PT"}.get(lang, lang))
    right_phrases = {}
    for item in [item for group in FAMILIES["agreement"](lang) for item in group]:
        phrases = [item.query + choice for choice in item.choices]
        number = int(re.search(r"\d+", phrases[0])[0])
        if number > 25:
            continue
        if number not in right_phrases:
            right_phrases[number] = {
                re.sub(r"[\u00a0\u202f]", " ", format_unit(number, unit, length, locale=locale))
                for unit in locale._data["unit_patterns"]
                for length in ("long", "short")
            }
        assert phrases[item.gold] in right_phrases[number]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_form_liked_whatever_the_number_scores_one_half(lang):
    for items in FAMILIES["agreement"](lang):
        there, back = (
            [
                re.sub(r"\d+", "#", item.query + choice)
                for choice in (item.choices[item.gold], item.choices[1 - item.gold])
            ]
            for item in items
        )
        assert there == back[::-1]


@pytest.mark.parametrize(
    ("lang", "number", "right", "wrong"),
    [("en", "1", " kilometer", " kilometers"), ("pl", "1", " petabajt", " petabajty"), ("de", "1", " Jahr", " Jahre")],
)
def test_agreement_has_pairs_one_would_expect(lang, number, right, wrong):
    items = [item for group in FAMILIES["agreement"](lang) for item in group]
    assert any((i.query, i.choices[i.gold], i.choices[1 - i.gold]) == (number, right, wrong) for i in items)


def test_countries_are_named_in_their_own_words(suite):
    polish = {item.query: item for (item,) in FAMILIES["countries"]("pl")}
    assert polish["angielski: Germany\npolski:"].choices[0] == " Niemcy"
    english = {item.query: item for (item,) in FAMILIES["countries"]("en")}
    assert english["French: Allemagne\nEnglish:"].choices[0] == " Germany"
    portuguese = {item.query: item for (item,) in FAMILIES["countries"]("pt")}
    assert portuguese["inglês: Czechia\nportuguês:"].choices[0] == " Chéquia"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_countries_cannot_be_answered_by_copying_or_by_length(lang):
    shortest = 0
    groups = FAMILIES["countries"](lang)
    for (item,) in groups:
        asked = item.query.split("\n")[0].partition(": ")[2]
        assert asked not in [choice.strip() for choice in item.choices]
        shortest += len(item.choices[0].encode()) < min(len(choice.encode()) for choice in item.choices[1:])
    assert shortest < 0.4 * len(groups)


def test_same_settings_give_the_same_folder_and_others_another(suite, tmp_path):
    again = build_suite(BOTH, [*reversed(LANGUAGES), "is"], tmp_path)
    assert again.name == suite.name
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in suite.iterdir()}
    fewer = build_suite(SuiteConfig(tasks=["agreement", "countries"], max_items_per_language=20), LANGUAGES, tmp_path)
    one_language = build_suite(BOTH, ["pl"], tmp_path)
    assert len({again, fewer, one_language}) == 3
    assert (one_language / "agreement_pl.jsonl").read_bytes() == (suite / "agreement_pl.jsonl").read_bytes()


def test_licence_stands_beside_the_data(suite):
    assert "UNICODE LICENSE V3" in (suite / "LICENSE-CLDR.txt").read_text(encoding="utf-8")
    assert index_of(suite)["origin"].startswith("CLDR ")


def test_several_at_once_leave_one_whole_folder(tmp_path):
    small = SuiteConfig(tasks=["countries"], max_items_per_language=10)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: build_suite(small, ["mt", "ga"], tmp_path), range(8)))
    assert list(tmp_path.iterdir()) == list(folders)


def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path, monkeypatch):
    written = []

    def write_until_the_disk_is_full(self: Path, content: bytes) -> None:
        written.append(self)
        if len(written) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", write_until_the_disk_is_full)
    with pytest.raises(OSError, match="no space"):
        build_suite(BOTH, ["pl"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(UserError, match="no questions"):
        build_suite(SuiteConfig(tasks=["agreement"]), ["hu"], tmp_path)
    assert not list(tmp_path.iterdir())
