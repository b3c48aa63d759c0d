"""A prepared corpus: from the sources of a config to a folder named by its content.

The folder is complete or absent. It is built hidden beside its place and renamed, so a killed process
leaves nothing that looks finished, and of two processes at once one wins and the other uses its work.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import socket
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import RunConfig
from data import tokenizer
from data.files import sha256, sha256_cached
from data.heldout import split_of
from data.manifest import MANIFEST, TRAIN, VALID, Manifest, ShardEntry, TokenizerEntry
from data.quarantine import Quarantine
from data.shards import SUFFIXES, ShardWriter
from data.sources import Document, read_documents, source_files
from data.tokenizer import Encoder
from ledger.progress import Progress

FORMAT = 1
"""Part of every key: raise it when the same text would give other files."""

BATCH_DOCS, BATCH_CHARACTERS = 1000, 4_000_000
"""Documents are encoded together up to one of these."""

VERIFIED_DOCS, VERIFIED_ONE_IN = 8, 1000
"""Encoding is compared with sentencepiece for the first documents of each shard, then for one in so many."""

ShardKey = tuple[str, str, str]
"""Language, source, split: a shard has one licence and one origin."""


def prepare(cfg: RunConfig) -> Path:
    """Folder of the prepared corpus, built if it is not there: tokenizer/ shards/ manifest.json quarantine.jsonl.

    Raises `UserError` for missing or damaged sources, too many bad records, and languages without text.
    """
    inputs = _inputs(cfg)
    folder = _corpora(cfg) / _key(cfg, inputs)
    if (folder / MANIFEST).exists():
        return folder
    with _alone(folder):
        if not (folder / MANIFEST).exists():
            _build_beside(cfg, inputs, folder)
    print(f"corpus {folder}\n{language_table(Manifest.load(folder))}", flush=True)
    return folder


def corpus_dir(cfg: RunConfig) -> Path:
    """Where `prepare` puts the corpus of this config, whether it is there yet or not."""
    return _corpora(cfg) / corpus_key(cfg)


def corpus_key(cfg: RunConfig) -> str:
    """16 hexadecimal digits of the hash over the corpus and tokenizer sections and the content of all inputs.

    Cheap after the first time: hashes of inputs are remembered by path, size and time of change.
    """
    return _key(cfg, _inputs(cfg))


def documents(cfg: RunConfig, quarantine: Quarantine) -> Iterator[Document]:
    """Every document of the corpus on its way through the steps; a further step is one more line."""
    for name, source in cfg.corpus.sources.items():
        stream = read_documents(name, source, quarantine, cfg.cluster.online)
        stream = _in_languages(stream, set(cfg.corpus.languages), quarantine)
        stream = _with_fresh_ids(stream, quarantine)
        yield from stream
        quarantine.check(name)


def language_table(manifest: Manifest) -> str:
    """Training documents, tokens and bytes per token by language, as text."""
    facts = manifest.facts()
    lines = [f"{'language':<10}{'train docs':>12}{'held out':>10}{'tokens':>18}{'bytes/token':>13}"]
    for lang in manifest.languages(TRAIN):
        counts, n_held_out = facts["languages"][lang], sum(s.n_docs for s in manifest.shards_of(lang, VALID))
        columns = f"{counts['documents']:>12,}{n_held_out:>10,}{counts['tokens']:>18,}"
        lines.append(f"{lang:<10}{columns}{counts['bytes'] / counts['tokens']:>13.2f}")
    n_bad, n_other = (
        sum(n for counts in by_source.values() for n in counts.values())
        for by_source in (manifest.quarantine, manifest.other_languages)
    )
    lines.append(f"{n_bad:,} records in quarantine, {n_other:,} documents in other languages")
    return "\n".join(lines)


def _in_languages(stream: Iterator[Document], wanted: set[str], quarantine: Quarantine) -> Iterator[Document]:
    for document in stream:
        if not wanted or document.lang in wanted:
            yield document
        else:
            quarantine.other_languages[document.source][document.lang] += 1


def _with_fresh_ids(stream: Iterator[Document], quarantine: Quarantine) -> Iterator[Document]:
    """Documents whose id is new within their source."""
    seen: set[bytes] = set()
    for document in stream:
        # 16 bytes an id, whatever its length: a source may have 1e8 of them.
        digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
        if digest in seen:
            quarantine.put(document.source, document.location, "id_repeated", document.id)
        else:
            seen.add(digest)
            yield document


def _build_beside(cfg: RunConfig, inputs: dict[str, dict[str, str]], folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}.{socket.gethostname()}.{secrets.token_hex(4)}")
    hidden.mkdir()
    try:
        _build(cfg, inputs, hidden)
        _flush(hidden)
        hidden.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():  # where it exists, another node was faster
            raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _build(cfg: RunConfig, inputs: dict[str, dict[str, str]], folder: Path) -> None:
    model = tokenizer.read_model(cfg.tokenizer.path) if cfg.tokenizer.path else None
    words = _survey(cfg, folder, count_words=model is None)
    if model is None:
        print(f"tokenizer: training {cfg.tokenizer.vocab_size} entries", flush=True)
        model = tokenizer.train(words, cfg.tokenizer)
    tokenizer.export(model, folder / "tokenizer")
    encoder = Encoder(folder / "tokenizer")
    quarantine = Quarantine(folder / "quarantine.jsonl", cfg.corpus.max_bad_share)
    writers = _write_shards(documents(cfg, quarantine), cfg, encoder, folder)
    quarantine.close()
    manifest = Manifest(
        shards=[_entry(cfg, key, writer, folder) for key, writer in sorted(writers.items())],
        tokenizer=_tokenizer_entry(encoder, folder / "tokenizer"),
        n_read=dict(quarantine.n_read),
        quarantine={source: dict(sorted(counts.items())) for source, counts in quarantine.reasons.items()},
        other_languages={source: dict(sorted(counts.items())) for source, counts in quarantine.other_languages.items()},
        inputs=inputs,
        max_valid_docs_per_language=cfg.corpus.holdout.max_docs_per_language,
        versions={name: importlib.metadata.version(name) for name in ("sentencepiece", "tokenizers", "numpy")},
    )
    manifest.save(folder)


def _survey(cfg: RunConfig, folder: Path, count_words: bool) -> dict[str, Counter[str]]:
    """A first pass: finds what would stop the second, and counts the words of the training split."""
    words: dict[str, Counter[str]] = defaultdict(Counter)
    n_docs: Counter[tuple[str, str]] = Counter()
    quarantine = Quarantine(folder / "quarantine.jsonl", cfg.corpus.max_bad_share)
    for document in _with_progress(documents(cfg, quarantine), "reading"):
        split = split_of(document, cfg.corpus.holdout)
        n_docs[document.lang, split] += 1
        if count_words and split == TRAIN:
            tokenizer.count_words(document.text, words[document.lang])
    quarantine.close()
    _require_text_in_every_language(cfg, n_docs, quarantine)
    return words


def _require_text_in_every_language(cfg: RunConfig, n_docs: Counter[tuple[str, str]], quarantine: Quarantine) -> None:
    wanted = cfg.corpus.languages or sorted({lang for lang, _ in n_docs})
    lacking = [lang for lang in wanted if not (n_docs[lang, TRAIN] and n_docs[lang, VALID])]
    if wanted and not lacking:
        return
    others: Counter[str] = sum(quarantine.other_languages.values(), Counter())
    counts = ", ".join(f"{lang} {n_docs[lang, TRAIN]} + {n_docs[lang, VALID]}" for lang in (lacking or wanted)[:5])
    found = ", ".join(f"{lang} {n}" for lang, n in others.most_common(5))
    raise UserError(
        f"{quarantine.n_read.total()} records in {', '.join(cfg.corpus.sources)}; documents for training + validation: "
        f"{counts or 'none at all'}{' …' if len(lacking) > 5 else ''}; in other languages: {found or 'none'}",
        "every language of a corpus has documents to train on and documents held out",
        "add a source, take the language out of corpus.languages, or change corpus.holdout.share",
    )


def _write_shards(
    stream: Iterator[Document], cfg: RunConfig, encoder: Encoder, folder: Path
) -> dict[ShardKey, ShardWriter]:
    writers: dict[ShardKey, ShardWriter] = {}
    for batch in _batched(_with_progress(stream, "encoding")):
        encoded = list(zip(batch, encoder.encode_batch([d.text for d in batch]), strict=True))
        sample = []
        for document, ids in encoded:
            key = (document.lang, document.source, split_of(document, cfg.corpus.holdout))
            if key not in writers:
                stem = folder / "shards" / ".".join(key)
                writers[key] = ShardWriter(stem, encoder.vocab_size, encoder.bos_id, encoder.eos_id)
            if writers[key].n_docs < VERIFIED_DOCS or zlib.crc32(document.id.encode()) % VERIFIED_ONE_IN == 0:
                sample.append((document.text, ids))
            writers[key].add(document.id, document.source, document.text, ids)
        encoder.verify([text for text, _ in sample], [ids for _, ids in sample])
    for writer in writers.values():
        writer.close()
    return writers


def _batched(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_characters = 0
    for document in stream:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) >= BATCH_DOCS or n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _with_progress(stream: Iterator[Document], doing: str) -> Iterator[Document]:
    with Progress(doing, "documents") as progress:
        for document in stream:
            yield document
            progress.advance()


def _entry(cfg: RunConfig, key: ShardKey, writer: ShardWriter, folder: Path) -> ShardEntry:
    lang, source, split = key
    hashes = {suffix: sha256(writer.stem.with_name(writer.stem.name + suffix)) for suffix in SUFFIXES}
    return ShardEntry(
        stem=writer.stem.relative_to(folder).as_posix(),
        source=source,
        language=lang,
        licence=cfg.corpus.sources[source].licence,
        origin=cfg.corpus.sources[source].origin,
        split=split,
        n_docs=writer.n_docs,
        n_tokens=writer.n_tokens,
        n_bytes=writer.n_bytes,
        sha256=hashes,
    )


def _tokenizer_entry(encoder: Encoder, folder: Path) -> TokenizerEntry:
    names = (tokenizer.MODEL, tokenizer.FAST, tokenizer.FAST_CONFIG)
    return TokenizerEntry(
        vocab_size=encoder.vocab_size,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
        pad_id=encoder.pad_id,
        sha256={name: sha256(folder / name) for name in names},
    )


def _inputs(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Hashes of all input files, by source and name; a hub id is known by its revision."""
    for name in cfg.corpus.sources:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"corpus.sources.{name}", "a source's name is part of file names", "letters, digits, - and _"
            )
    cache = _corpora(cfg) / "inputs.json"
    return {name: sha256_cached(source_files(source), cache) for name, source in cfg.corpus.sources.items()}


