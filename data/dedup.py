"""Which documents are copies of others, from hashes that stand beside the documents.

However documents are spread over files, and in whatever order the files come, the same ones go: of copies the one of
the best licence stays, and of these the one whose hash of source and id is lowest.

The hashes of a file of n documents are a .npy file, uint64[5 or 19, n], a column for each document in their order:

    row 0        rank: place of its licence among those of the config, in 8 bits, and 56 bits of row 1
    rows 1, 2    xxh3-128 of source, a zero byte and id, the high half first
    rows 3, 4    exact hash of its text
    rows 5 … 18  its 14 bands, if near copies are looked for; data/minhash.py says what they are

Memory: 22 bytes for each document of a group, and 90 for each of `ROWS_AT_ONCE`, which is 3 GB. Documents with like
hashes are met range by range of hashes, each range a pass over the files. There is more to hold only where a single
hash is that of more documents than that.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.text import DedupConfig
from data.minhash import Hashes, digests, text_hashes
from data.shards import mapped

ROWS_AT_ONCE = 1 << 25

Rows = NDArray[np.int64]

_HEADER_BYTES = 128
_SHAPE = re.compile(rb"\x93NUMPY\x01\x00v\x00{'descr': '<u8', 'fortran_order': False, 'shape': \((\d+), (\d+)\), } *\n")
"""How np.save begins an array of hashes."""

_RANK, _ID, _TEXT, _FIRST_BAND = 0, slice(1, 3), slice(3, 5), 5


class Copies(NamedTuple):
    """Rows of one file, ascending: those that go as exact copies, those that go as near copies, and those that stay for
    others, each with the number of documents that it stands for, itself included."""

    exact: Rows
    near: Rows
    kept: Rows
    n_alike: Rows


def document_hashes(
    source: str, ids: Sequence[str], licences: Sequence[str], texts: Sequence[str], cfg: DedupConfig
) -> Hashes:
    """uint64[3, 5 or 19, n]: the columns of some documents of one source. Licences that the config lacks come last."""
    identity = digests(f"{source}\0{doc_id}".encode() for doc_id in ids)
    places = {licence: place for place, licence in enumerate(cfg.licence_order[:255])}
    tiers = np.array([places.get(licence, 255) for licence in licences], np.uint64)
    rank = tiers << np.uint64(56) | identity[0] >> np.uint64(8)
    of_texts = [text_hashes(texts, cfg.near)] if cfg.exact or cfg.near else []
    return np.concatenate([rank[None], identity, *of_texts])


def write_columns(path: Path, blocks: Sequence[NDArray[Any]]) -> None:
    """Writes blocks [k, m] side by side as one .npy file, complete or absent."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, np.ascontiguousarray(np.concatenate(blocks, axis=1)), allow_pickle=False)
    os.replace(beside, path)


def find_repeated_ids(files: Sequence[Path]) -> Iterator[tuple[Path, Rows]]:
    """By file, the rows whose source and id an earlier row has too, in the order of the files as given."""
    spans, n = _spans(files)
    is_repeated = np.zeros(n, bool)
    for _, later in _alike(spans, _ID, np.ones(n, bool)):
        is_repeated[later] = True
    for path, span in spans.items():
        yield path, np.flatnonzero(is_repeated[span])


