"""Hashes by which copies are known: of whole texts, and MinHash of texts that share most of their words.

All is integer arithmetic modulo 2^64 with fixed constants: hashes may be kept, and compared with those of other
machines. Of x_1 … x_k, chain = mix(x_1 M^(k-1) + … + x_k), where mix is that of SplitMix64.

    words       runs of letters, digits and combining marks, after case folding and NFC and without soft hyphens
    exact hash  xxh3-128 of the words with one space between, in UTF-32 little-endian
    word        mix(sum of c_j B^(j mod 4096)) over its code points c_0 c_1 …
    shingle     chain of five words in a row; a text of fewer has one, filled up with zeros
    minimum i   least A_i s + B_i over the shingles s of a text, i < 112
    band b      chain of the minima 8 b … 8 b + 7, b < 14; 92 % of the texts that share 0.8 of their shingles share one

Digits and accents count: texts that differ in numbers are tables, laws or sums, and accents tell words apart. Texts of
fewer than five words are copies where all words are the same; texts without a letter or digit are copies of each other.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

N_BANDS, N_ROWS, N_WORDS = 14, 8, 5
BATCH_CHARACTERS = 1 << 18  # texts are hashed together up to about so many; each takes 30 bytes, in a longer text too
BLOCK_SHINGLES = 1 << 13  # a block and its products stay in the second cache while 112 functions go over them


def text_hashes(texts: Sequence[str], near: bool) -> Hashes:
    """uint64[2, n], the exact hashes, high half first; with `near` uint64[16, n]: the bands below them."""
    blocks = [np.zeros((2 + near * N_BANDS, 0), np.uint64)]
    for batch in batches(texts):
        codes, starts = _codes(batch)
        spaced, places = _spaced(codes, starts)
        exact = digests(spaced[a : max(a, b - 1)].data for a, b in pairwise(places.tolist()))
        blocks.append(np.concatenate([exact, _bands(*_words(codes, starts))]) if near else exact)
    return np.concatenate(blocks, axis=1)


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, Places]:
    """Hashes of all words of the texts, and int64[n + 1]: where each text begins among them, and the end."""
    return _words(*_codes(texts))


def window_hashes(words: Hashes, length: int) -> Hashes:
    """Chains of `length` words in a row, from every word on that has so many."""
    n = max(len(words) - length + 1, 0)
    return _chain(words[i : i + n] for i in range(length))


def normalise(text: str) -> str:
    """The words of a text with one space between."""
    codes, starts = _spaced(*_codes([text]))
    return codes[: starts[1]].tobytes().decode("utf-32-le", "surrogatepass").rstrip()


def digests(parts: Iterable[bytes | memoryview]) -> Hashes:
    """uint64[2, n]: xxh3-128 of each part, the high half first."""
    joined = b"".join(map(xxhash.xxh3_128_digest, parts))
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2).T


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, cut where another `BATCH_CHARACTERS` are full."""
    full = np.cumsum([len(text) for text in texts]) // BATCH_CHARACTERS
    ends = [*(np.flatnonzero(np.diff(full)) + 1).tolist(), len(texts)] if texts else []
    for first, end in zip([0, *ends], ends, strict=False):
        yield texts[first:end]


