"""Token shards in Megatron's indexed format, and a sidecar that ties every sequence to its document.

`STEM.bin` holds the tokens of all documents one after another; `STEM.idx` their lengths and places;
`STEM.docs.parquet` id, licence, offset and more, row by row. One sequence is one document: `<s>`, ids, `</s>`.
Layout of the index, little-endian: 9 bytes of magic, uint64 version 1, uint8 type of the tokens (8 is uint16, 4 is
int32), uint64 n, uint64 n + 1, then int32[n] lengths in tokens, int64[n] offsets in bytes, int64[n + 1] the
first sequence of each document and the end.
"""

import ctypes
import mmap
import os
import secrets
import struct
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
_TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the index for whole numbers; 6 and 7 are floating point. Shards are written with 4 and 8."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBC.mmap.restype, _LIBC.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)

SUFFIXES = (".bin", ".idx", ".docs.parquet")


class ShardWriter:
    """Writes one shard, beside and renamed when it is closed."""

    def __init__(self, stem: Path, vocab_size: int, bos_id: int, eos_id: int) -> None:
        self.stem, self._bos_id, self._eos_id = stem, bos_id, eos_id
        # Megatron's own limit: below 65,500 entries two bytes do.
        self._code = 8 if vocab_size < 65_500 else 4
        token = secrets.token_hex(4)  # where file systems have no locks, two may write the same shard
        self._files = {suffix: stem.with_name(f".{stem.name}.{token}{suffix}").open("wb") for suffix in SUFFIXES}
        self._lengths: list[NDArray[np.int32]] = []
        self._sidecar: Any = None
        self.n_docs = self.n_tokens = self.n_bytes = 0  # so far; bytes are those of the text as UTF-8

    def add(self, rows: Any, ends: NDArray[np.int64], ids: NDArray[Any]) -> None:
        """Appends documents.

        `rows` is an Arrow table with what the sidecar tells of each, `n_bytes` among it; `ids` are their tokens one
        after another, without `<s>` and `</s>`, and document i ends before `ends[i]`.
        """
        import pyarrow.parquet as pq

        from data.columns import numbers, to_numpy

        lengths = np.diff(ends, prepend=0) + 2
        last = np.cumsum(lengths) - 1
        tokens = np.empty(int(last[-1]) + 1, _TOKEN_TYPES[self._code])
        is_text = np.ones(len(tokens), bool)
        is_text[last] = is_text[last - lengths + 1] = False
        if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(tokens.dtype).max:
            raise OverflowError(f"ids {ids.min()} … {ids.max()} do not fit {tokens.dtype}")  # NumPy would wrap them
        tokens[last], tokens[last - lengths + 1], tokens[is_text] = self._eos_id, self._bos_id, ids
        self._files[".bin"].write(tokens.data)
        self._lengths.append(lengths.astype(np.int32))
        rows = rows.append_column("n_tokens", numbers(lengths.astype(np.int32)))
        rows = rows.append_column("offset", numbers(self.n_tokens + last - lengths + 1))
        if self._sidecar is None:
            self._sidecar = pq.ParquetWriter(self._files[".docs.parquet"], rows.schema, compression="zstd")
        self._sidecar.write_table(rows)
        self.n_bytes += int(to_numpy(rows["n_bytes"]).sum())
        self.n_docs += len(lengths)
        self.n_tokens += len(tokens)

    def close(self) -> None:
        """Completes the three files and gives them their names."""
        lengths = np.concatenate(self._lengths)
        offsets = np.cumsum(lengths, dtype=np.int64) - lengths
        index = self._files[".idx"]
        index.write(_HEADER.pack(MAGIC, 1, self._code, self.n_docs, self.n_docs + 1))
        places = offsets * np.dtype(_TOKEN_TYPES[self._code]).itemsize
        for column in (lengths, places, np.arange(self.n_docs + 1, dtype=np.int64)):
            index.write(column.tobytes())
        self._sidecar.close()
        for suffix, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power cut that the content does not
            file.close()
            os.replace(file.name, self.stem.with_name(self.stem.name + suffix))


