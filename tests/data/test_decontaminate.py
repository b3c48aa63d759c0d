"""Time: 2 s."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from data import decontaminate, minhash
from data.decontaminate import Finding, Item, Ngrams, read_items
from data.files import read_lines
from data.minhash import normalise

SAMPLE = Path(decontaminate.__file__).parent / "samples" / "udhr-europe.jsonl.zst"
RECORDS = [json.loads(line) for line in read_lines(SAMPLE)]
TEXTS = {(record["lang"], record["article"]): record["text"] for record in RECORDS}
GERMAN = [text for (lang, _), text in TEXTS.items() if lang == "de"]
SENTENCES = [line for text in GERMAN for line in text.split("\n") if len(line.split()) > 14]


def found(items: list[str], texts: list[str], n: int = 13) -> list[list[int]]:
    """Numbers of the items that each of the texts holds some of."""
    ngrams = Ngrams([Item(str(i), text) for i, text in enumerate(items)], n)
    rows, numbers = ngrams.match(texts, 0)
    assert set(rows.tolist()) <= set(range(len(texts)))
    return [sorted({int(i) for i in ngrams._places[0, numbers[rows == row]]}) for row in range(len(texts))]


def slowly(items: list[str], texts: list[str], n: int) -> list[list[int]]:
    """The same by sets of n-grams, of which the first item owns each."""
    owners: dict[tuple[str, ...], int] = {}
    for number, item in enumerate(items):
        words = normalise(item).split()
        size = n if len(words) >= n else len(words)
        if size >= min(n, 8):
            for i in range(len(words) - size + 1):
                owners.setdefault(tuple(words[i : i + size]), number)
    lines = [normalise(text).split() for text in texts]
    sizes = {len(ngram) for ngram in owners}
    held = [{tuple(words[i : i + s]) for s in sizes for i in range(len(words) - s + 1)} for words in lines]
    return [sorted({owners[ngram] for ngram in ngrams if ngram in owners}) for ngrams in held]


def test_sentences_are_found_whatever_their_case_and_punctuation() -> None:
    loud = SENTENCES[3].upper().replace(" ", ",  –\n").replace("SS", "ẞ")
    texts = [f"Davor. {SENTENCES[3]} Danach.", loud, "Davor " + loud, GERMAN[0], TEXTS["nl", 1]]
    assert found(SENTENCES[3:4], texts) == [[0], [0], [0], [0], []]


def test_a_near_miss_is_none() -> None:
    words = normalise(SENTENCES[0]).split()[:25]
    almost = [" ".join([*words[:12], "anders", *words[13:]]), " ".join(words[:12]), " ".join(words[13:25])]
    assert found([" ".join(words)], [*almost, " ".join(words[12:25])]) == [[], [], [], [0]]


def test_short_items_are_looked_for_as_a_whole_and_very_short_ones_counted() -> None:
    words = normalise(SENTENCES[0]).split()
    items = [" ".join(words[:k]) for k in (7, 8, 12)] + ["", "Wer?"]
    ngrams = Ngrams([Item(str(i), item) for i, item in enumerate(items)], 13)
    assert ngrams.n_short == 3
    assert found(items, [" ".join(["so", *words[:k], "und"]) for k in (7, 8, 11, 12)]) == [[], [1], [1], [1, 2]]
    assert found(items[:1], [" ".join(words)]) == [[]]
    assert found(["one two three"], ["zero one two three", "one two"], n=3) == [[0], []]


def test_an_ngram_does_not_go_over_from_one_text_to_the_next() -> None:
    words = normalise(SENTENCES[0]).split()[:13]
    assert found([" ".join(words)], [" ".join(words[:6]), " ".join(words[6:]), " ".join(words)]) == [[], [], [0]]
    assert found([" ".join(words[:6]), " ".join(words[6:])], [" ".join(words)]) == [[]]


@given(
    st.lists(st.text("ab ", max_size=30), max_size=5),
    st.lists(st.text("ab ", max_size=60), max_size=5),
    st.integers(2, 11),
    st.integers(1, 50),
)
def test_what_a_search_by_sets_finds_is_found(items: list[str], texts: list[str], n: int, characters: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BATCH_CHARACTERS", characters)
        assert found(items, texts, n) == slowly(items, texts, n)


def test_real_items_are_found_in_real_texts_as_a_search_by_sets_finds_them() -> None:
    rng = random.Random(2)
    texts = rng.sample(list(TEXTS.values()), 150)
    items = [" ".join(text.split()[i : i + rng.randrange(5, 30)]) for text in texts[:60] for i in (0, 20)]
    expected = slowly(items, texts, 13)
    assert sum(map(bool, expected)) >= 55
    assert found(items, texts) == expected


def test_rows_are_counted_from_where_they_begin() -> None:
    ngrams = Ngrams([Item("x", SENTENCES[0])], 13)
    matches = ngrams.match(["nichts", SENTENCES[0]], 70_000)
    assert matches.shape == (2, len(normalise(SENTENCES[0]).split()) - 12)
    assert set(matches[0].tolist()) == {70_001}


def test_a_phrase_in_many_documents_tells_nothing_and_the_rest_is_told() -> None:
    words = [f"w{i}" for i in range(20)]
    phrase = "Dies ist ein Satz der überall steht und mit dem jede Seite dieser Sammlung beginnt"
    items = [Item("a:1", phrase), Item("a:2", f"{phrase} {' '.join(words)}"), Item("b:7", SENTENCES[0])]
    ngrams = Ngrams(items, 13)
    one = [f"{phrase} {i}" for i in range(9)] + [" ".join(words)]
    other = [SENTENCES[0], f"{phrase} {' '.join(words)}", "nichts", phrase]
    matches = {"one": ngrams.match(one, 0), "other": ngrams.match(other, 0)}
    rows, findings = ngrams.contaminated(matches, max_documents=10)
    assert {name: found.tolist() for name, found in rows.items()} == {"one": [9], "other": [0, 1]}
    assert findings == [
        Finding("a:2", " ".join(normalise(items[1].text).split()[3:16]), 20, 2, [("one", 9), ("other", 1)]),
        Finding(
            "b:7",
            " ".join(normalise(SENTENCES[0]).split()[:13]),
            matches["other"][0].tolist().count(0),
            1,
            [("other", 0)],
        ),
    ]
    rows, findings = ngrams.contaminated(matches, max_documents=11)
    assert [found.tolist() for found in rows.values()] == [list(range(10)), [0, 1, 3]]
    assert (findings[0].place, findings[0].n_documents, len(findings[0].examples)) == ("a:1", 11, 3)


def test_nothing_is_found_where_there_is_nothing() -> None:
    ngrams = Ngrams([Item("a", "zu kurz")], 13)
    assert ngrams.match(GERMAN, 0).shape == (2, 0)
    assert Ngrams([], 13).match([], 0).shape == (2, 0)
    assert ngrams.contaminated({"one": ngrams.match(GERMAN, 0)}, 10)[1] == []


def test_items_are_lines_of_json_and_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "eins"}\n\n{"passage": "zwei", "choices": ["drei", {"b": "vier"}], "answer": 2}\n', encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text("\ufeffeins\n \n{drei}", encoding="utf-8")
    items = read_items([str(tmp_path), str(tmp_path / "a.jsonl")])
    lines = [Item("a.jsonl:1", "eins"), *(Item("a.jsonl:3", text) for text in ("zwei", "drei", "vier"))]
    assert items == [*lines, Item("b.txt:1", "eins"), Item("b.txt:3", "{drei}"), *lines]


def test_a_text_file_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gut\n\n\nschön".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt:4"):
        read_items([str(tmp_path / "a.txt")])


@pytest.mark.parametrize("line", ['{"text": 3}', "{}", "[]", "text", "7", '{"text": "\xff"}'])
def test_a_line_that_is_no_item_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        read_items([str(tmp_path / "a.jsonl")])
