"""What a prepared corpus is: shards with source, licence, counts, hashes, and nothing of where or when it was made."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from configs.errors import UserError
from data.files import sha256, write_whole
from data.shards import damaged

MANIFEST = "manifest.json"
TRAIN, VALID = "train", "valid"  # the two splits: what training reads, and what it never sees


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: documents of one source in one language and split."""

    stem: str  # path of its files below the corpus, without their suffix
    source: str
    language: str
    split: str
    licences: list[str]  # licences of its documents, sorted
    n_docs: int
    n_tokens: int  # with one `<s>` and one `</s>` a document
    n_bytes: int  # UTF-8 bytes of the text
    sha256: dict[str, str]  # hash of each file by its suffix
    n_removed: int = 0  # documents taken out after it was made; their tokens are `</s>`


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the shards; its files stand in `tokenizer/`."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    sha256: dict[str, str]  # hash of each file by its name


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus."""

    shards: list[ShardEntry]  # sorted by language, source, split and number
    tokenizer: TokenizerEntry
    documents: str  # name of the folder of cleaned documents that the shards were made from
    sources: dict[str, dict[str, Any]]
    """By source: `origin`, `licence`, `licence_field` where documents name theirs, `records` read and rejected by
    reason, and the hashes of its `files` by name."""
    steps: dict[str, Any]  # by step of cleaning: documents and bytes that came, left, and were rejected by reason
    lists: list[dict[str, Any]]  # and models, that decided: file, hash and, of opt-outs, date and entries
    removed: list[dict[str, Any]]  # documents taken out later, each time with the hash that the corpus had before
    max_valid_docs_per_language: int  # how many held-out documents validation reads
    versions: dict[str, str]  # versions of the libraries that made it

    @classmethod
    def load(cls, corpus_dir: Path) -> "Manifest":
        """Reads the manifest of a prepared corpus; raises `UserError` where there is none or it is damaged."""
        path = corpus_dir / MANIFEST
        if not path.is_file():
            raise UserError(f"{path} is not there", "a corpus is prepared before it is used", "marathon data")
        try:
            found: dict[str, Any] = orjson.loads(path.read_bytes())
            found["shards"] = [ShardEntry(**s) for s in found["shards"]]
            found["tokenizer"] = TokenizerEntry(**found["tokenizer"])
            return cls(**found)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(f"{path}: {error}") from error

    def save(self, corpus_dir: Path, name: str = MANIFEST) -> None:
        """Writes `manifest.json`; a corpus with a manifest is complete."""
        write_whole(corpus_dir / name, orjson.dumps(self, option=orjson.OPT_INDENT_2).decode() + "\n")

    @property
    def corpus_hash(self) -> str:
        """Hash of all tokens, their order and the tokenizer: what a run's data is."""
        # Not of the sidecars: parquet files name the version of the library that wrote them.
        shards = [[s.source, s.language, s.split, s.sha256[".bin"], s.sha256[".idx"]] for s in self.shards]
        content = json.dumps([shards, self.tokenizer.sha256["tokenizer.model"]])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each file of the tokenizer and the shards, by its name below the corpus."""
        hashes = {f"tokenizer/{name}": known for name, known in self.tokenizer.sha256.items()}
        return hashes | {s.stem + suffix: known for s in self.shards for suffix, known in s.sha256.items()}

    def facts(self) -> dict[str, Any]:
        """What the ledger says of the corpus. Counts are those of the training split unless they say otherwise."""
        train = [s for s in self.shards if s.split == TRAIN]
        by_source = {name: [s for s in train if s.source == name] for name in sorted(self.sources)}
        return {
            "corpus_hash": self.corpus_hash,
            "documents_folder": self.documents,
            **_counts(train),
            "held_out_documents": sum(s.n_docs for s in self.shards if s.split == VALID),
            "licences": _licences(train),
            "sources": {
                name: {"licences": _licences(shards), "origin": self.sources[name]["origin"], **_counts(shards)}
                for name, shards in by_source.items()
                if shards
            },
            "languages": {lang: _counts(self.shards_of(lang, TRAIN)) for lang in self.languages(TRAIN)},
            "records": {name: source["records"] for name, source in self.sources.items()},
            "steps": self.steps,
            "lists": self.lists,
            "removed_documents": sum(len(removal["ids_sha256"]) for removal in self.removed),
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.sha256,
        }

    def shards_of(self, language: str, split: str) -> list[ShardEntry]:
        """Shards of one language and split, in the order in which their tokens are counted."""
        return [s for s in self.shards if (s.language, s.split) == (language, split)]

    def languages(self, split: str) -> list[str]:
        """Languages that have documents in a split, sorted."""
        return sorted({s.language for s in self.shards if s.split == split})

    def parts(self, split: str) -> dict[tuple[str, str], list[ShardEntry]]:
        """Shards of a split by language and source, sorted."""
        found: dict[tuple[str, str], list[ShardEntry]] = {}
        for shard in self.shards:
            if shard.split == split:
                found.setdefault((shard.language, shard.source), []).append(shard)
        return dict(sorted(found.items()))

    def tokens_by_part(self, split: str) -> dict[tuple[str, str], int]:
        """Tokens of a split by language and source, sorted."""
        return {part: sum(s.n_tokens for s in shards) for part, shards in self.parts(split).items()}


def marks(corpus_dir: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns by name of file; one `UserError` names those that cannot be reached."""
    found, missing = {}, []
    for name in Manifest.load(corpus_dir).hashes:
        try:
            info = (corpus_dir / name).stat()
            found[name] = [info.st_size, info.st_mtime_ns]
        except OSError as error:
            missing.append(f"{name}: {error.strerror}")
    if missing:
        raise damaged(f"{len(missing)} of {len(missing) + len(found)} files in {corpus_dir}: {_first(missing)}")
    return found


def verify_files(corpus_dir: Path, names: Iterable[str]) -> None:
    """Reads these files again; raises one `UserError` that names those that are not what the manifest says."""
    known, changed = Manifest.load(corpus_dir).hashes, []
    for name in names:
        try:
            if (found := sha256(corpus_dir / name)) != known[name]:
                changed.append(f"{corpus_dir / name}: its sha256 is {found}, the manifest says {known[name]}")
        except UserError as error:
            changed.append(error.found)
    if changed:
        raise damaged(_first(changed))


def verify(corpus_dir: Path) -> None:
    """Every file is there and is what the manifest says; raises `UserError` that names those that are not."""
    verify_files(corpus_dir, marks(corpus_dir))


def _first(complaints: list[str]) -> str:
    more = [f"and {len(complaints) - 3} more"] if len(complaints) > 3 else []
    return "; ".join(complaints[:3] + more)


def _licences(shards: list[ShardEntry]) -> list[str]:
    return sorted({licence for shard in shards for licence in shard.licences})


def _counts(shards: list[ShardEntry]) -> dict[str, int]:
    return {
        "documents": sum(s.n_docs for s in shards),
        "tokens": sum(s.n_tokens for s in shards),
        "bytes": sum(s.n_bytes for s in shards),
    }
