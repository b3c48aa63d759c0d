"""What becomes of the documents of one input file: the cleaning steps, and what each leaves and rejects.

Every record that is read is either a row of a parquet file of its language and split, or a line of `rejected.jsonl.zst`
with step, reason and place; the audit counts both.
"""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from configs.schema import RunConfig
from configs.text import CorpusConfig, DedupConfig, OptOutConfig
from data import language, privacy, quality, rights
from data.audit import READ, Audit
from data.decontaminate import Matches, Ngrams
from data.dedup import document_hashes, write_columns
from data.heldout import split_of
from data.minhash import Hashes
from data.sources import SPACE_MARK, Document, read_file, units

FLUSH_CHARACTERS = 4_000_000
"""A row group of a language holds about so much text; memory is bound by so much for each language of a unit."""
EXCERPT_CHARACTERS = 200
EARLY_STOP_RECORDS = 10_000
"""A source that is bad throughout stops after so many bad records, not after a day of writing them down."""

MATCHES = ".matches.npy"
"""Beside a file of documents: rows that hold what evaluations ask (data/decontaminate.py)."""

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.large_string(),
        "n_bytes": pa.int64(),
        "licence": pa.string(),
        "url": pa.string(),
        "location": pa.string(),
        "lang_score": pa.float32(),
        "lang_second": pa.string(),
        "quality": pa.float32(),
    }
)

Cleaning = tuple[str, Callable[[Document], str]]
"""A step by its name in the audit: changes a document in place, and says why it is rejected, or nothing."""


def cleaning(cfg: CorpusConfig) -> list[Cleaning]:
    """The steps that the config asks for, in their order; models are loaded here."""
    clean = cfg.clean
    steps: list[Cleaning | None] = [
        ("opt_out", rights.opt_out(clean.opt_out)) if _has_lists(clean.opt_out) else None,
        ("repair", quality.repair) if clean.repair_unicode else None,
        ("identify", language.identify(clean.identify)) if clean.identify.model else None,
        ("wanted", partial(_reason_not_wanted, wanted=set(cfg.languages))),
        ("quality", quality.quality(clean.thresholds)) if clean.thresholds else None,
        ("score", quality.scorer(clean.scorer, clean.min_quality, clean.scorer_label)) if clean.scorer else None,
        ("privacy", privacy.replace_personal_data(clean.privacy)) if clean.privacy else None,
    ]
    return [step for step in steps if step]


def derive_thresholds(cfg: RunConfig, path: Path, command: str) -> None:
    """Writes quality limits derived from all documents of a config, of languages that have enough of them."""
    steps = cleaning(cfg.corpus)
    found: dict[str, list[Document]] = {}
    for name, source in cfg.corpus.sources.items():
        for file in units(source):
            for document in read_file(name, source, file, cfg.cluster.online):
                if not document.problem and not any(step(document) for _, step in steps):
                    found.setdefault(document.lang, []).append(document)
    enough = {lang: members for lang, members in found.items() if len(members) >= quality.MIN_DOCUMENTS}
    for lang in sorted(found.keys() - enough.keys()):
        print(f"{lang}: {len(found[lang])} documents are too few, no limits", flush=True)
    lines = [command, *(f"{name}: {source.origin}" for name, source in cfg.corpus.sources.items())]
    quality.save_thresholds(quality.derive(enough), path, lines)


