"""Which documents validation reads and training never does: a property of the document alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from configs.text import HoldoutConfig
from data.manifest import TRAIN, VALID, Manifest
from data.shards import Shard, read_sidecar
from data.sources import Document


def split_of(document: Document, holdout: HoldoutConfig) -> str:
    """TRAIN or VALID. The same on every machine and whatever other documents there are."""
    if holdout.by_field:
        held_out = str(document.fields.get(holdout.by_field)) in map(str, holdout.by_values)
    else:
        held_out = rank_of(document.id) < holdout.share * 2**64
    return VALID if held_out else TRAIN


@dataclass(frozen=True, slots=True)
class ValidDocument:
    """One held-out document: tokens with `<s>` and `</s>`, and the UTF-8 bytes of its text."""

    id: str
    lang: str
    source: str
    n_bytes: int
    tokens: NDArray[Any]


def valid_documents(corpus_dir: Path) -> list[ValidDocument]:
    """Held-out documents, of each language the first `max_docs_per_language` by the hash of their id."""
    manifest, documents = Manifest.load(corpus_dir), []
    for language in manifest.languages(VALID):
        found = []
        for entry in manifest.shards_of(language, VALID):
            shard = Shard(corpus_dir / entry.stem)
            for row, (doc_id, n_bytes) in enumerate(read_sidecar(corpus_dir / entry.stem, "id", "n_bytes")):
                if n_bytes:  # a removed document has none
                    found.append(ValidDocument(doc_id, language, entry.source, n_bytes, shard.document(row)))
        found.sort(key=lambda document: (rank_of(document.id), document.id))
        chosen = found[: manifest.max_valid_docs_per_language]
        documents += [replace(document, tokens=document.tokens.astype(np.int64)) for document in chosen]
    return documents


def rank_of(doc_id: str) -> int:
    """A number below 2**64 that an id has everywhere."""
    return xxhash.xxh3_64_intdigest(doc_id.encode())
