"""Small corpora of given tokens, written without sources, cleaning and tokenizer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.files import sha256
from data.manifest import TRAIN, Manifest, ShardEntry, TokenizerEntry
from data.shards import SUFFIXES, ShardWriter

BOS, EOS, PAD, VOCAB_SIZE = 1, 2, 3, 1_000
Ids = Sequence[Sequence[int]]


def write_corpus(folder: Path, shards: Mapping[tuple[str, str], Sequence[Ids]]) -> Path:
    """By language and source the documents of each shard, as ids without `<s>` and `</s>`."""
    (folder / "shards").mkdir(parents=True)
    entries = []
    for (lang, source), of_part in sorted(shards.items()):
        for k, documents in enumerate(of_part):
            stem = f"shards/{lang}.{source}.{TRAIN}.{k:05d}"
            writer = write_shard(folder / stem, documents, f"{lang}.{source}.{k}")
            hashes = {suffix: sha256(folder / (stem + suffix)) for suffix in SUFFIXES}
            counts = writer.n_docs, writer.n_tokens, writer.n_bytes
            entries.append(ShardEntry(stem, source, lang, TRAIN, ["CC0-1.0"], *counts, hashes))
    tokenizer = TokenizerEntry(VOCAB_SIZE, BOS, EOS, PAD, {"tokenizer.model": ""})
    Manifest(entries, tokenizer, "", {}, {}, [], [], 1, {}).save(folder)
    return folder


WORDS = [
    "apple",
    "bread",
    "chair",
    "door",
    "egg",
    "fire",
    "glass",
    "house",
    "ink",
    "jam",
    "key",
    "lamp",
    "moon",
    "night",
    "oil",
    "pen",
    "queen",
    "rain",
    "salt",
    "tree",
]


def write_files(folder: Path, n_files: int) -> Path:
    """JSON lines in three languages; each file has copies, near copies and ids of the file before it too."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    before: list[dict[str, str]] = []
    for k in range(n_files):
        fresh = [
            {"id": f"{k}/{i}", "lang": ("de", "fr", "mt")[i % 3], "text": " ".join(rng.choice(WORDS, 40)) + f" {k} {i}"}
            for i in range(24)
        ]
        copies = [
            record | {"id": f"{k}/copy/{i}", "text": record["text"].upper() + "!"}
            for i, record in enumerate(before[:4])
        ]
        near = [
            record | {"id": f"{k}/near/{i}", "text": record["text"] + " end"} for i, record in enumerate(before[4:8])
        ]
        repeated = [
            record | {"text": f"another text {k} under an old id, {i}"} for i, record in enumerate(before[8:11])
        ]
        records = [*fresh, *copies, *near, *repeated]
        (folder / f"{k:02d}.jsonl").write_text("\n".join(map(json.dumps, records)))
        before = fresh
    return folder


def write_shard(stem: Path, documents: Ids, name: str = "") -> ShardWriter:
    writer = ShardWriter(stem, VOCAB_SIZE, BOS, EOS)
    rows = pa.table({"id": [f"{name}/{i}" for i in range(len(documents))], "n_bytes": [1] * len(documents)})
    lengths = np.array([len(document) for document in documents], np.int64)
    writer.add(rows, np.cumsum(lengths), np.array([token for document in documents for token in document]))
    writer.close()
    return writer