class Shard:
    """One shard through the page cache, as fast however large; `UserError` names a file missing, foreign or cut off."""

    def __init__(self, stem: Path) -> None:
        index, content = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
        with _undamaged(index):
            dtype, self._lengths, self._offsets, ends = read_index(mapped(index))
            self.n_docs = len(self._lengths)
            _require_size(index.stat().st_size, _HEADER.size + 12 * self.n_docs + 8 * len(ends))
            if len(ends) != self.n_docs + 1 or dtype not in (np.uint16, np.int32):
                raise ValueError("not an index of one sequence a document with tokens in uint16 or int32")
        with _undamaged(content):
            _require_size(content.stat().st_size, int(self._offsets[-1]) + int(self._lengths[-1]) * dtype.itemsize)
            self.tokens: NDArray[Any] = mapped(content).view(dtype)  # all tokens of the shard

    def place(self, row: int) -> tuple[int, int]:
        """First token of a document, and how many it has, `<s>` and `</s>` included."""
        return int(self._offsets[row]) // self.tokens.itemsize, int(self._lengths[row])

    def document(self, row: int) -> NDArray[Any]:
        """Tokens of one document, `<s>` and `</s>` included."""
        start, n_tokens = self.place(row)
        return self.tokens[start : start + n_tokens]

    def rows_between(self, first: int, end: int) -> range:
        """Documents that tokens `first` … `end` - 1 belong to."""
        # The header has 34 bytes, so the offsets are not aligned and np.searchsorted would copy them all.
        size = self.tokens.itemsize
        return range(bisect_right(self._offsets, first * size) - 1, bisect_left(self._offsets, end * size))

    def starts_between(self, first: int, end: int) -> NDArray[np.int64]:
        """Places of document starts p with first < p < end, in tokens."""
        rows = self.rows_between(first, end)
        return self._offsets[rows.start + 1 : rows.stop] // self.tokens.itemsize


def read_index(content: NDArray[np.uint8]) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[Any]]:
    """Type of the tokens, lengths, offsets, and first sequences with the end. Raises `ValueError`, `struct.error`."""
    at = _HEADER.size
    magic, version, code, n, n_ends = _HEADER.unpack(content[:at].tobytes())
    if (magic, version) != (MAGIC, 1) or code not in _TOKEN_TYPES or n_ends < 1:
        raise ValueError("not an index of whole-number tokens")
    size = at + 12 * n + 8 * n_ends
    _require_size(min(len(content), size), size)  # other programs may leave more behind it
    lengths, offsets, ends = np.split(content[at:size], [4 * n, 12 * n])
    return np.dtype(_TOKEN_TYPES[code]), lengths.view("<i4"), offsets.view("<i8"), ends.view("<i8")


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


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file through the page cache, for as long as there is an array of them."""
    return np.asarray(_Mapping(path))


def damaged(found: str) -> UserError:
    """The error for a file of a prepared corpus that is not what was prepared."""
    repair = "restore the file, or remove the folder of the corpus and prepare it again with `marathon data`"
    return UserError(found, "a prepared corpus is read exactly as it was prepared", repair)


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    # pyarrow's errors are OSError and ValueError too.
    try:
        yield
    except (OSError, ValueError, struct.error) as error:
        raise damaged(f"{path}: {error}") from error


def _require_size(found: int, n_bytes: int) -> None:
    if found != n_bytes:
        raise ValueError(f"{found:,} bytes, where the index tells of {n_bytes:,}")


class _Mapping:
    """A file in memory, read only, without an open descriptor: Python's own mappings keep one each."""

    _address: int | None = None

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._n_bytes = os.fstat(file.fileno()).st_size
            if self._n_bytes:
                address = _LIBC.mmap(None, self._n_bytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
                if address == ctypes.c_void_p(-1).value:
                    raise OSError(number := ctypes.get_errno(), os.strerror(number), str(path))
                self._address = address
        data = (self._address or 1, True)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (self._n_bytes,), "data": data}

    def __del__(self) -> None:
        if self._address:
            _LIBC.munmap(self._address, self._n_bytes)
