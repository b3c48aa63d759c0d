"""Time: 8 s. Real texts, and hashes made up where bits and bytes count."""

import json
import random
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.text import DedupConfig
from data import dedup
from data.dedup import document_hashes, find_copies, find_repeated_ids, write_columns
from data.files import read_lines
from data.minhash import normalise

SAMPLE = Path(dedup.__file__).parent / "samples" / "udhr-europe.jsonl.zst"
ARTICLES = sorted((json.loads(line)["text"] for line in read_lines(SAMPLE)), key=len)[-200:]
ORDER = ["CC0-1.0", "CC-BY-4.0"]


class Doc(NamedTuple):
    id: str
    text: str
    licence: str = "CC0-1.0"
    source: str = "web"


class Outcome(NamedTuple):
    """By id: dropped exactly, dropped as near, and for whom the rest stays."""

    exact: set[str]
    near: set[str]
    kept: dict[str, int]


def write(folder: Path, files: Sequence[Sequence[Doc]], near: bool = True) -> list[Path]:
    paths, cfg = [], DedupConfig(near=near, licence_order=ORDER)
    for number, docs in enumerate(files):
        paths.append(folder / f"{number}.npy")
        blocks = [document_hashes(d.source, [d.id], [d.licence], [d.text], cfg) for d in docs]
        write_columns(paths[-1], blocks or [document_hashes("web", [], [], [], cfg)])
    return paths


def outcome(files: Sequence[Sequence[Doc]], near: bool = True, gone: dict[int, list[int]] | None = None) -> Outcome:
    found = Outcome(set(), set(), {})
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), files, near)
        without = {paths[number]: np.array(rows) for number, rows in (gone or {}).items()}
        for docs, path, (named, copies) in zip(files, paths, find_copies(paths, without), strict=True):
            assert named == path
            assert all(np.array_equal(rows, np.unique(rows)) for rows in (copies.exact, copies.near, copies.kept))
            found.exact.update(docs[row].id for row in copies.exact)
            found.near.update(docs[row].id for row in copies.near)
            found.kept.update((docs[row].id, n) for row, n in zip(copies.kept, copies.n_alike.tolist(), strict=True))
    return found


def shingles(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def edited(text: str, n_edits: int, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(n_edits):
        words[rng.randrange(len(words))] = f"x{rng.random()}"
    return " ".join(words)


def test_what_a_comparison_of_all_with_all_finds_is_found() -> None:
    """Real texts, each with copies that differ more and more; the truth is Jaccard over sets of 5-grams."""
    rng = random.Random(5)
    docs = [
        Doc(f"{i}/{n}", edited(" ".join(ARTICLES[4 * i : 4 * i + 4]), n, rng))
        for i in range(50)
        for n in (0, 1, 2, 5, 100)
    ]
    sets = {doc.id: shingles(doc.text) for doc in docs}
    alike = {
        (one.id, other.id): len(a & b) / len(a | b)
        for one, other in combinations(docs, 2)
        if (a := sets[one.id]) & (b := sets[other.id])
    }
    found = outcome([docs[::2], docs[1::2]])
    close = [pair for pair, similarity in alike.items() if similarity >= 0.9]
    assert len(close) > 60
    missed = [pair for pair in close if not {*pair} & (found.near | found.exact)]
    assert len(missed) <= 0.01 * len(close)
    lonely = {doc.id for doc in docs} - {doc_id for pair, s in alike.items() if s >= 0.2 for doc_id in pair}
    assert len(lonely) >= 25
    assert not lonely & (found.exact | found.near | set(found.kept))
    assert sum(found.kept.values()) == len(found.kept) + len(found.near)


def pool() -> list[str]:
    rng = random.Random(2)
    long = [" ".join(ARTICLES[i : i + 2]) for i in (0, 60, 120)]
    return [
        *long,
        *(edited(text, n, rng) for text in long for n in (1, 2, 3)),
        long[0].upper(),
        "short",
        "Short!",
        "other",
    ]


POOL = pool()


@given(
    st.lists(st.tuples(st.sampled_from(POOL), st.sampled_from([*ORDER, "other"])), min_size=1, max_size=24),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 3, 8]),
)
@settings(max_examples=40)
def test_the_same_documents_stay_however_they_are_spread(
    chosen: list[tuple[str, str]], rng: random.Random, n: int
) -> None:
    docs = [Doc(f"id{i}", text, licence) for i, (text, licence) in enumerate(chosen)]
    expected = outcome([docs])
    rng.shuffle(docs)
    files: list[list[Doc]] = [[] for _ in range(n)]
    for doc in docs:
        rng.choice(files).append(doc)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "ROWS_AT_ONCE", rng.choice([1, 3, 1000]))
        assert outcome(files) == expected
    exactly = {normalise(text) for text, _ in chosen}
    assert len(docs) - len(expected.exact) == len(exactly)
    assert outcome([docs], near=False).exact == expected.exact
    assert sum(expected.kept.values()) == len(expected.kept) + len(expected.exact) + len(expected.near)


def test_the_best_licence_stays_then_the_lowest_hash_of_source_and_id() -> None:
    text, base = ARTICLES[-1], " ".join(ARTICLES[-3:])
    near = edited(base, 1, random.Random(1))
    licences = ["other", "CC-BY-4.0", "CC0-1.0", "CC-BY-4.0", "unheard-of"]
    for seed in range(20):
        docs = [Doc(f"{seed}/{i}", text, licence) for i, licence in enumerate(licences)]
        assert outcome([docs]).kept == {f"{seed}/2": 5}
        docs = [Doc(f"{seed}/0", near, "other"), Doc(f"{seed}/1", base, "CC0-1.0")]
        assert outcome([docs]) == Outcome(set(), {f"{seed}/0"}, {f"{seed}/1": 2})
    stays = Counter(
        next(iter(outcome([[Doc("a", text, source=f"s{i}"), Doc("b", text, source=f"t{i}")]]).kept)) for i in range(60)
    )
    assert min(stays["a"], stays["b"]) > 10  # it is a hash that decides, no name