def mix(x: Hashes) -> Hashes:
    """A bijection of 64 bits in which every input bit moves every output bit (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _chain(parts: Iterable[Hashes]) -> Hashes:
    total: Any = np.uint64(0)
    for part in parts:
        total = total * _M + part
    return mix(total)


_N = N_BANDS * N_ROWS
_CONSTANTS = mix(np.arange(1, 3 + 2 * _N, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
"""The first outputs of SplitMix64 with seed 0: M, B, A_0 … A_111, and those made odd; B_0 … B_111."""
_CONSTANTS[: 2 + _N] |= np.uint64(1)
_M, _B, _FACTORS, _SUMMANDS = _CONSTANTS[0], _CONSTANTS[1], _CONSTANTS[2 : 2 + _N], _CONSTANTS[2 + _N :]
_POWERS = np.cumprod(np.append(np.uint64(1), np.full(4095, _B)), dtype=np.uint64)


@cache
def _code_table() -> Codes:
    """Code point → itself where it is part of words, else 0."""
    table = np.zeros(sys.maxunicode + 1, np.uint32)
    for run in re.finditer(r"[\w\u0300-\u036f]+", "".join(map(chr, range(len(table))))):
        table[slice(*run.span())] = range(*run.span())
    table[ord("_")] = 0
    return table


def _codes(texts: Sequence[str]) -> tuple[Codes, Places]:
    """Code points of words and 0 for others, one 0 before all and one behind each text; and where texts begin."""
    folded = [unicodedata.normalize("NFC", text.replace("\xad", "").casefold()) for text in texts]
    joined = "\n".join(["", *folded, ""]).encode("utf-32-le", "surrogatepass")
    starts = np.cumsum([1, *(len(text) + 1 for text in folded)], dtype=np.int64)
    return _code_table()[np.frombuffer(joined, "<u4")], starts


def _spaced(codes: Codes, starts: Places) -> tuple[Codes, Places]:
    """Code points with one space behind each word; and where texts begin."""
    is_kept = codes > 0
    is_kept[1:] |= codes[:-1] > 0
    kept = codes[is_kept]
    kept[kept == 0] = ord(" ")
    return kept, np.append(0, np.cumsum(is_kept))[starts]


def _words(codes: Codes, starts: Places) -> tuple[Hashes, Places]:
    begins = np.flatnonzero((codes[1:] > 0) & (codes[:-1] == 0)) + 1
    if not len(begins):
        return np.zeros(0, np.uint64), np.zeros_like(starts)
    place = np.arange(begins[0], len(codes)) - np.repeat(begins, np.diff(begins, append=len(codes)))
    terms = codes[begins[0] :] * _POWERS[place & 4095]
    return mix(np.add.reduceat(terms, begins - begins[0])), np.searchsorted(begins, starts)


def _bands(words: Hashes, starts: Places) -> Hashes:
    """uint64[14, n]."""
    n_words = np.diff(starts)
    ends = np.cumsum(np.maximum(n_words, N_WORDS))
    begins = np.append(0, ends[:-1])
    filled = np.zeros(ends[-1], np.uint64)
    filled[np.arange(len(words)) + np.repeat(begins - starts[:-1], n_words)] = words
    is_inside = np.ones(len(filled), bool)
    is_inside[np.subtract.outer(ends, np.arange(1, N_WORDS))] = False  # windows from there on reach into the next text
    shingles = window_hashes(filled, N_WORDS)[is_inside[: 1 - N_WORDS]]
    minima = _minima(shingles, begins - (N_WORDS - 1) * np.arange(len(begins)))
    return _chain(minima.reshape(N_BANDS, N_ROWS, -1)[:, row] for row in range(N_ROWS))


def _minima(shingles: Hashes, begins: Places) -> Hashes:
    """uint64[112, n]; the shingles of each text begin at `begins`, and it has one at least."""
    minima = np.full((_N, len(begins)), np.iinfo(np.uint64).max)
    room = np.empty(BLOCK_SHINGLES, np.uint64)
    for low in range(0, len(shingles), BLOCK_SHINGLES):
        block = shingles[low : low + BLOCK_SHINGLES]
        values = room[: len(block)]
        first, end = np.searchsorted(begins, low, "right") - 1, np.searchsorted(begins, low + len(block))
        cuts = np.maximum(begins[first:end] - low, 0)
        for least, factor, summand in zip(minima[:, first:end], _FACTORS, _SUMMANDS, strict=True):
            np.multiply(block, factor, out=values)
            np.add(values, summand, out=values)
            np.minimum(least, np.minimum.reduceat(values, cuts), out=least)
    return minima