def find_copies(files: Sequence[Path], gone: Mapping[Path, Rows]) -> Iterator[tuple[Path, Copies]]:
    """By file, the copies among the documents of all files: those of a language, as a rule.

    Rows of `gone` are left out for other reasons: nothing is a copy of them. Copies are looked for where the files
    have hashes of text, near ones where they have bands. `UserError` for a file that is damaged or not like the others.
    """
    spans, n = _spans(files)
    rank, is_there, best = np.empty(n, np.uint64), np.ones(n, bool), np.arange(n)
    for path, span in spans.items():
        rank[span] = _read(path)[_RANK]
        is_there[span][gone.get(path, np.zeros(0, np.int64))] = False
    height = len(_read(files[0]))
    if height > _TEXT.start:
        _join(best, rank, _alike(spans, _TEXT, is_there))
    goes_as_exact, n_alike = np.zeros(n, bool), np.zeros(n, np.uint32)
    for span in spans.values():
        goes_as_exact[span] = _heads(best, np.r_[span]) != np.r_[span]
    for band in range(_FIRST_BAND, height):
        _join(best, rank, _alike(spans, slice(band, band + 1), is_there))
    for span in spans.values():
        np.add.at(n_alike, _heads(best, np.r_[span]), 1)
    for path, span in spans.items():
        kept = np.flatnonzero(n_alike[span] > 1)
        near = np.flatnonzero((best[span] != np.r_[span]) & ~goes_as_exact[span])
        yield path, Copies(np.flatnonzero(goes_as_exact[span]), near, kept, n_alike[span][kept].astype(np.int64))


def _spans(files: Sequence[Path]) -> tuple[dict[Path, slice], int]:
    """Which numbers the rows of each file have within the group, and how many there are."""
    spans, end = {}, 0
    first_height = len(_read(files[0]))
    for path in files:
        height, width = _read(path).shape
        if height != first_height:
            raise _damaged(path, f"{height} numbers for each document, and {files[0]} has {first_height}")
        spans[path] = slice(end, end := end + width)
    return spans, end


def _read(path: Path) -> Hashes:
    # There may be 100,000 files, read 17 times each: numpy takes 0.3 ms to make out the header, this 0.03 ms.
    whole = mapped(path)
    shape = _SHAPE.match(whole[:_HEADER_BYTES].tobytes())
    height, width = map(int, shape.groups()) if shape else (0, 0)
    if not height or len(whole) != _HEADER_BYTES + 8 * height * width:
        raise _damaged(path, f"{len(whole):,} bytes that are no such file, or not all of it")
    return whole[_HEADER_BYTES:].view(np.uint64).reshape(height, width)


def _damaged(path: Path, found: str) -> UserError:
    repair = "remove its folder: it is made anew"
    return UserError(f"{path}: {found}", "hashes stand whole beside the documents they were made from", repair)


def _alike(spans: Mapping[Path, slice], key: slice, is_there: NDArray[np.bool_]) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of rows with the same `key`, by range: (rows, later rows), each row with the next that is like it."""
    step = 2**64 // (len(is_there) // ROWS_AT_ONCE + 1) + 1
    for low in range(0, 2**64, step):
        rows, keys = [np.zeros(0, np.int64)], []
        for path, span in spans.items():
            columns = _read(path)[key]
            found = np.flatnonzero((columns[0] >= low) & (columns[0] <= min(low + step, 2**64) - 1) & is_there[span])
            rows.append(found + span.start)
            keys.append(columns[:, found])
        row, hashes = np.concatenate(rows), np.concatenate(keys, axis=1)
        order = np.lexsort(hashes[::-1])
        row, hashes = row[order], hashes[:, order]
        is_like_next = (hashes[:, 1:] == hashes[:, :-1]).all(axis=0)
        yield row[:-1][is_like_next], row[1:][is_like_next]


def _join(best: Rows, rank: Hashes, pairs: Iterable[tuple[Rows, Rows]]) -> None:
    """Puts the two of each pair under one head, the lower in rank; `best` leads from each row towards its head."""
    for one, other in pairs:
        while len(one):
            one, other = _heads(best, one), _heads(best, other)
            one, other = one[one != other], other[one != other]
            is_first = (rank[one] < rank[other]) | ((rank[one] == rank[other]) & (one < other))
            # Of several heads that one could come under, some one is taken; what is left is done in the next round.
            best[np.where(is_first, other, one)] = np.where(is_first, one, other)


def _heads(best: Rows, rows: Rows) -> Rows:
    heads = best[rows]
    while not np.array_equal(higher := best[heads], heads):
        heads = higher
    best[rows] = heads
    return heads
