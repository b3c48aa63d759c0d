import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from data.files import PACKAGE_ROOT, read_lines
from data.quality import (
    BOUNDS,
    TAIL,
    Limits,
    derive,
    measure,
    quality,
    read_thresholds,
    repair,
    save_thresholds,
    scorer,
)
from data.sources import Document
from tests.data.fasttext_file import write_classifier

SHIPPED = "package:data/thresholds.yaml"


def document(text: str, lang: str = "en", source: str = "source") -> Document:
    return Document("x", lang, text, source, "file:1", {})


DECLARATION = [
    document(record["text"], record["lang"], f"articles {record['article'] % 2}")
    for record in map(json.loads, read_lines(PACKAGE_ROOT / "data/samples/udhr-europe.jsonl.zst"))
]
ARTICLES = {lang: [d for d in DECLARATION if d.lang == lang] for lang in ("de", "en", "fi", "pt")}
PROSE = " ".join(d.text.replace("\n", " ") for d in ARTICLES["en"][3:9])


def naive_ngrams(words: list[str]) -> dict[str, float]:
    """The same shares by comparing every n-gram with all before it, and marking characters one by one."""
    found, starts = {}, [sum(map(len, words[:i])) for i in range(len(words))]
    n_characters = max(sum(map(len, words)), 1)
    for n in range(2, 11):
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        marked = set()
        for i, ngram in enumerate(ngrams):
            if ngram in ngrams[:i]:
                marked |= set(range(starts[i], starts[i] + len("".join(ngram))))
        top = max((k * len("".join(g)) for g, k in Counter(ngrams).items() if k > 1), default=0)
        if n < 5:
            found[f"top_{n}_grams"] = min(top / n_characters, 1.0)
        else:
            found[f"duplicate_{n}_grams"] = len(marked) / n_characters
    return found


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "Dd"]), max_size=60))
def test_repeated_ngrams_are_those_of_a_naive_search(words: list[str]) -> None:
    measured = measure(document(" ".join(words)), [])
    expected = naive_ngrams([word.lower() for word in words])
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


@given(st.text())
def test_every_text_has_a_value_for_every_heuristic(text: str) -> None:
    measured = measure(document(text), ["the"])
    assert list(measured) == list(BOUNDS)
    assert all(0 <= value <= 1 for name, value in measured.items() if not name.endswith(("words", "length", "breaks")))


def test_values_are_what_their_names_say() -> None:
    measured = measure(document("The cat sat.\n\n12 34 cats\nThe cat sat.\n"), ["the", "sat.", "of"])
    assert measured["words"] == 9
    assert measured["mean_word_length"] == pytest.approx(28 / 9)
    assert measured["non_alphabetic_words"] == pytest.approx(2 / 9)
    assert measured["stop_words"] == 2
    assert measured["line_breaks"] == pytest.approx(2 / 9)
    assert measured["line_punctuation"] == pytest.approx(2 / 3)
    assert measured["duplicate_lines"] == pytest.approx(1 / 3)
    assert measured["duplicate_line_characters"] == pytest.approx(12 / 34)
    assert measured["top_2_grams"] == pytest.approx(2 * 7 / 28)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        ("Too short to tell.", "words"),
        ("x y z " + PROSE.replace(" ", " q w "), "mean_word_length"),
        (" ".join(f"{i} {w}" for i, w in enumerate(PROSE.split())), "non_alphabetic_words"),
        (
            "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed eiusmod tempor incididunt labore magna.",
            "stop_words",
        ),
        (PROSE.replace(" ", "\n"), "line_breaks"),
        (PROSE.replace(",", "").replace(". ", ".\n").replace(".", ""), "line_punctuation"),
        ("\n".join([*PROSE.split(". "), *["Read more about this and other articles like it."] * 9]), "duplicate_lines"),
        (f"{PROSE} {'buy shoes now ' * 40}.", "top_2_grams"),
        (f"{PROSE} {PROSE}", "duplicate_5_grams"),
    ],
)
def test_each_kind_of_poor_text_is_rejected_by_its_name(text: str, reason: str) -> None:
    assert quality(SHIPPED)(document(text)) == reason


def test_a_text_whose_language_is_less_sure_than_usual_in_it_is_rejected() -> None:
    told = document(PROSE)
    told.lang_score = 0.35
    assert quality(SHIPPED)(told) == "language_score"


def test_sound_articles_pass_in_every_language_that_has_limits() -> None:
    judge, known = quality(SHIPPED), read_thresholds(SHIPPED)
    judged = [d for d in DECLARATION if d.lang in known and len(d.text.split()) > 20]
    assert len(known) >= 15
    assert sum(judge(d) == "" for d in judged) / len(judged) > 0.95


def test_a_language_without_limits_is_not_filtered_and_a_region_has_those_of_its_language() -> None:
    spam = "buy shoes now " * 100
    assert quality(SHIPPED)(document(spam, "mt")) == quality(SHIPPED)(document(spam, "")) == ""
    assert quality(SHIPPED)(document(spam, "pt-BR")) == quality(SHIPPED)(document(spam, "pt")) != ""