class UnitWriter:
    """Writes what became of the documents of one unit into a folder."""

    def __init__(self, folder: Path, cfg: CorpusConfig, questions: Ngrams | None) -> None:
        self.audit = Audit()
        self._folder, self._cfg, self._questions = folder, cfg, questions
        self._groups: dict[str, _Group] = {}
        self._rejected = io.TextIOWrapper(zstandard.open(folder / "rejected.jsonl.zst", "wb"), encoding="ascii")

    def reject(self, step: str, reason: str, document: Document, n_bytes: int) -> None:
        """Writes down that a document, or a record that is none, was left out, and counts it."""
        place = {
            "source": document.source,
            "id": document.id,
            "location": document.location,
            "excerpt": document.text[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode(),
        }
        self._rejected.write(json.dumps({"step": step, "reason": reason, **place}) + "\n")
        self.audit.reject(step, document.lang, reason, n_bytes, place)

    def add(self, document: Document, n_bytes: int) -> None:
        """Keeps a document."""
        name = f"{document.lang}.{split_of(document, self._cfg.holdout)}"
        if (group := self._groups.get(name)) is None:
            group = self._groups[name] = _Group(self._folder / name, self._cfg.dedup, self._questions)
        group.add(document, n_bytes)

    def close(self) -> None:
        """Completes all files."""
        for group in self._groups.values():
            group.close()
        self._rejected.close()
        self.audit.save(self._folder / "audit.json")


def clean_unit(documents: Iterator[Document], steps: list[Cleaning], writer: UnitWriter, max_bad_share: float) -> None:
    """Takes the documents and bad records of one unit through the steps."""
    audit, n_bad = writer.audit, 0
    for document in documents:
        audit.count_record(document.source, document.problem)
        n_bytes = _n_bytes(document.text)
        _count(audit.tally(READ, document.lang).came, n_bytes)
        if document.problem:
            writer.reject(READ, document.problem, document, n_bytes)
            n_bad += 1
            if n_bad % EARLY_STOP_RECORDS == 0:
                audit.refuse_bad_share(document.source, max_bad_share)
            continue
        _count(audit.tally(READ, document.lang).left, n_bytes)
        for name, step in steps:
            tally, lang, text = audit.tally(name, document.lang), document.lang, document.text
            _count(tally.came, n_bytes)
            if reason := step(document):
                writer.reject(name, reason, document, n_bytes)
                break
            if document.text is not text:
                tally.changed += 1
                n_bytes = _n_bytes(document.text)
            _count(tally.left if document.lang == lang else audit.tally(name, document.lang).left, n_bytes)
        else:
            writer.add(document, n_bytes)


class _Group:
    """Documents of one language and split, gathered until there are enough to be written."""

    def __init__(self, stem: Path, cfg: DedupConfig, questions: Ngrams | None) -> None:
        self._stem, self._cfg, self._questions = stem, cfg, questions
        self._parquet = pq.ParquetWriter(
            f"{stem}.parquet", SCHEMA, compression="zstd", compression_level=1, use_dictionary=["licence"]
        )
        self._rows: list[tuple[Any, ...]] = []
        self._hashes: list[Hashes] = []
        self._matches: list[Matches] = []
        self._source, self._n_characters, self._n_written = "", 0, 0

    def add(self, document: Document, n_bytes: int) -> None:
        d = document
        self._rows.append((d.id, d.text, n_bytes, d.licence, d.url, d.location, d.lang_score, d.lang_second, d.quality))
        self._source = d.source
        self._n_characters += len(d.text)
        if self._n_characters >= FLUSH_CHARACTERS:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._parquet.close()
        write_columns(Path(f"{self._stem}.npy"), self._hashes)
        if self._questions:
            write_columns(Path(f"{self._stem}{MATCHES}"), self._matches)

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True))
        ids, texts, _, licences = columns[:4]
        self._hashes.append(document_hashes(self._source, ids, licences, texts, self._cfg))
        if self._questions:
            self._matches.append(self._questions.match(texts, self._n_written))
        self._n_written += len(texts)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._parquet.write_table(pa.table(arrays, SCHEMA))
        self._rows.clear()
        self._n_characters = 0


def _reason_not_wanted(document: Document, wanted: set[str]) -> str:
    if not document.lang:
        return "language_missing"
    if SPACE_MARK in document.text:  # sentencepiece writes a space so, and would give it back as one
        return "contains_u2581"
    return "" if not wanted or document.lang in wanted else "language_not_wanted"


def _has_lists(cfg: OptOutConfig) -> bool:
    return bool(cfg.domains or cfg.ids or cfg.robots)


def _count(pair: list[int], n_bytes: int) -> None:
    pair[0] += 1
    pair[1] += n_bytes


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
