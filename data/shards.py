"""Token shards in Megatron's indexed format, and a sidecar that ties every sequence to its document.

`STEM.bin` holds the tokens of all documents one after another; `STEM.idx` their lengths and places;
`STEM.docs.parquet` id, bytes, tokens and source, row by row. One sequence is one document: `<s>`, ids, `</s>`.
Layout of the index, little-endian: 9 bytes of magic, uint64 version 1, uint8 type of the tokens (8 is uint16, 4 is
int32), uint64 n, uint64 n + 1, then int32[n] lengths in tokens, int64[n] offsets in bytes, int64[n + 1] the
first sequence of each document and the end.
"""

import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.uint16] | type[np.int32]] = {8: np.uint16, 4: np.int32}

SUFFIXES = (".bin", ".idx", ".docs.parquet")
SIDECAR_ROWS = 50_000
"""Rows that are gathered before a group of them is written."""


class ShardWriter:
    """Writes one shard, beside and renamed when it is closed."""

    def __init__(self, stem: Path, vocab_size: int, bos_id: int, eos_id: int) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.stem, self._bos_id, self._eos_id = stem, bos_id, eos_id
        # Megatron's own limit: below 65,500 entries two bytes do.
        self._code = 8 if vocab_size < 65_500 else 4
        self._bin = _beside(stem, ".bin").open("wb")
        self._lengths = array("i")
        self._rows: list[tuple[str, int, int, str]] = []
        self._sidecar: Any = None
        self.n_bytes = 0
        """UTF-8 bytes of all documents so far."""
        self.n_tokens = 0
        """Tokens of all documents so far."""

    def add(self, doc_id: str, source: str, text: str, ids: list[int]) -> None:
        """Appends one document; `ids` are without `<s>` and `</s>`."""
        tokens = np.array([self._bos_id, *ids, self._eos_id], _DTYPES[self._code])
        self._bin.write(tokens.tobytes())
        self._lengths.append(len(tokens))
        n_bytes = len(text.encode())
        self.n_bytes += n_bytes
        self.n_tokens += len(tokens)
        self._rows.append((doc_id, n_bytes, len(tokens), source))
        if len(self._rows) >= SIDECAR_ROWS:
            self._write_rows()

    @property
    def n_docs(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def close(self) -> None:
        """Completes the three files and gives them their names."""
        self._bin.close()
        self._write_rows()
        self._sidecar.close()
        self._write_index()
        for suffix in SUFFIXES:
            os.replace(_beside(self.stem, suffix), self.stem.with_name(self.stem.name + suffix))

    def _write_index(self) -> None:
        lengths, n = np.array(self._lengths, np.int32), self.n_docs
        offsets = np.zeros(n, np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:])
        with _beside(self.stem, ".idx").open("wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, self._code, n, n + 1))
            file.write(lengths.tobytes())
            file.write((offsets * _DTYPES[self._code]().itemsize).tobytes())
            file.write(np.arange(n + 1, dtype=np.int64).tobytes())

    def _write_rows(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"id": pa.string(), "n_bytes": pa.int64(), "n_tokens": pa.int32(), "source": pa.string()}
        schema = pa.schema(list(types.items()))
        if self._sidecar is None:
            self._sidecar = pq.ParquetWriter(_beside(self.stem, ".docs.parquet"), schema, compression="zstd")
        if self._rows:
            columns = dict(zip(types, map(list, zip(*self._rows, strict=True)), strict=True))
            self._sidecar.write_table(pa.table(columns, schema))
        self._rows.clear()


class Shard:
    """Reads one shard through the page cache; opening it costs the same however large it is.

    Raises `UserError` that names the file where one is missing, is of another kind or is cut off.
    """

    def __init__(self, stem: Path) -> None:
        index, content = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
        with _undamaged(index):
            with index.open("rb") as file:
                magic, version, code, n_docs, n_ends = _HEADER.unpack(file.read(_HEADER.size))
            if (magic, version, n_ends) != (MAGIC, 1, n_docs + 1) or code not in _DTYPES:
                raise ValueError("not an index of one sequence a document with tokens in uint16 or int32")
            self.n_docs: int = n_docs
            at = _HEADER.size
            _require_size(index, at + 4 * n_docs + 8 * n_docs + 8 * (n_docs + 1))
            self._lengths = np.asarray(np.memmap(index, np.int32, "r", at, (n_docs,)))
            self._offsets = np.asarray(np.memmap(index, np.int64, "r", at + 4 * n_docs, (n_docs,)))
        with _undamaged(content):
            _require_size(content, int(self._offsets[-1]) + int(self._lengths[-1]) * _DTYPES[code]().itemsize)
            self.tokens: NDArray[Any] = np.asarray(np.memmap(content, _DTYPES[code], "r"))
            """All tokens of the shard."""

    def document(self, row: int) -> NDArray[Any]:
        """Tokens of one document, `<s>` and `</s>` included."""
        start = int(self._offsets[row]) // self.tokens.itemsize
        return self.tokens[start : start + int(self._lengths[row])]

    def rows_between(self, first: int, end: int) -> range:
        """Documents that tokens `first` … `end` - 1 belong to."""
        # The header has 34 bytes, so the offsets are not aligned and np.searchsorted would copy them all.
        size = self.tokens.itemsize
        return range(bisect_right(self._offsets, first * size) - 1, bisect_left(self._offsets, end * size))

    def starts_between(self, first: int, end: int) -> NDArray[np.int64]:
        """Places of document starts p with first < p < end, in tokens."""
        rows = self.rows_between(first, end)
        return self._offsets[rows.start + 1 : rows.stop] // self.tokens.itemsize


def read_sidecar(stem: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows of a shard's sidecar, in the order of its documents."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(stem.with_name(stem.name + ".docs.parquet")) as file:
        for batch in file.iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)


def document_ids(stem: Path, rows: Iterable[int]) -> dict[int, str]:
    """Ids of some documents of a shard by row; reads just the row groups in which they stand."""
    import pyarrow.parquet as pq

    ids: dict[int, str] = {}
    wanted, start = sorted(set(rows)), 0
    path = stem.with_name(stem.name + ".docs.parquet")
    with _undamaged(path), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if here := wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]:
                column = file.read_row_group(group, columns=["id"]).column("id")
                ids |= {row: column[row - start].as_py() for row in here}
            start = end
        if len(ids) < len(wanted):
            raise ValueError(f"{start} rows, fewer than the index has documents")
    return ids


def damaged(found: str) -> UserError:
    """The error for a file of a prepared corpus that is not what was prepared."""
    return UserError(
        found,
        "a prepared corpus is read exactly as it was prepared",
        "restore the file, or remove the folder of the corpus and prepare it again with `marathon data`",
    )


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    # pyarrow's errors are OSError and ValueError too.
    try:
        yield
    except (OSError, ValueError, struct.error) as error:
        raise damaged(f"{path}: {error}") from error


def _require_size(path: Path, n_bytes: int) -> None:
    if (found := path.stat().st_size) != n_bytes:
        raise ValueError(f"{found:,} bytes, where the index tells of {n_bytes:,}")


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(f".{stem.name}{suffix}")
