"""Time: 2 s."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data import minhash
from data.files import read_lines
from data.minhash import N_BANDS, normalise, text_hashes, window_hashes, word_hashes

SAMPLE = Path(minhash.__file__).parent / "samples" / "udhr-europe.jsonl.zst"
SAMPLE_TEXTS = [json.loads(line)["text"] for line in read_lines(SAMPLE)]
ARTICLES = SAMPLE_TEXTS[::11]

ODD_TEXTS = [
    "",
    " ",
    "!?…",
    "a",
    "one two three four",
    "one two three four five",
    "x" * 5000 + " y",
    "_a_b_",
    "\ud800 a",
    "0 1 2",
    "замо\u0301к q\u0308x",
]


def splitmix64(state: int) -> int:
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def slowly(text: str) -> list[int]:
    """Exact hash and bands of one text, from the docstring of data/minhash.py and nothing else."""
    outputs = [splitmix64(0x9E3779B97F4A7C15 * (i + 1) % 2**64) for i in range(2 + 224)]
    m, b = outputs[0] | 1, outputs[1] | 1
    factors, summands = [a | 1 for a in outputs[2:114]], outputs[114:]

    def chain(values: list[int]) -> int:
        return splitmix64(sum(x * pow(m, len(values) - 1 - i, 2**64) for i, x in enumerate(values)) % 2**64)

    folded = unicodedata.normalize("NFC", text.casefold().replace("\u00ad", ""))
    words = "".join(c if c.isalnum() or "\u0300" <= c <= "\u036f" else " " for c in folded).split()
    exact = xxhash.xxh3_128_intdigest(" ".join(words).encode("utf-32-le"))
    hashes = [splitmix64(sum(ord(c) * pow(b, j % 4096, 2**64) for j, c in enumerate(w)) % 2**64) for w in words]
    hashes += [0] * (5 - len(hashes))
    shingles = [chain(hashes[i : i + 5]) for i in range(len(hashes) - 4)]
    minima = [min((a * s + c) % 2**64 for s in shingles) for a, c in zip(factors, summands, strict=True)]
    return [exact >> 64, exact % 2**64, *(chain(minima[8 * band : 8 * band + 8]) for band in range(14))]


def test_hashes_are_what_the_docstring_says() -> None:
    texts = ARTICLES[::8] + ODD_TEXTS
    assert text_hashes(texts, near=True).T.tolist() == [slowly(text) for text in texts]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The quick  brown\nfox.", "the QUICK, brown – fox!"),
        ("Straße", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("e\u0301te\u0301", "ÉTÉ"),
        ("Donau\u00addampf\u00adschiff", "Donaudampfschiff"),
        ("_emphasis_ here", "emphasis here"),
        ("...", "\U0001f642"),
    ],
)
def test_case_spaces_punctuation_and_spelling_in_unicode_make_no_difference(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)
    one_hash, other_hash = text_hashes([one, other], near=True).T.tolist()
    assert one_hash == other_hash


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Article 12", "Article 13"),
        ("peche", "pêche"),
        ("e-mail", "email"),
        ("ab c", "a bc"),
        ("a b", "b a"),
        ("a", "a a"),
    ],
)
def test_words_numbers_and_accents_make_one(one: str, other: str) -> None:
    one_hash, other_hash = text_hashes([one, other], near=True).T.tolist()
    # Below five words there are no near copies: not one of 14 bands is the same.
    assert not any(x == y for x, y in zip(one_hash, other_hash, strict=True))


def test_normalised_text_is_normalised() -> None:
    assert normalise("  L\u2019État, c\u2019est «moi»!\n\n(1655)") == "l état c est moi 1655"
    assert [normalise(normalise(text)) for text in ARTICLES] == [normalise(text) for text in ARTICLES]


@given(st.lists(st.one_of(st.text(), st.sampled_from(ARTICLES)), max_size=6), st.integers(1, 40), st.integers(8, 100))
def test_the_hashes_of_a_text_do_not_depend_on_what_stands_beside_it(
    texts: list[str], characters: int, block: int
) -> None:
    alone = [text_hashes([text], near=True)[:, 0].tolist() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BATCH_CHARACTERS", characters)
        patch.setattr(minhash, "BLOCK_SHINGLES", block)
        together = text_hashes(texts, near=True)
        exact = text_hashes(texts, near=False)
    assert together.shape == (2 + N_BANDS, len(texts))
    assert together.T.tolist() == alone
    assert np.array_equal(together[:2], exact)


@pytest.mark.parametrize(("similarity", "n_pairs"), [(0.95, 300), (0.8, 1200), (0.6, 1200), (0.3, 600), (0.0, 600)])
def test_bands_meet_as_often_as_theory_says(similarity: float, n_pairs: int) -> None:
    """Texts of 200 shingles that share so many; a band is shared with similarity ** 8, one of 14 with 1 - (1 - s^8)^14."""
    n_shared = round(200 * 2 * similarity / (1 + similarity))
    rng = np.random.default_rng(3)
    texts = []
    for _ in range(n_pairs):
        words = [f"w{x}" for x in rng.integers(0, 10**9, 204 + 200 - n_shared)]
        shared = words[: n_shared + 4] if n_shared else []
        own = 204 - len(shared)
        texts += [
            " ".join(shared + words[len(shared) :][:own]),
            " ".join(shared + [w + "x" for w in words[len(shared) :]][:own]),
        ]
    bands = text_hashes(texts, near=True)[2:]
    met = bands[:, ::2] == bands[:, 1::2]
    true = n_shared / (400 - n_shared)
    for share, expected in ((met.mean(), true**8), (met.any(axis=0).mean(), 1 - (1 - true**8) ** 14)):
        # Bands of a pair are independent; 4 standard deviations over pairs alone are a wide margin for them.
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / n_pairs) ** 0.5


def test_windows_are_those_of_the_words() -> None:
    words, starts = word_hashes(["a b c d e f", "", "b c d"])
    assert starts.tolist() == [0, 6, 6, 9]
    windows = window_hashes(words, 3).tolist()
    assert len(windows) == 7
    assert windows[1] == windows[6]
    assert len(set(windows)) == 6
    assert window_hashes(words, 10).tolist() == []
    assert [w.tolist() for w in word_hashes([])] == [[], [0]]


def test_real_texts_that_differ_have_hashes_that_differ() -> None:
    words = {word for text in SAMPLE_TEXTS for word in normalise(text).split()}
    assert len(words) > 15_000
    assert len(set(word_hashes([" ".join(sorted(words))])[0].tolist())) == len(words)
