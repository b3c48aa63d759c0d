import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.text import IdentifyConfig
from data.files import PACKAGE_ROOT, read_lines
from data.language import SAMPLE_CHARACTERS, bcp47, identify, open_identifier
from data.sources import Document
from tests.data.fasttext_file import write_classifier

OFFICIAL = [
    "bg",
    "cs",
    "da",
    "de",
    "el",
    "en",
    "es",
    "et",
    "fi",
    "fr",
    "ga",
    "hr",
    "hu",
    "it",
    "lt",
    "lv",
    "mt",
    "nl",
    "pl",
    "pt",
    "ro",
    "sk",
    "sl",
    "sv",
]
FINNISH = "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.\n"
ENGLISH = "All human beings are born free and equal in dignity and rights.\n"
GERMAN = "Alle Menschen sind frei und gleich an Würde und Rechten geboren."


def document(text: str, lang: str = "de") -> Document:
    return Document("x", lang, text, "source", "file:1", {})


def declaration() -> dict[str, list[str]]:
    found = defaultdict(list)
    for line in read_lines(PACKAGE_ROOT / "data/samples/udhr-europe.jsonl.zst"):
        record = json.loads(line)
        found[record["lang"]].append(record["text"])
    return found


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("__label__de", "de"),
        ("__label__deu_Latn", "de"),
        ("deu_Latn", "de"),
        ("ekk_Latn", "et"),
        ("lvs_Latn", "lv"),
        ("no", "nb"),
        ("nno_Latn", "nn"),
        ("srp_Cyrl", "sr"),
        ("srp_Latn", "sr-Latn"),
        ("sh", "sr-Latn"),
        ("pt_BR", "pt-BR"),
        ("sr-Latn-RS", "sr-Latn-RS"),
        ("und", "und"),
        ("", ""),
    ],
)
def test_labels_of_all_models_become_the_same_codes(label: str, code: str) -> None:
    assert bcp47(label) == code
    assert bcp47(code) == code


@pytest.mark.parametrize(("model", "least"), [("lid176", 0.97), ("langid", 0.96)])
def test_the_shipped_models_tell_the_official_languages_apart(model: str, least: float) -> None:
    texts, model_of = declaration(), open_identifier(model)
    found = {lang: [model_of(t).language == lang for t in texts[lang][1:]] for lang in OFFICIAL}
    assert sum(map(sum, found.values())) / sum(map(len, found.values())) > least
    assert {lang for lang, hits in found.items() if sum(hits) < 0.9 * len(hits)} <= {"hr"}


@pytest.mark.parametrize("model", ["lid176", "langid"])
def test_line_breaks_and_nothing_at_all_are_no_trouble(model: str) -> None:
    found = open_identifier(model)
    assert found(GERMAN.replace(" ", "\n")).language == "de"
    assert found(f"\0\n{GERMAN}\0").language == "de"
    assert 0 <= found("\n").score < 0.5


@given(st.text(max_size=300))
def test_any_text_has_a_guess_with_a_probability(text: str) -> None:
    guess = open_identifier("lid176")(text)
    assert 0 <= guess.score <= 1
    assert guess.language == bcp47(guess.language) != guess.second


def test_a_long_text_is_judged_by_more_than_its_beginning() -> None:
    head = (ENGLISH * 100)[: SAMPLE_CHARACTERS // 3]
    assert open_identifier("lid176")(head + FINNISH * 1000).language == "fi"


@pytest.mark.parametrize(
    ("text", "lang", "reason", "found"),
    [
        (GERMAN, "de", "", "de"),
        (GERMAN, "deu_Latn", "", "de"),
        (GERMAN, "fr", "", "de"),
        (GERMAN, "", "", "de"),
        (GERMAN, "de-AT", "", "de-AT"),
        ("Guten Tag!", "deu_Latn", "", "de"),
        ("Guten Tag!", "und", "language_unknown", "und"),
        ("Guten Tag!", "", "language_unknown", ""),
        ("0.4.17-2 (x86_64) 0.4.18-1 (i386) 0.4.18-2", "de", "language_unsure", "de"),
    ],
)
def test_a_text_gets_the_language_it_is_in_or_a_reason(text: str, lang: str, reason: str, found: str) -> None:
    told = document(text, lang)
    assert identify(IdentifyConfig(model="lid176", min_score=0.5, min_characters=25))(told) == reason
    assert told.lang == found
    assert (told.lang_score == 1.0) == (len(text) < 25), "a score is only given where a model was asked"


@pytest.fixture
def rivals(tmp_path: Path) -> IdentifyConfig:
    """Two models in FLORES labels; the second takes `kruh` for Serbian and `most` for German."""
    labels = {"__label__hrv_Latn": "kruh vlak most", "__label__srp_Cyrl": "voz", "__label__deu_Latn": "brot"}
    first = write_classifier(tmp_path / "first.bin", labels)
    labels = {"__label__hrv_Latn": "vlak", "__label__srp_Cyrl": "voz kruh", "__label__deu_Latn": "brot most"}
    second = write_classifier(tmp_path / "second.bin", labels)
    return IdentifyConfig(model=first, second=second, confused=[["hrv_Latn", "bs", "sr"]], min_characters=1)


@pytest.mark.parametrize(
    ("text", "reason", "found"),
    [("vlak", "", "hr"), ("kruh", "language_disputed", "de"), ("most", "", "hr"), ("brot", "", "de")],
)
def test_a_second_model_is_heard_within_a_group_that_is_easily_confused(
    rivals: IdentifyConfig, text: str, reason: str, found: str
) -> None:
    told = document(text)
    assert identify(rivals)(told) == reason
    assert told.lang == found


def test_the_language_that_comes_next_is_kept(rivals: IdentifyConfig) -> None:
    told = document("kruh brot brot vlak vlak")
    identify(rivals)(told)
    assert (told.lang, told.lang_second) == ("hr", "de")
    assert 0.5 < told.lang_score < 1


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be opened"), (b"no model", "wrong file format")])
def test_a_model_that_is_none_is_told_before_anything_is_read(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "model.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} .*{problem}"):
        identify(IdentifyConfig(model=str(path)))
