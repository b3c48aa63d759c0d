import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import sentencepiece

from configs.enums import LanguageBalance
from configs.errors import UserError
from configs.text import TokenizerConfig
from data import tokenizer
from data.fertility import read_parallel, report_table, tokenizer_report
from data.files import find_files, sha256

EU24 = ["bg", "cs", "da", "de", "el", "en", "es", "et", "fi", "fr", "ga", "hr"]
EU24 += ["hu", "it", "lt", "lv", "mt", "nl", "pl", "pt", "ro", "sk", "sl", "sv"]
CFG = TokenizerConfig(vocab_size=4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on the very text that it is measured on."""
    words: Counter[str] = Counter()
    for texts in read_parallel(CFG.parity_text, EU24).values():
        for text in texts:
            tokenizer.count_words(text, words)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.export(tokenizer.train(words, CFG), path)
    return path


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def article(lang: str, name: int | str, text: str) -> dict[str, object]:
    return {"lang": lang, "article": name, "text": text}


def test_figures_are_those_counted_by_hand_with_sentencepiece(folder: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = read_parallel(CFG.parity_text, ["el", "en", "mt"])
    ids = {lang: [i for text in articles for i in pieces.encode(text)] for lang, articles in texts.items()}
    report = tokenizer_report(folder, CFG, ["mt", "en", "el"])
    for lang, row in report["languages"].items():
        n, whole = len(ids[lang]), "\n".join(texts[lang])
        assert (row["tokens"], row["words"]) == (n, len(whole.split()))
        assert (row["fertility"], row["parity"]) == (n / len(whole.split()), n / len(ids["en"]))
        assert row["bytes_per_token"] == (len(whole.encode()) - len(texts[lang]) + 1) / n
        assert row["byte_share"] == pytest.approx(sum(map(pieces.is_byte, ids[lang])) / n)
    sets = [set(found) for found in ids.values()]
    shared, everything = set().union(*(a & b for a, b in combinations(sets, 2))), set().union(*sets)
    assert (report["entries_in_use"], report["vocab_size"]) == (len(everything), 4096)
    assert report["single_language_share"] == pytest.approx(1 - len(shared) / len(everything))
    a, b, c = sorted(map(len, ids.values()))
    assert report["together"]["worst_parity"] == c / len(ids["en"]) and report["together"]["worst"] in ("el", "mt")
    assert report["together"]["gini"] == pytest.approx(2 * (c - a) / (3 * (a + b + c)))


def test_published_figures_over_24_languages_are_those_that_were_published(folder: Path) -> None:
    """The table they come from gives its own means, worst languages and Gini coefficients."""
    published = tokenizer_report(folder, CFG, EU24)["published"]
    for name, fertility, parity, worst, gini in [
        ("mistral32k", 2.87, 2.05, "el 5.46", 0.149),
        ("llama3", 2.43, 1.94, "mt 2.71", 0.112),
        ("tekken131k", 2.14, 1.68, "mt 2.59", 0.112),
        ("gemma3", 2.07, 1.62, "mt 2.27", 0.103),
        ("gpt4o", 1.98, 1.59, "el 2.18", 0.098),
    ]:
        found = published[name]["together"]
        assert (found["fertility"], found["parity"]) == pytest.approx((fertility, parity), abs=0.006)
        assert f"{found['worst']} {found['worst_parity']:.2f}" == worst
        assert found["gini"] == pytest.approx(gini, abs=0.001)
        assert published[name]["source"]


def test_no_published_figures_beside_another_text_or_without_english(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "p.jsonl", *(article(lang, 1, "A few words.") for lang in ("de", "en", "fr")))
    assert tokenizer_report(folder, TokenizerConfig(vocab_size=4096, parity_text=other))["published"] == {}
    report = tokenizer_report(folder, CFG, ["de", "fr"])
    assert report["published"] == {} and report["reference"] == "the mean"
    assert sum(row["parity"] for row in report["languages"].values()) == pytest.approx(2)


def test_an_entry_that_no_merge_leads_to_is_dead(folder: Path, tmp_path: Path) -> None:
    assert tokenizer_report(folder, CFG, ["de", "en"])["dead"] == 0
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    fast["model"]["merges"] = [pair for pair in fast["model"]["merges"] if "".join(pair) != "\u2581dreptul"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    report = tokenizer_report(tmp_path, CFG, ["de", "en"])
    assert (report["dead"], report["dead_examples"]) == (1, [" dreptul"])


def test_it_says_when_text_and_tokenizer_know_each_other(folder: Path) -> None:
    (file,) = find_files(CFG.parity_text, ())
    assert tokenizer_report(folder, CFG, ["de", "en"], trained_on=["0" * 64])["warnings"] == []
    (warning,) = tokenizer_report(folder, CFG, ["de", "en"], trained_on={sha256(file.path)})["warnings"]
    assert warning.startswith("trained on the text")
    balanced = TokenizerConfig(vocab_size=4096, balance=LanguageBalance.parity)
    (warning,) = tokenizer_report(folder, balanced, ["de", "en"])["warnings"]
    assert "balanced" in warning
    given = TokenizerConfig(vocab_size=4096, balance=LanguageBalance.parity, path="tokenizer.model")
    assert tokenizer_report(folder, given, ["de", "en"])["warnings"] == []


def test_the_report_is_json_and_its_table_has_a_line_for_each_language(folder: Path) -> None:
    report = tokenizer_report(folder, CFG, ["el", "en", "mk"])
    header, *_ = table = report_table(json.loads(json.dumps(report))).split("\n")
    assert header.split()[:6] == ["language", "bytes/token", "byte", "tokens", "this", "tokenizer"]
    assert table[7].startswith("tokens per word, and in brackets relative to English for the same content, on package:")
    assert [line.split()[0] for line in table[1:7]] == ["el", "en", "mk", "mean", "worst", "Gini"]
    assert table[1].endswith("2.31 (2.18)") and len({len(line) for line in table[:7]}) == 1
    row = report["languages"]["el"]
    assert f"{row['fertility']:.2f} ({row['parity']:.2f})" in table[1]
    assert table[3].split()[-1] == f"({report['languages']['mk']['parity']:.2f})"  # nobody has published Macedonian


def test_parallel_text_is_what_all_languages_have(tmp_path: Path) -> None:
    rows = [article("de", 2, "zwei"), article("de", 1, "eins"), article("pt", 1, "um"), article("pt", 2, "dois")]
    path = write(tmp_path / "p.jsonl", *rows, article("en", 1, "one"), article("pt", 3, "três"))
    assert read_parallel(path) == {"de": ["eins"], "en": ["one"], "pt": ["um"]}
    assert read_parallel(path, ["pt-BR", "de", "fi"]) == {"de": ["eins", "zwei"], "pt-BR": ["um", "dois"]}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([article("de", 1, "x")], "1 articles in 1 of the languages de"),
        ([article("de", 1, "x"), article("en", 2, "y")], "0 articles in 2 of the languages de en"),
        ([{"lang": "de", "text": "x"}], "the line"),
        ([["de", 1, "x"]], "the line"),
        ([article(["de"], 1, "x")], "the line"),  # type: ignore[arg-type]
    ],
)
def test_text_that_is_not_parallel_is_refused(tmp_path: Path, records: list[object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_parallel(write(tmp_path / "p.jsonl", *records))