def test_a_copy_of_a_copy_goes_for_the_reason_that_it_has() -> None:
    base = " ".join(ARTICLES[-3:])
    near = edited(base, 1, random.Random(1))
    docs = [
        Doc("a", base, "other"),
        Doc("b", base.upper(), "CC-BY-4.0"),
        Doc("c", near, "CC0-1.0"),
        Doc("d", ARTICLES[0]),
    ]
    assert outcome([docs]) == Outcome({"a"}, {"b"}, {"c": 3})
    assert outcome([docs], near=False) == Outcome({"a"}, set(), {"b": 2})


def test_what_is_gone_neither_stays_for_others_nor_leads_from_one_to_another() -> None:
    rng = random.Random(4)
    words = " ".join(ARTICLES[-8:]).split()[:400]
    # Each shares nearly all with its neighbour: a window that moves over one text.
    docs = [Doc(str(i), " ".join(words[25 * i : 25 * i + 250]), "other" if i != 2 else "CC0-1.0") for i in range(5)]
    rng.shuffle(docs)
    at = next(i for i, doc in enumerate(docs) if doc.id == "2")
    assert outcome([docs]).kept == {"2": 5}
    without = outcome([docs], gone={0: [at]})
    assert "2" not in without.near | set(without.kept)
    assert sum(without.kept.values()) == 4
    assert outcome([[Doc("a", "x y z"), Doc("b", "x y z", "other")]], gone={0: [0]}) == Outcome(set(), set(), {})


def test_the_first_of_repeated_ids_stays_within_its_source(tmp_path: Path) -> None:
    files = [
        [Doc("a", "1"), Doc("b", "2"), Doc("a", "3")],
        [],
        [Doc("b", "4", source="books"), Doc("b", "5"), Doc("c", "6"), Doc("a", "7")],
    ]
    found = {path.stem: rows.tolist() for path, rows in find_repeated_ids(write(tmp_path, files))}
    assert found == {"0": [2], "1": [], "2": [1, 3]}


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60),
    st.permutations(range(31)),
    st.integers(1, 9),
)
def test_joined_rows_are_led_to_the_lowest_in_rank(pairs: list[tuple[int, int]], rank: list[int], size: int) -> None:
    groups = [{row} for row in range(31)]
    for one, other in pairs:
        if groups[one] is not groups[other]:
            groups[one] |= groups[other]
            for row in groups[other]:
                groups[row] = groups[one]
    best = np.arange(31)
    parts = [np.array(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    dedup._join(best, np.array(rank, np.uint64), ((part[:, 0], part[:, 1]) for part in parts))
    heads = dedup._heads(best, np.arange(31)).tolist()
    assert heads == [min(groups[row], key=rank.__getitem__) for row in range(31)]


def test_a_file_that_is_cut_off_or_unlike_the_others_is_named(tmp_path: Path) -> None:
    one, other = write(tmp_path, [[Doc("a", "x")], [Doc("b", "y")] * 50])
    with pytest.raises(UserError, match=r"2\.npy: 5 numbers"):
        write_columns(tmp_path / "2.npy", [document_hashes("web", ["c"], [""], ["z"], DedupConfig())])
        list(find_copies([one, other, tmp_path / "2.npy"], {}))
    for n_bytes in (3000, 50, 0):
        with other.open("r+b") as file:
            file.truncate(n_bytes)
        with pytest.raises(UserError, match=r"1\.npy"):
            list(find_copies([one, other], {}))


def test_memory_grows_by_some_bytes_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """152 bytes a document stand in the files; every twentieth document has a copy."""
    rng, peaks = np.random.default_rng(1), []
    monkeypatch.setattr(dedup, "ROWS_AT_ONCE", 10_000)
    for first, end in ((0, 4), (4, 16)):
        for number in range(first, end):
            hashes = rng.integers(0, 2**64, (19, 10_000), np.uint64)
            hashes[3:, 10::20] = hashes[3:, ::20]
            write_columns(tmp_path / f"{number}.npy", [hashes])
        tracemalloc.start()
        n_exact = [len(copies.exact) for _, copies in find_copies(sorted(tmp_path.glob("*.npy")), {})]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert n_exact == [500] * end
    assert peaks[0] < 22 * 40_000 + 120 * 10_000
    assert peaks[1] - peaks[0] < 24 * 120_000


def test_hashes_are_compared_to_their_last_bit_and_none_falls_between_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "ROWS_AT_ONCE", 2)
    step = 2**64 // 5 + 1  # what 8 rows at 2 a range come to
    high = [7, 7, 7, 0, 0, step - 1, step - 1, 2**64 - 1]
    low = [1, 2, 1, 5, 5, 9, 9, 3]
    hashes = np.zeros((5, 8), np.uint64)
    hashes[0], hashes[3], hashes[4] = np.arange(8), np.array(high, np.uint64), low
    write_columns(tmp_path / "0.npy", [hashes])
    write_columns(tmp_path / "1.npy", [hashes[:, 7:]])
    found = [copies.exact.tolist() for _, copies in find_copies([tmp_path / "0.npy", tmp_path / "1.npy"], {})]
    assert found == [[2, 4, 6], [0]]
