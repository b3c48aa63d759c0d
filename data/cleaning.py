"""What becomes of the documents of one input file: the cleaning steps, and what each leaves and rejects.

Every record that is read is either a row of a parquet file of its language and split, or a line of `rejected.jsonl.zst`
with step, reason and place; the audit counts both.
"""

import io
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from configs.schema import RunConfig
from configs.text import CorpusConfig, DedupConfig
from data import language, privacy, quality, rights
from data.audit import READ, Audit
from data.columns import numbers, strings, utf8
from data.decontaminate import Matches, Ngrams
from data.dedup import document_hashes, write_columns
from data.heldout import split_of
from data.minhash import Hashes
from data.sources import SPACE_MARK, Document, read_file, units

FLUSH_CHARACTERS = 4_000_000
"""A row group of a language holds about so much text; memory is bound by so much for each language of a unit."""
EARLY_STOP_RECORDS = 10_000  # bad ones, where a source is bad throughout; not after a day of writing them down

MATCHES = ".matches.npy"  # beside a file of documents: rows that hold what evaluations ask (data/decontaminate.py)

_TEXT, _SCORE = pa.large_string(), pa.float32()
SCHEMA = pa.schema(
    {"id": _TEXT, "text": _TEXT, "n_bytes": pa.int64(), "licence": _TEXT, "url": _TEXT, "location": _TEXT}
    | {"lang_score": _SCORE, "lang_second": _TEXT, "quality": _SCORE}
)

Cleaning = tuple[str, Callable[[Document], str]]
"""A step by its name in the audit: changes a document in place, and says why it is rejected, or nothing."""


def cleaning(cfg: CorpusConfig) -> list[Cleaning]:
    """The steps that the config asks for, in their order; models are loaded here."""
    clean, lists = cfg.clean, cfg.clean.opt_out
    steps: list[Cleaning | None] = [
        ("opt_out", rights.opt_out(lists)) if lists.domains or lists.ids or lists.robots else None,
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
    lines = [command, *(f"{name}: {source.origin}" for name, source in cfg.corpus.sources.items())]
    quality.save_thresholds(quality.derive(found), path, lines)


def clean_unit(
    documents: Iterable[Document], steps: list[Cleaning], folder: Path, cfg: CorpusConfig, questions: Ngrams | None
) -> None:
    """Takes the documents and bad records of one unit through the steps, and writes what they become to a folder."""
    audit, n_bad = Audit([READ, *(name for name, _ in steps)]), 0
    groups: dict[str, _Group] = {}
    with io.TextIOWrapper(zstandard.open(folder / "rejected.jsonl.zst", "wb"), encoding="ascii") as rejected:
        for document in documents:
            step, reason, content = _apply(steps, document, audit)
            if reason:
                excerpt = document.text[:200].encode("utf-8", "backslashreplace").decode()
                place = {name: getattr(document, name) for name in ("source", "id", "location")} | {"excerpt": excerpt}
                rejected.write(json.dumps({"step": step, "reason": reason, **place}) + "\n")
                audit.tally(step, document.lang).reject(reason, 1, len(content), [place])
                n_bad += step == READ
                if step == READ and n_bad % EARLY_STOP_RECORDS == 0:
                    audit.refuse_bad_share(document.source, cfg.max_bad_share)
            else:
                name = f"{document.lang}.{split_of(document, cfg.holdout)}"
                if name not in groups:
                    groups[name] = _Group(folder / name, cfg.dedup, questions)
                groups[name].add(document, content)
    for group in groups.values():
        group.close()
    audit.save(folder / "audit.json")


def _apply(steps: list[Cleaning], document: Document, audit: Audit) -> tuple[str, str, bytes]:
    """Which step rejects a document and why, both empty where none does; and its text as UTF-8."""
    content = _utf8(document.text)
    audit.count_record(document.source, document.lang, len(content), document.problem)
    if document.problem:
        return READ, document.problem, content
    for name, step in steps:
        lang, text = document.lang, document.text
        reason = step(document)
        if document.text is not text or document.lang != lang:
            before, content = len(content), _utf8(document.text)
            audit.move(name, (lang, before), (document.lang, len(content)))
            audit.tally(name, document.lang).changed += document.text is not text
        if reason:
            return name, reason, content
    return "", "", content


class _Group:
    """Documents of one language and split, gathered until there are enough to be written."""

    def __init__(self, stem: Path, cfg: DedupConfig, questions: Ngrams | None) -> None:
        self._stem, self._cfg, self._questions = stem, cfg, questions
        self._parquet = pq.ParquetWriter(
            f"{stem}.parquet", SCHEMA, compression="zstd", compression_level=1, use_dictionary=["licence"]
        )
        self._documents: list[Document] = []
        self._contents: list[bytes] = []
        self._beside: dict[str, list[Hashes | Matches]] = {".npy": [], **({MATCHES: []} if questions else {})}
        self._n_characters = self._n_written = 0

    def add(self, document: Document, content: bytes) -> None:
        self._documents.append(document)
        self._contents.append(content)
        self._n_characters += len(document.text)
        if self._n_characters >= FLUSH_CHARACTERS:
            self._flush()

    def close(self) -> None:
        if self._documents:
            self._flush()
        self._parquet.close()
        for suffix, blocks in self._beside.items():
            write_columns(Path(f"{self._stem}{suffix}"), blocks)

    def _flush(self) -> None:
        told = {name: [getattr(d, name) for d in self._documents] for name in SCHEMA.names if name != "n_bytes"}
        texts, source = told.pop("text"), self._documents[0].source
        self._beside[".npy"].append(document_hashes(source, told["id"], told["licence"], texts, self._cfg))
        if self._questions:
            self._beside[MATCHES].append(self._questions.match(texts, self._n_written))
        self._n_written += len(texts)
        columns = {"text": utf8(self._contents), "n_bytes": numbers(np.fromiter(map(len, self._contents), np.int64))}
        columns["text"].validate(full=True)
        for name, values in told.items():
            columns[name] = strings(values) if isinstance(values[0], str) else numbers(np.array(values, np.float32))
        self._parquet.write_table(pa.table([columns[name] for name in SCHEMA.names], SCHEMA))
        self._documents, self._contents, self._n_characters = [], [], 0


def _reason_not_wanted(document: Document, wanted: set[str]) -> str:
    if not document.lang:
        return "language_missing"
    if SPACE_MARK in document.text:  # sentencepiece writes a space so, and would give it back as one
        return "contains_u2581"
    return "" if not wanted or document.lang in wanted else "language_not_wanted"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # what a bad record has is counted, not kept