def test_derived_limits_leave_a_small_tail_of_the_reference_text_beyond_each() -> None:
    members = ARTICLES["fi"] * 10
    found = derive({"fi": members}, min_documents=300)["fi"]
    long = [d for d in members if len(d.text.split()) >= found.limits["words"][0]]
    for name, (low, high) in found.limits.items():
        beyond = sum(not low <= measure(d, found.stop_words)[name] <= high for d in long) / len(long)
        assert beyond <= 3 * TAIL, name
        assert BOUNDS[name][0][0] <= low <= BOUNDS[name][0][1]
        assert BOUNDS[name][1][0] - 0.001 <= high <= BOUNDS[name][1][1] + 0.001


def test_a_language_with_too_little_text_is_named_with_its_count_and_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert derive({"de": ARTICLES["de"] * 20, "fi": ARTICLES["fi"]}).keys() == {"de"}
    assert "fi: 31 documents are too few" in capsys.readouterr().out


def test_a_word_of_one_subject_is_no_stop_word_however_frequent() -> None:
    told = [document(f"{d.text} Paket Paket Paket", "de", "packages") for d in ARTICLES["de"]]
    stop_words = derive({"de": told + ARTICLES["de"]}, min_documents=50)["de"].stop_words
    assert {"und", "der", "auf"} <= set(stop_words)
    assert "paket" not in stop_words
    assert "paket" in derive({"de": told}, min_documents=30)["de"].stop_words


def test_limits_do_not_depend_on_hash_seeds_or_order(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.data.test_quality import ARTICLES, derive, save_thresholds\n"
        "order = slice(None, None, int(sys.argv[2]))\n"
        "found = derive({k: v[order] for k, v in [*ARTICLES.items()][order]}, min_documents=30)\n"
        "save_thresholds(found, Path(sys.argv[1]), ['header'])\n"
    )
    for seed, order in ((1, "1"), (2, "-1")):
        told = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(PACKAGE_ROOT)}
        subprocess.run([sys.executable, "-c", script, tmp_path / f"{seed}.yaml", order], check=True, env=told)
    assert (tmp_path / "1.yaml").read_bytes() == (tmp_path / "2.yaml").read_bytes()


def test_limits_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    found = {"no": Limits(500, ["og", "no", "on", "ø"], {"words": [10.0, 100000.0], "top_2_grams": [0.0, 0.2]})}
    save_thresholds(found, tmp_path / "thresholds.yaml", ["from nowhere"])
    assert read_thresholds(str(tmp_path / "thresholds.yaml")) == found
    assert (tmp_path / "thresholds.yaml").read_text().startswith("# from nowhere\n")


@pytest.mark.parametrize(
    "content",
    [
        "de: [",
        "- de",
        "de: {documents: 1}",
        "de: {documents: 1, stop_words: [], limits: {words: 5}}",
        "de: {documents: 1, stop_words: [], limits: {wards: [0, 1]}}",
    ],
)
def test_a_file_of_limits_that_is_none_is_told_with_its_form(tmp_path: Path, content: str) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"(?s)thresholds\.yaml: .*by language: documents, stop_words, and limits"):
        quality(str(path))


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("Il sâ\x80\x99agit dâ\x80\x99un paquet", "Il s’agit d’un paquet"),
        ("l’humanitÃ© entiÃ¨re est libre", "l’humanité entière est libre"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("a\x00b\x07c\x1b[31md\x0ce\tf\ng\x8dh\ufeffi", "abcde\tf\nghi"),
        ("cafe\u0301", "café"),
        ("bars ▁▂▃", "bars _▂▃"),
    ],
)
def test_text_that_was_decoded_wrongly_is_mended(broken: str, mended: str) -> None:
    told = document(broken)
    assert repair(told) == ""
    assert told.text == mended


@pytest.mark.parametrize(
    "text", ["“curly” ‘quotes’ „hier“ «là»", "ﬁn ﬂeur", "ＦＵＬＬ ｱ", "x² ½ № ™ …", "&lt;b&gt; &uuml;", "Ł Ă Ñ"]
)
def test_characters_that_are_meant_stay(text: str) -> None:
    told = document(text)
    repair(told)
    assert told.text is text


def test_sound_text_stays_the_same_object_in_every_language() -> None:
    for told in DECLARATION:
        if unicodedata.is_normalized("NFC", text := told.text):
            repair(told)
            assert told.text is text, told.lang


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_repaired_text_has_no_control_characters_and_one_spelling(text: str) -> None:
    told = document(text)
    repair(told)
    assert not {c for c in told.text if unicodedata.category(c) == "Cc"} - {"\t", "\n"}
    assert "\u2581" not in told.text
    assert unicodedata.is_normalized("NFC", told.text)


def test_the_scorer_gives_the_probability_of_the_label_that_means_good(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "quality.bin", {"__label__cc": "spam shoes", "__label__hq": "theorem proof"})
    step = scorer(model, 0.6)
    good, poor, mixed = document("theorem\nproof"), document("shoes spam spam"), document("nothing it knows")
    assert [step(good), step(poor), step(mixed)] == ["", "low_quality", "low_quality"]
    assert good.quality > 0.99 > 0.6 > mixed.quality > 0.4 > poor.quality
    assert scorer(model, 0.6, "__label__cc")(poor) == ""


def test_a_scorer_without_the_label_is_told_which_it_has(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "quality.bin", {"__label__bad": "spam", "__label__good": "proof"})
    with pytest.raises(UserError, match="no label __label__hq") as told:
        scorer(model, 0.5)
    assert told.value.repair == "one of __label__bad, __label__good"
