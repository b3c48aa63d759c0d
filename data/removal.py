"""Takes documents out of a prepared corpus: their tokens, ids and texts, in their own files alone.

A document that is removed leaves `</s>` in the place of each of its tokens, which is never trained on. All others stay
where they are, so a run that trains on the corpus goes on with the samples that it would have had. The manifest says
which documents went (sha256 of their ids), when, why, from which shards, and what the corpus was before.

New files are written beside, and take their places when all are there; a removal that was killed is completed by the
next one, and the corpus does not pass for whole in between.
"""

import datetime
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import UserError
from data.files import sha256
from data.manifest import MANIFEST, Manifest, ShardEntry
from data.shards import Shard

SUFFIX = ".removing"


def remove_documents(corpus_dir: Path, ids: Iterable[str], reason: str) -> list[str]:
    """Removes these documents; returns the stems of changed shards. `UserError`, and no change, for an unknown id."""
    _complete(corpus_dir)
    manifest, wanted = Manifest.load(corpus_dir), sorted(set(ids))
    rows = {entry.stem: _rows_of(corpus_dir / f"{entry.stem}.docs.parquet", wanted) for entry in manifest.shards}
    found = {doc_id for in_shard in rows.values() for doc_id in in_shard.values()}
    before = {known for removal in manifest.removed for known in removal["ids_sha256"]}
    if missing := [doc_id for doc_id in wanted if doc_id not in found and _sha256(doc_id) not in before]:
        found_none = f"{len(missing)} of {len(wanted)} ids are in no shard of {corpus_dir}: {', '.join(missing[:3])}"
        rule = "ids are those of the sources; copies, rejected and removed documents have none here"
        raise UserError(found_none, rule, "leave them out of ids=; `marathon trace` shows ids as they are")
    if not found:
        return []  # removed before
    touched = [entry for entry in manifest.shards if rows[entry.stem]]
    for entry in touched:
        _blank_texts(corpus_dir.parent / manifest.documents, entry, wanted)
    changed = {entry.stem: _erase(corpus_dir, entry, sorted(rows[entry.stem]), manifest) for entry in touched}
    note = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "reason": reason,
        "ids_sha256": [_sha256(doc_id) for doc_id in wanted if doc_id in found],
        "shards": sorted(changed),
        "corpus_hash_before": manifest.corpus_hash,
    }
    shards = [changed.get(entry.stem, entry) for entry in manifest.shards]
    replace(manifest, shards=shards, removed=[*manifest.removed, note]).save(corpus_dir, MANIFEST + SUFFIX)
    _complete(corpus_dir)
    return sorted(changed)


def _sha256(doc_id: str) -> str:
    return hashlib.sha256(doc_id.encode()).hexdigest()


def _complete(corpus_dir: Path) -> None:
    """Puts the files of a removal in their places, or clears what one left that was killed before they were whole."""
    decided = (corpus_dir / (MANIFEST + SUFFIX)).exists()
    for path in (corpus_dir / "shards").glob(f"*{SUFFIX}"):
        if decided:
            os.replace(path, path.with_name(path.name.removesuffix(SUFFIX)))
        else:
            path.unlink()
    if decided:
        os.replace(corpus_dir / (MANIFEST + SUFFIX), corpus_dir / MANIFEST)


def _rows_of(path: Path, ids: list[str]) -> dict[int, str]:
    """Rows whose `id` is among these, with it."""
    known = pq.read_table(path, columns=["id"])["id"]
    rows = np.flatnonzero(pc.is_in(known, pa.array(ids, known.type)))
    return dict(zip(rows.tolist(), known.take(rows).to_pylist(), strict=True))


def _erase(corpus_dir: Path, entry: ShardEntry, rows: list[int], manifest: Manifest) -> ShardEntry:
    """Writes the shard without the documents beside it; its entry of the manifest."""
    stem = corpus_dir / entry.stem
    content, sidecar = (stem.with_name(f"{stem.name}{suffix}{SUFFIX}") for suffix in (".bin", ".docs.parquet"))
    shutil.copyfile(f"{stem}.bin", content)
    shard = Shard(stem)
    tokens: np.memmap[Any, Any] = np.memmap(content, shard.tokens.dtype, "r+")
    for row in rows:
        start, n_tokens = shard.place(row)
        tokens[start : start + n_tokens] = manifest.tokenizer.eos_id
    tokens.flush()
    sizes = pq.read_table(f"{stem}.docs.parquet", columns=["n_bytes"])["n_bytes"]
    n_bytes = entry.n_bytes - sum(sizes.take(rows).to_pylist())
    _write_without(Path(f"{stem}.docs.parquet"), rows, sidecar)
    hashes = entry.sha256 | {".bin": sha256(content), ".docs.parquet": sha256(sidecar)}
    return replace(entry, n_removed=entry.n_removed + len(rows), n_bytes=n_bytes, sha256=hashes)


def _blank_texts(documents: Path, entry: ShardEntry, ids: list[str]) -> None:
    """In the cleaned documents, where they have been kept, so that another tokenizer does not meet them again."""
    for path in sorted(documents.glob(f"units/{entry.source}/*/{entry.language}.{entry.split}.parquet")):
        if rows := sorted(_rows_of(path, ids)):
            beside = path.with_name(f".{path.name}{SUFFIX}")
            _write_without(path, rows, beside)
            os.replace(beside, path)


def _write_without(path: Path, rows: list[int], target: Path) -> None:
    """A parquet file with nothing in these rows; its row groups stay, since others count by them."""
    with pq.ParquetFile(path) as file, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer:
        first = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            gone = np.isin(np.arange(first, first + table.num_rows), rows)
            first += table.num_rows
            for name in {"id", "text", "url", "location", "n_bytes"} & {*table.column_names}:
                at, column = table.column_names.index(name), table[name]
                nothing = pa.scalar(0 if name == "n_bytes" else "", column.type)
                table = table.set_column(at, table.schema.field(name), pc.if_else(pa.array(gone), nothing, column))
            writer.write_table(table, row_group_size=table.num_rows)
    with target.open("rb") as written:
        os.fsync(written.fileno())