def _key(cfg: RunConfig, inputs: dict[str, dict[str, str]]) -> str:
    corpus, token = dataclasses.asdict(cfg.corpus), dataclasses.asdict(cfg.tokenizer)
    for name, source in corpus["sources"].items():
        if inputs[name]:  # what files hold counts, and their names, which ids may be made of; not where they stand
            del source["path"]
    if cfg.tokenizer.path:
        token = {"sha256": hashlib.sha256(tokenizer.read_model(cfg.tokenizer.path)).hexdigest()}
    content = json.dumps([FORMAT, corpus, token, inputs], default=_enum_name, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _enum_name(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    raise TypeError(f"{value!r} is not a setting")


def _corpora(cfg: RunConfig) -> Path:
    return Path(cfg.cluster.scratch) / "corpora"


def _flush(folder: Path) -> None:
    """Forces all files to disk: the name must not survive a power cut that the content does not."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from doing the same work, and clears what killed ones left.

    The kernel gives the lock back when its holder dies. Where the file system has no locks, or keeps them to one
    node, work may be done twice, into folders with different names: a waste, no harm.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"no file locks under {folder.parent}: {error}", flush=True)
        else:
            # Whoever built this corpus on this host would hold the lock.
            for left in folder.parent.glob(f".{folder.name}.{socket.gethostname()}.*"):
                shutil.rmtree(left)
        yield
