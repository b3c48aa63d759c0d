import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.shards import SUFFIXES, Shard, ShardWriter, read_sidecar

TEXTS = ["eins", "zwölf", "x"]
IDS = [[5, 6, 7], [8], []]


def write(stem: Path, ids: list[list[int]], vocab_size: int = 1000) -> None:
    writer = ShardWriter(stem, vocab_size, bos_id=1, eos_id=2)
    for i, document in enumerate(ids):
        writer.add(f"doc/{i}", "source", TEXTS[i % 3], document)
    writer.close()


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
    write(tmp_path / "a", IDS)
    rows = list(read_sidecar(tmp_path / "a", "id", "n_bytes", "n_tokens", "source"))
    assert rows == [("doc/0", 4, 5, "source"), ("doc/1", 6, 3, "source"), ("doc/2", 1, 2, "source")]


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


def test_a_shard_is_complete_or_absent(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", 1000, bos_id=1, eos_id=2)
    writer.add("doc", "source", "x", [3])
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"a{suffix}" for suffix in SUFFIXES)


def test_a_token_that_does_not_fit_its_type_is_not_wrapped(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", 1000, bos_id=1, eos_id=2)
    with pytest.raises(OverflowError):
        writer.add("doc", "source", "x", [70_000])


def test_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", IDS)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[17] = 5
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"a\.idx is not"):
        Shard(tmp_path / "a")
