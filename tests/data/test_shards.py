import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data.shards import SUFFIXES, Shard, ShardWriter, document_ids, read_sidecar

TEXTS = ["eins", "zwölf", "x"]
IDS = [[5, 6, 7], [8], []]


def add(writer: ShardWriter, ids: list[list[int]], first: int = 0) -> None:
    texts = [TEXTS[i % 3] for i in range(first, first + len(ids))]
    rows = {
        "id": [f"doc/{first + i}" for i in range(len(ids))],
        "n_bytes": [len(text.encode()) for text in texts],
        "source": ["source"] * len(ids),
    }
    ends = np.cumsum([len(document) for document in ids], dtype=np.int64)
    writer.add(pa.table(rows), ends, np.array([token for document in ids for token in document], np.int64))


def write(stem: Path, ids: list[list[int]], vocab_size: int = 1000, docs_a_call: int = 2) -> ShardWriter:
    writer = ShardWriter(stem, vocab_size, bos_id=1, eos_id=2)
    for first in range(0, len(ids), docs_a_call):
        add(writer, ids[first : first + docs_a_call], first)
    writer.close()
    return writer


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(65_499, 8, "<u2"), (65_500, 4, "<i4"), (131_072, 4, "<i4")])
def test_the_bytes_are_those_of_megatron(tmp_path: Path, vocab_size: int, code: int, dtype: str) -> None:
    """Read field by field as the published layout says, without our reader."""
    ids = [*IDS, [vocab_size - 1]]
    write(tmp_path / "a", ids, vocab_size)
    index = (tmp_path / "a.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    assert struct.unpack("<Q", index[9:17]) == (1,)
    assert index[17] == code
    n_sequences, n_document_ends = struct.unpack("<QQ", index[18:34])
    assert (n_sequences, n_document_ends) == (4, 5)
    lengths = np.frombuffer(index, "<i4", 4, 34)
    pointers = np.frombuffer(index, "<i8", 4, 34 + 4 * 4)
    documents = np.frombuffer(index, "<i8", 5, 34 + 4 * 4 + 8 * 4)
    assert len(index) == 34 + 4 * 4 + 8 * 4 + 8 * 5
    assert documents.tolist() == [0, 1, 2, 3, 4]
    tokens = (tmp_path / "a.bin").read_bytes()
    for sequence, pointer, length in zip(ids, pointers, lengths, strict=True):
        assert np.frombuffer(tokens, dtype, length, pointer).tolist() == [1, *sequence, 2]
    assert len(tokens) == sum(lengths) * np.dtype(dtype).itemsize


def test_the_sidecar_ties_sequences_to_documents(tmp_path: Path) -> None:
    writer = write(tmp_path / "a", IDS)
    rows = list(read_sidecar(tmp_path / "a", "id", "n_bytes", "n_tokens", "offset", "source"))
    assert rows == [("doc/0", 4, 5, 0, "source"), ("doc/1", 6, 3, 5, "source"), ("doc/2", 1, 2, 8, "source")]
    assert (writer.n_docs, writer.n_bytes, writer.n_tokens) == (3, 11, 10)


def test_how_documents_come_in_changes_no_byte(tmp_path: Path) -> None:
    ids = IDS * 4
    for name, docs_a_call in (("one", 1), ("five", 5), ("all", 12)):
        write(tmp_path / name, ids, docs_a_call=docs_a_call)
    for suffix in (".bin", ".idx"):
        assert len({(tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "five", "all")}) == 1
    tables = [pq.read_table(tmp_path / f"{name}.docs.parquet") for name in ("one", "five", "all")]
    assert tables[0].equals(tables[1]) and tables[1].equals(tables[2])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 999), max_size=9), min_size=1, max_size=30), st.data())
def test_boundaries_are_those_of_the_documents(tmp_path: Path, ids: list[list[int]], data: st.DataObject) -> None:
    write(tmp_path / "a", ids)
    shard, documents = Shard(tmp_path / "a"), [[1, *d, 2] for d in ids]
    assert [shard.document(i).tolist() for i in range(shard.n_docs)] == documents
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    first = data.draw(st.integers(0, len(shard.tokens) - 1))
    end = data.draw(st.integers(first, len(shard.tokens)))
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    assert shard.starts_between(first, end).tolist() == [s for s in starts if first < s < end]
    if first < end:
        owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
        assert list(shard.rows_between(first, end)) == sorted(set(owner[first:end].tolist()))


def test_a_shard_is_complete_or_absent(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", 1000, bos_id=1, eos_id=2)
    add(writer, [[3]])
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"a{suffix}" for suffix in SUFFIXES)


@pytest.mark.parametrize(("vocab_size", "token"), [(1000, 65_536), (1000, -1), (131_072, 2**31), (131_072, -1)])
def test_a_token_that_does_not_fit_its_type_is_not_wrapped(tmp_path: Path, vocab_size: int, token: int) -> None:
    writer = ShardWriter(tmp_path / "a", vocab_size, bos_id=1, eos_id=2)
    with pytest.raises(OverflowError, match=str(token)):
        add(writer, [[5], [token, 6]])


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        (".idx", lambda b: b[:17] + b"\x05" + b[18:], "not an index"),
        (".idx", lambda b: b[:20], "unpack requires a buffer"),
        (".idx", lambda b: b[:-1], "101 bytes, where the index tells of 102"),
        (".bin", lambda b: b[:-2], "18 bytes, where the index tells of 20"),
        (".bin", lambda b: b"", "0 bytes, where"),
        (".bin", None, "No such file"),
        (".idx", None, "No such file"),
    ],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes] | None, said: str
) -> None:
    write(tmp_path / "a", IDS)
    path = tmp_path / f"a{suffix}"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(UserError, match=rf"{path}: .*{said}") as error:
        Shard(tmp_path / "a")
    assert "marathon data" in error.value.repair


def test_ids_are_read_from_their_row_groups_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", [[5]] * 35, docs_a_call=10)
    assert document_ids(tmp_path / "a", [34, 0, 9, 10, 0]) == {i: f"doc/{i}" for i in (34, 0, 9, 10)}
    assert document_ids(tmp_path / "a", []) == {}
    path = tmp_path / "a.docs.parquet"
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 4
        column = file.metadata.row_group(1).column(0)
    content, start = bytearray(path.read_bytes()), column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert document_ids(tmp_path / "a", [9, 20]) == {9: "doc/9", 20: "doc/20"}
    with pytest.raises(UserError, match=str(path)):
        document_ids(tmp_path / "a", [15])


def test_a_sidecar_that_lacks_documents_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", IDS)
    with pytest.raises(UserError, match=r"a\.docs\.parquet: 3 rows, fewer than"):
        document_ids(tmp_path / "a", [1, 3])
    (tmp_path / "a.docs.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.docs\.parquet"):
        document_ids(tmp_path / "a", [1])
