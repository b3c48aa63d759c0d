"""Training text that holds what evaluation will ask: n-grams of words that stand in both.

Words are those of data/minhash.py: case, spaces and punctuation make no difference. An item of fewer words than an
n-gram is looked for as a whole, if it has 8 of them; shorter ones would be found everywhere and are just counted.
Files of documents are searched one by one; what is a common phrase is known when all of them are.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data.files import JSONL, find_files, read_lines
from data.minhash import Hashes, batches, normalise, window_hashes, word_hashes

MIN_WORDS = 8
EXAMPLES = 3

Matches = NDArray[np.uint32]  # [2, m]: rows of documents, and n-grams that they hold; ascending, each pair once


class Item(NamedTuple):
    """A text of an evaluation, and its place: file and line."""

    place: str
    text: str


class Finding(NamedTuple):
    """An item of which documents hold `n_ngrams`, the first of them normalised, and file and row of the first few."""

    place: str
    ngram: str
    n_ngrams: int
    n_documents: int
    examples: list[tuple[str, int]]


def read_items(paths: Iterable[str]) -> list[Item]:
    """Every string in JSON lines of evaluations, and lines of .txt files; raises `UserError` where a line has none."""
    return [
        Item(f"{name}:{number}", text)
        for path in paths
        for file, name in find_files(path, (*JSONL, ".txt"))
        for number, line in enumerate(read_lines(file), 1)
        if line.strip()
        for text in _texts(f"{name}:{number}", line, is_json=not name.endswith(".txt"))
    ]


class Ngrams:
    """The n-grams of items; one that several items have is the first one's."""

    def __init__(self, items: Sequence[Item], n: int) -> None:
        self._items, self._n, self._lengths = items, n, range(min(n, MIN_WORDS), n + 1)
        self.n_short = len(items)  # items that are not looked for
        hashes, places, n_before = [np.zeros(0, np.uint64)], [np.zeros((2, 0), np.int64)], 0
        for texts in batches([item.text for item in items]):
            words, starts = word_hashes(texts)
            n_words = np.diff(starts)
            self.n_short -= int((n_words >= self._lengths[0]).sum())
            for length in self._lengths:
                windows, owner = _windows(words, starts, length)
                at = np.flatnonzero((owner >= 0) & ((length == n) | (n_words[owner] == length)))
                hashes.append(windows[at])
                places.append(np.stack([owner[at] + n_before, at - starts[owner[at]]]))
            n_before += len(texts)
        self._hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self._places = np.concatenate(places, axis=1)[:, first]  # [2, n-grams]: item, and word in it
        # A table of 16 MB at most tells of most n-grams that they need not be searched for.
        n_bits = min(len(self._hashes).bit_length() + 3, 24)
        self._shift, self._may_be = np.uint64(64 - n_bits), np.zeros(1 << n_bits, bool)
        self._may_be[self._hashes >> self._shift] = True

    def match(self, texts: Sequence[str], first_row: int) -> Matches:
        """Which n-grams the texts hold; their rows are counted from `first_row`."""
        found = [np.zeros(0, np.int64)]
        for batch in batches(texts):
            words, starts = word_hashes(batch)
            for length in self._lengths:
                windows, owner = _windows(words, starts, length)
                at = np.flatnonzero(self._may_be[windows >> self._shift] & (owner >= 0))
                number = np.searchsorted(self._hashes, windows[at])
                is_there = self._hashes[np.minimum(number, len(self._hashes) - 1)] == windows[at]
                found.append((owner[at] + first_row << 32 | number)[is_there])
            first_row += len(batch)
        pairs = np.unique(np.concatenate(found))
        return np.stack([pairs >> 32, pairs & 0xFFFFFFFF]).astype(np.uint32)

    def contaminated(
        self, matches: Mapping[str, Matches], max_documents: int
    ) -> tuple[dict[str, NDArray[np.uint32]], list[Finding]]:
        """Rows of contaminated documents by file, and what they hold by item.

        `matches` are those of all files, for documents that stay. An n-gram in more than `max_documents` is a common
        phrase and tells nothing.
        """
        n_documents = np.zeros(len(self._hashes), np.int64)
        for pairs in matches.values():
            n_documents += np.bincount(pairs[1], minlength=len(n_documents))
        telling = {name: pairs[:, n_documents[pairs[1]] <= max_documents] for name, pairs in matches.items()}
        words: dict[int, set[int]] = defaultdict(set)
        held: dict[int, dict[tuple[str, int], None]] = defaultdict(dict)
        for name, (rows, numbers) in telling.items():
            for row, item, word in zip(rows.tolist(), *self._places[:, numbers].tolist(), strict=True):
                words[item].add(word)
                held[item][name, row] = None
        findings = []
        for item, documents in sorted(held.items()):
            place, text = self._items[item]
            ngram = " ".join(normalise(text).split(" ")[min(words[item]) :][: self._n])
            findings.append(Finding(place, ngram, len(words[item]), len(documents), [*documents][:EXAMPLES]))
        return {name: np.unique(pairs[0]) for name, pairs in telling.items()}, findings


def _windows(words: Hashes, starts: NDArray[np.int64], length: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all windows of so many words, and the text in which each stands; -1 where it goes over an end."""
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    hashes = window_hashes(words, length)
    first, last = owner[: len(hashes)], owner[len(owner) - len(hashes) :]
    return hashes, np.where(first == last, first, -1)


def _texts(place: str, line: bytes, is_json: bool) -> list[str]:
    try:
        texts = [*_strings(json.loads(line))] if is_json else [line.decode("utf-8-sig")]
    except ValueError:
        texts = []
    if not texts:
        rule = "what is looked for is UTF-8: lines of JSON that hold strings, or plain lines in files named .txt"
        raise UserError(f"{place}: {line[:200]!r}", rule, "correct the line, or corpus.decontaminate.against")
    return texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
