"""Best-fit packing: documents stand whole in a sequence wherever they fit, as an index beside each shard tells.

A sequence has up to T + 1 tokens, inputs and targets overlapping. A longer document is cut into full sequences, each
of which begins with the last token of the one before, so that every token but `<s>` is predicted once; its rest is
packed like a short document. The index is a pure function of the lengths of the documents: `STEM.fit-T-HASH`, int64
[m, 3] in little-endian with the sequence, the first token within the shard and the end of each piece, sorted.
"""

import json
import os
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data.files import sha256, write_whole
from data.manifest import TRAIN, Manifest, ShardEntry
from data.shards import Shard, damaged, mapped

I64 = NDArray[np.int64]


def build_packing(stem: Path, seq_len: int) -> Path:
    """Packs one shard, and returns the path of its index, which is whole or not there."""
    path = Path(packing_path(str(stem), seq_len, sha256(stem.with_name(stem.name + ".idx"))))
    shard = Shard(stem)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    pack(shard.starts_between(-1, len(shard.tokens)), len(shard.tokens), seq_len).astype("<i8").tofile(beside)
    os.replace(beside, path)
    return path


def packing_path(stem: str, seq_len: int, index_sha256: str) -> str:
    """Where the index of a shard stands; another .idx has another."""
    return f"{stem}.fit-{seq_len}-{index_sha256[:16]}"


def packing_record(corpus_dir: Path, seq_len: int) -> Path:
    """Where `record_packing` writes."""
    return corpus_dir / f"fit-{seq_len}.json"


def record_packing(corpus_dir: Path, seq_len: int) -> None:
    """Notes sequences and CRC of every training shard's index in `fit-T.json`, so that a start opens none of them."""
    found = {}
    for entry in Manifest.load(corpus_dir).shards:
        if entry.split == TRAIN:
            path = packing_path(entry.stem, seq_len, entry.sha256[".idx"])
            pieces = mapped(corpus_dir / path).view("<i8").reshape(-1, 3)
            found[path] = int(pieces[-1, 0]) + 1, zlib.crc32(pieces.data)
    write_whole(packing_record(corpus_dir, seq_len), json.dumps(found, indent=1))


def read_record(corpus_dir: Path, seq_len: int, shards: Iterable[ShardEntry]) -> dict[str, tuple[str, int, int]]:
    """Path, sequences and CRC of the index of each shard by its stem; `UserError` where one has not been packed."""
    record = packing_record(corpus_dir, seq_len)
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    paths = {shard.stem: packing_path(shard.stem, seq_len, shard.sha256[".idx"]) for shard in shards}
    if missing := [path for path in paths.values() if path not in found]:
        rule = "mixture.packing = best_fit reads an index beside each shard, made for train.seq_len"
        repair = "marathon data, or mixture.packing=concat"
        raise UserError(f"{corpus_dir / missing[0]} has not been made", rule, repair)
    return {stem: (f"{corpus_dir}/{path}", *found[path]) for stem, path in paths.items()}


def open_packing(path: str, crc: int) -> I64:
    """The index of one shard, through the page cache; raises `UserError` where it is not what was recorded."""
    try:
        pieces: I64 = mapped(Path(path)).view("<i8").reshape(-1, 3)
    except (OSError, ValueError) as error:
        raise damaged(f"{path}: {error}") from error
    if zlib.crc32(pieces.data) != crc:
        raise damaged(f"{path} is not what was written")
    return pieces


def pack(starts: I64, n_tokens: int, seq_len: int) -> I64:
    """The pieces, as in the index, of documents that begin at `starts`, the last of them ending at `n_tokens`."""
    lengths = np.diff(starts, append=n_tokens)
    n_full = np.maximum(-(-(lengths - 1) // seq_len) - 1, 0)
    row = np.repeat(np.arange(len(starts)), n_full)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(n_full) - n_full, n_full)
    rest = lengths - n_full * seq_len
    sequence = np.concatenate([np.arange(len(row)), len(row) + _best_fit(rest, seq_len + 1)])
    start = np.concatenate([starts[row] + nth * seq_len, starts + n_full * seq_len])
    length = np.concatenate([np.full(len(row), seq_len + 1), rest])
    return np.stack([sequence, start, start + length], axis=1)[np.lexsort((start, sequence))]


def _best_fit(lengths: I64, capacity: int) -> I64:
    """A bin for each item, longest first, each into the bin with the least space that holds it.

    Items of a length are placed together: into a bin with space r go r // length of them, since after each the bin
    has the least space still. So the loop runs over lengths and spaces and not over items.
    """
    order = np.argsort(-lengths, kind="stable")
    bin_of, n_bins, done = np.empty(len(lengths), np.int64), 0, 0
    bins_with: dict[int, list[int]] = {}
    spaces: list[int] = []  # its keys, sorted

    def put(bins: Sequence[int], space: int) -> None:
        if bins and space not in bins_with:
            insort(spaces, space)
        if bins:
            bins_with.setdefault(space, []).extend(bins)

    values, counts = np.unique(lengths, return_counts=True)
    for length, n_left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while n_left:
            if not spaces or spaces[-1] < length:
                n_new = -(-n_left // (capacity // length))
                put(range(n_bins, n_bins + n_new), capacity)
                n_bins += n_new
            space = spaces[bisect_left(spaces, length)]
            each, bins = space // length, bins_with[space]
            used = bins[-min(-(-n_left // each), len(bins)) :]
            n_items = min(n_left, len(used) * each)
            bin_of[order[done : done + n_items]] = np.repeat(used, each)[:n_items]
            del bins[-len(used) :]
            if not bins:
                spaces.remove(space)
                del bins_with[space]
            put(used[:-1], space - each * length)
            put(used[-1:], space - (n_items - (len(used) - 1) * each) * length)
            done, n_left = done + n_items, n_left - n_items
    return bin_of
