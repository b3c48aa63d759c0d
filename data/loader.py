"""Positions → batches. The whole state is the position; see `data/order.py` for what stands where."""

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.manifest import TRAIN, Manifest
from data.order import Order, Phase, Stream, unskipped
from data.shards import Shard, document_ids


class Batch(TypedDict):
    """Samples of one micro step on one rank; B sequences of T + 1 tokens, inputs and targets overlapping."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    doc: Tensor
    """int32 [B, T + 1]: number of the document within the sample, from 0."""
    position: Tensor
    """int64 [B]: place in the order of the run."""
    sample_id: Tensor
    """int64 [B]."""
    language: Tensor
    """int64 [B]: index into `Samples.languages`."""


class DocumentName(NamedTuple):
    """Where a document comes from: `id` is the one it has in its source."""

    source: str
    language: str
    id: str


class LanguageTokens:
    """All training tokens of a language: its shards one after another, as a circle."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(s.tokens) for s in shards])
        self.n_tokens = int(self._ends[-1])

    def read(self, start: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """`n` tokens from `start`, and for each the number of its document, counted from the first one here."""
        tokens, is_start = np.empty(n, np.int64), np.zeros(n, np.int32)
        done = 0
        for k, first, end in self._pieces(start, n):
            shard = self._shards[k]
            tokens[done : done + end - first] = shard.tokens[first:end]
            is_start[done] = done > 0  # a further piece begins a shard, and so a document
            is_start[shard.starts_between(first, end) - first + done] = 1
            done += end - first
        return tokens, np.cumsum(is_start, dtype=np.int32)

    def rows(self, start: int, n: int) -> Iterator[tuple[int, int]]:
        """Shard and row of each document that `n` tokens from `start` belong to, in order."""
        for k, first, end in self._pieces(start, n):
            yield from ((k, row) for row in self._shards[k].rows_between(first, end))

    def _pieces(self, start: int, n: int) -> Iterator[tuple[int, int, int]]:
        """Shard, first token and end of each stretch that `n` tokens from `start` consist of."""
        done = 0
        while done < n:
            place = (start + done) % self.n_tokens
            k = int(np.searchsorted(self._ends, place, "right"))
            n_here = len(self._shards[k].tokens)
            first = place - int(self._ends[k]) + n_here
            end = min(first + n - done, n_here)
            yield k, first, end
            done += end - first


class Samples(Dataset[Batch]):
    """Samples of a run by position: sequence s of a language is its tokens s T … s T + T, in a circle.

    The circle means that no token is lost at the end, and that a language shorter than a sequence works.
    Files are opened where they are read, once in each process.
    """

    def __init__(self, corpus_dir: Path, phases: Sequence[Phase], seq_len: int, seed: int) -> None:
        manifest = Manifest.load(corpus_dir)
        self.seq_len, tokens = seq_len, manifest.tokens_by_language(TRAIN)
        self.languages = manifest.languages(TRAIN)
        """All languages with training text, sorted, whether a phase draws them or not."""
        self._dir = corpus_dir
        self._shards = {lang: manifest.shards_of(lang, TRAIN) for lang in self.languages}
        streams = []
        for lang in self.languages:
            content = " ".join(entry.sha256[".bin"] for entry in self._shards[lang])
            streams.append(Stream(lang, -(-tokens[lang] // seq_len), content))
        self.order = Order(streams, seed, phases)
        self._open: dict[str, LanguageTokens] = {}

    def __getitem__(self, position: int) -> Batch:
        """The sample at one position, as a batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: ArrayLike) -> Batch:
        """The samples at `positions` as one batch; the name is the one DataLoader looks for."""
        places = np.asarray(positions, np.int64)
        found = self.order.locate(places)
        rows = [
            self._tokens_of(self.languages[lang]).read(int(sequence) * self.seq_len, self.seq_len + 1)
            for lang, sequence in zip(found.language, found.sequence, strict=True)
        ]
        return Batch(
            tokens=torch.from_numpy(np.stack([tokens for tokens, _ in rows])),
            doc=torch.from_numpy(np.stack([doc for _, doc in rows])),
            position=torch.from_numpy(places),
            sample_id=torch.from_numpy(found.sample_id),
            language=torch.from_numpy(found.language),
        )

    def documents(self, positions: ArrayLike) -> list[DocumentName]:
        """Every document that the samples at `positions` touch, each once, in the order in which they do.

        A sample's last token is only a target, and none where it begins a document: that document is not touched.
        """
        found = self.order.locate(positions)
        touched: dict[tuple[str, int, int], None] = {}
        for lang, sequence in zip(found.language, found.sequence, strict=True):
            language = self.languages[lang]
            rows = self._tokens_of(language).rows(int(sequence) * self.seq_len, self.seq_len)
            touched |= {(language, k, row): None for k, row in rows}
        rows_of: dict[tuple[str, int], list[int]] = {}
        for language, k, row in touched:
            rows_of.setdefault((language, k), []).append(row)
        ids = {
            (language, k): document_ids(self._dir / self._shards[language][k].stem, rows)
            for (language, k), rows in rows_of.items()
        }
        return [
            DocumentName(self._shards[language][k].source, language, ids[language, k][row])
            for language, k, row in touched
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _tokens_of(self, language: str) -> LanguageTokens:
        if language not in self._open:
            self._open[language] = LanguageTokens([Shard(self._dir / entry.stem) for entry in self._shards[language]])
        return self._open[language]


def batches(
    samples: Samples,
    *,
    start_step: int,
    n_steps: int,
    seqs_per_step: int,
    micro_batch_seqs: int,
    rank: int,
    world_size: int,
    workers: int = 0,
    skipped: Sequence[Sequence[int]] = (),
) -> Iterator[list[Batch]]:
    """For each step the micro batches of this rank, from `start_step` on.

    Step s consists of samples s G … s G + G - 1 with G = `seqs_per_step`, whatever the ranks, workers and micro
    batches are; sample k of the run stands at the k-th position that is not in `skipped`, sorted and disjoint
    [start, end). `workers` processes read ahead. Raises `ValueError` where the ranks cannot share a step evenly.
    """
    if seqs_per_step % (world_size * micro_batch_seqs):
        raise ValueError(f"{seqs_per_step} sequences do not divide into {world_size} ranks x {micro_batch_seqs}")
    micro_steps = seqs_per_step // (world_size * micro_batch_seqs)
    ks = _samples(start_step, n_steps, seqs_per_step, micro_batch_seqs, rank, world_size)
    wanted = (unskipped(k, skipped) for k in ks)
    read = iter(_loader(samples, wanted, workers)) if workers else map(samples.__getitems__, wanted)
    for _ in range(n_steps):
        yield [next(read) for _ in range(micro_steps)]


def _samples(
    start_step: int, n_steps: int, seqs_per_step: int, micro_batch_seqs: int, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    stride = world_size * micro_batch_seqs
    for step in range(start_step, start_step + n_steps):
        for m in range(seqs_per_step // stride):
            first = step * seqs_per_step + m * stride + rank * micro_batch_seqs
            yield np.arange(first, first + micro_batch_seqs)


def _loader(samples: Samples, wanted: Iterator[NDArray[np.int64]], workers: int) -> DataLoader[Batch]:
    # Forking a process that holds a GPU and a network device is unsafe: workers are forked from a server that has
    # only imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return DataLoader(
        samples,
        batch_sampler=wanted,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=context,
        # Its own generator, or DataLoader would draw from the global one and workers would change a run's numbers.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
