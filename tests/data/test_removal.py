import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from configs.enums import Packing
from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import TokenizerConfig
from data.files import sha256
from data.heldout import valid_documents
from data.loader import Batch, Samples, _open_shard
from data.manifest import Manifest, verify, verify_files
from data.order import CYCLE, Phase
from data.packing import build_packing, record_packing
from data.pipeline import prepare
from data.removal import remove_documents
from data.shards import Shard, read_sidecar
from model.loss import IGNORED, next_token_labels
from tests.data.corpora import BOS, EOS, Ids, write_corpus

SEQ_LEN, SEED = 32, 3
PHASES = [Phase(0, {"de/books": CYCLE // 2, "de/web": CYCLE // 4, "fr/web": CYCLE // 4})]
POSITIONS = np.arange(400)
GONE = ["de.books.0/0", "de.books.0/7", "de.books.0/8", "de.books.1/2", "fr.web.0/19"]
"""The first of a shard, two that follow each other, one of another shard, and the last of all."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three parts; documents that are empty, short, and longer than a sequence."""
    rng = np.random.default_rng(0)

    def shard(n: int) -> Ids:
        return [rng.integers(4, 1_000, size).tolist() for size in rng.integers(0, 90, n)]

    shards = {("de", "books"): [shard(20), shard(5)], ("de", "web"): [shard(30)], ("fr", "web"): [shard(20)]}
    folder = write_corpus(tmp_path / "corpus", shards)
    for entry in Manifest.load(folder).shards:
        build_packing(folder / entry.stem, SEQ_LEN)
    record_packing(folder, SEQ_LEN)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def require_shards(corpus: Path) -> None:
    verify_files(corpus, [name for name in Manifest.load(corpus).hashes if name.startswith("shards/")])


def read(corpus: Path, packing: Packing) -> Batch:
    _open_shard.cache_clear()  # a process goes on with the files that it has open; this is the next one
    samples = Samples(corpus, PHASES, SEQ_LEN, SEED, packing)
    return samples.__getitems__(POSITIONS)


def rows_of(corpus: Path, ids: list[str]) -> dict[str, list[int]]:
    """Rows of these documents by the stem of their shard."""
    found: dict[str, list[int]] = {}
    for entry in Manifest.load(corpus).shards:
        for row, (doc_id,) in enumerate(read_sidecar(corpus / entry.stem, "id")):
            if doc_id in ids:
                found.setdefault(entry.stem, []).append(row)
    return found


def test_only_the_shards_of_the_documents_change(small: Path) -> None:
    before, manifest, rows = contents(small), Manifest.load(small), rows_of(small, GONE)
    tokens = {entry.stem: Shard(small / entry.stem).tokens.copy() for entry in manifest.shards}
    touched = remove_documents(small, reversed(GONE), "asked by the author")
    assert touched == sorted(rows) and len(touched) == 3
    after = contents(small)
    changed = {f"{stem}{suffix}" for stem in touched for suffix in (".bin", ".docs.parquet")} | {"manifest.json"}
    assert {name for name in after if after[name] != before.get(name)} == changed and after.keys() == before.keys()
    for stem, old in tokens.items():
        shard, expected = Shard(small / stem), old.copy()
        for row in rows.get(stem, []):
            start, n_tokens = shard.place(row)
            expected[start : start + n_tokens] = EOS
        assert np.array_equal(shard.tokens, expected)
        ids = [doc_id for (doc_id,) in read_sidecar(small / stem, "id")]
        assert [row for row, doc_id in enumerate(ids) if not doc_id] == rows.get(stem, [])
    require_shards(small)


def test_the_manifest_says_what_went_and_what_was_before(small: Path) -> None:
    before = Manifest.load(small)
    remove_documents(small, GONE[:3], "first")
    between = Manifest.load(small)
    remove_documents(small, GONE[3:], "second")
    after = Manifest.load(small)
    hashes = [[hashlib.sha256(doc_id.encode()).hexdigest() for doc_id in ids] for ids in (GONE[:3], GONE[3:])]
    assert [note["ids_sha256"] for note in after.removed] == hashes
    assert [note["reason"] for note in after.removed] == ["first", "second"]
    assert [n["corpus_hash_before"] for n in after.removed] == [before.corpus_hash, between.corpus_hash]
    assert after.corpus_hash not in (before.corpus_hash, between.corpus_hash)
    assert [entry.n_removed for entry in after.shards] == [3, 1, 0, 1]
    assert [b.n_bytes - a.n_bytes for b, a in zip(before.shards, after.shards, strict=True)] == [3, 1, 0, 1]
    assert [(e.n_docs, e.n_tokens) for e in after.shards] == [(e.n_docs, e.n_tokens) for e in before.shards]
    assert after.facts()["removed_documents"] == 5
    assert not [doc_id for doc_id in GONE if doc_id in (small / "manifest.json").read_text()]


@pytest.mark.parametrize("packing", list(Packing))
def test_other_documents_are_trained_on_as_before_and_nothing_of_the_removed(small: Path, packing: Packing) -> None:
    before = read(small, packing)
    marked = mark(small, rows_of(small, GONE), packing)
    remove_documents(small, GONE, "asked")
    after = read(small, packing)
    assert torch.equal(after["position"], before["position"]) and torch.equal(after["part"], before["part"])
    untouched = ~marked.any(dim=1)
    assert 20 < int(untouched.sum()) < len(POSITIONS) - 20
    for name in ("tokens", "doc"):
        assert torch.equal(after[name][untouched], before[name][untouched])  # type: ignore[literal-required]
    assert torch.equal(after["tokens"][~marked], before["tokens"][~marked])
    assert (after["tokens"][marked] == EOS).all()
    labels = [next_token_labels(batch["tokens"], batch["doc"]) for batch in (before, after)]
    is_gone = marked[:, 1:]
    assert (labels[0][is_gone] != IGNORED).sum() > 100, "it was predicted before"
    assert (labels[1][is_gone] == IGNORED).all()
    assert torch.equal(labels[1][~is_gone], labels[0][~is_gone])


def mark(corpus: Path, rows: dict[str, list[int]], packing: Packing) -> torch.Tensor:
    """Which tokens of the samples are those of these documents: found by another corpus, which has marks for tokens."""
    other = corpus.with_name("marked")
    shutil.copytree(corpus, other)
    for entry in Manifest.load(other).shards:
        shard = Shard(other / entry.stem)
        tokens = np.zeros_like(shard.tokens)
        for row in rows.get(entry.stem, []):
            start, n_tokens = shard.place(row)
            tokens[start : start + n_tokens] = 999
        (other / f"{entry.stem}.bin").write_bytes(tokens.tobytes())
    return read(other, packing)["tokens"] == 999


@pytest.mark.parametrize("ids", [["nobody/1"], [*GONE, "nobody/1"], [""]])
def test_an_unknown_id_refuses_and_changes_nothing(small: Path, ids: list[str]) -> None:
    before = contents(small)
    with pytest.raises(UserError, match=f"1 of {len(ids)} ids are in no shard of {small}: {ids[-1]}"):
        remove_documents(small, ids, "asked")
    assert contents(small) == before


class Killed(BaseException):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th renaming, from 0, does not come to pass."""
    replace, n_calls = os.replace, iter(range(1000))

    def stop(*args: object) -> None:
        if next(n_calls) == n:
            raise Killed
        replace(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stop)


@pytest.mark.parametrize("n", range(9))
def test_a_removal_that_was_killed_is_completed_by_the_next(
    small: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    original = contents(small)
    with monkeypatch.context() as patch:
        die_at(patch, n)
        if n < 8:  # the manifest beside, two files of each of three shards, the manifest
            with pytest.raises(Killed):
                remove_documents(small, GONE, "asked")
        else:
            remove_documents(small, GONE, "asked")
    halfway = {name: known for name, known in contents(small).items() if name in original}
    if halfway != original and n < 8:
        with pytest.raises(UserError, match="the manifest says"):
            require_shards(small)
    decided = n > 0
    later = ["de.web.0/3"] if decided else [*GONE, "de.web.0/3"]
    remove_documents(small, later, "asked again")
    require_shards(small)
    assert not [path for path in small.rglob("*.removing") if not path.name.startswith(".")]
    manifest = Manifest.load(small)
    assert [note["reason"] for note in manifest.removed] == ["asked", "asked again"][not decided :]
    assert manifest.facts()["removed_documents"] == 6 and rows_of(small, [*GONE, *later]) == {}
    for entry in manifest.shards:
        shard, ids = Shard(small / entry.stem), [i for (i,) in read_sidecar(small / entry.stem, "id")]
        for row, doc_id in enumerate(ids):
            assert (shard.document(row)[0] == BOS) == bool(doc_id)
            assert bool((shard.document(row) == EOS).all()) == (not doc_id)


def texts_in(folder: Path) -> list[str]:
    found: list[str] = []
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        found += [
            str(value) for name in ("id", "text") if name in table.column_names for value in table[name].to_pylist()
        ]
    return found


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_removed_document_does_not_come_back(make_config: Callable[..., RunConfig], split: str) -> None:
    records = [{"id": f"doc/{i}", "lang": "de", "text": f"Dokument {i} von Erika Mustermann{i}"} for i in range(60)]
    cfg = make_config(records)
    folder = prepare(cfg)
    assert folder is not None
    before = Manifest.load(folder)
    (entry,) = before.shards_of("de", split)
    gone = [doc_id for (doc_id,) in read_sidecar(folder / entry.stem, "id")][1:4]
    remove_documents(folder, gone, "asked")
    assert prepare(cfg) == folder and Manifest.load(folder).removed
    assert not {document.id for document in valid_documents(folder)} & {"", *gone}
    cfg.tokenizer = TokenizerConfig(vocab_size=320, character_coverage=1.0)
    other = prepare(cfg)
    assert other is not None and other != folder
    after = Manifest.load(other)
    assert after.documents == before.documents
    assert [e.n_docs for e in before.shards_of("de", split)] == [e.n_docs + 3 for e in after.shards_of("de", split)]
    names = [f"{word}{doc_id[4:]}" for doc_id in gone for word in ("doc/", "Mustermann")]
    told = texts_in(folder.parent)
    assert len(told) > 200 and not [t for t in told if [n for n in names if re.search(rf"{n}\b", t)]]
    verify(other)
