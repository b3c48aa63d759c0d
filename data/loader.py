"""Positions → batches. The whole state is the position; see `data/order.py` for what stands where."""

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.manifest import TRAIN, Manifest
from data.mixture import Mixture
from data.order import Order, Stream
from data.shards import Shard


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
        while done < n:
            place = (start + done) % self.n_tokens
            k = int(np.searchsorted(self._ends, place, "right"))
            shard, first = self._shards[k], place - int(self._ends[k]) + len(self._shards[k].tokens)
            end = min(first + n - done, len(shard.tokens))
            tokens[done : done + end - first] = shard.tokens[first:end]
            is_start[done] = done > 0  # a further piece begins a shard, and so a document
            is_start[shard.starts_between(first, end) - first + done] = 1
            done += end - first
        return tokens, np.cumsum(is_start, dtype=np.int32)


class Samples(Dataset[Batch]):
    """Samples of a run by position: sequence s of a language is its tokens s T … s T + T, in a circle.

    The circle means that no token is lost at the end, and that a language shorter than a sequence works.
    Files are opened where they are read, once in each process.
    """

    def __init__(self, corpus_dir: Path, mixture: Mixture, seq_len: int, seed: int) -> None:
        manifest = Manifest.load(corpus_dir)
        self.seq_len, shares, tokens = seq_len, mixture.shares, manifest.tokens_by_language(TRAIN)
        self.languages = sorted(shares)
        self._stems = {
            lang: [corpus_dir / entry.stem for entry in manifest.shards_of(lang, TRAIN)] for lang in self.languages
        }
        streams = []
        for lang in self.languages:
            content = " ".join(entry.sha256[".bin"] for entry in manifest.shards_of(lang, TRAIN))
            streams.append(Stream(lang, -(-tokens[lang] // seq_len), shares[lang], content))
        self.order = Order(streams, seed)
        self._open: dict[str, LanguageTokens] = {}

    def __getitem__(self, position: int) -> Batch:
        """The sample at one position, as a batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _tokens_of(self, language: str) -> LanguageTokens:
        if language not in self._open:
            self._open[language] = LanguageTokens([Shard(stem) for stem in self._stems[language]])
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
) -> Iterator[list[Batch]]:
    """For each step the micro batches of this rank, from `start_step` on.

    Step s consists of positions s G … s G + G - 1 with G = `seqs_per_step`, whatever the ranks, workers and micro
    batches are. `workers` processes read ahead. Raises `ValueError` where the ranks cannot share a step evenly.
    """
    if seqs_per_step % (world_size * micro_batch_seqs):
        raise ValueError(f"{seqs_per_step} sequences do not divide into {world_size} ranks x {micro_batch_seqs}")
    micro_steps = seqs_per_step // (world_size * micro_batch_seqs)
    wanted = _positions(start_step, n_steps, seqs_per_step, micro_batch_seqs, rank, world_size)
    read = iter(_loader(samples, wanted, workers)) if workers else map(samples.__getitems__, wanted)
    for _ in range(n_steps):
        yield [next(read) for _ in range(micro_steps)]


def _positions(
    start_step: int, n_steps: int, seqs_per_step: int, micro_batch_seqs: int, rank: int, world_size: int
) -> Iterator[range]:
    stride = world_size * micro_batch_seqs
    for step in range(start_step, start_step + n_steps):
        for m in range(seqs_per_step // stride):
            first = step * seqs_per_step + m * stride + rank * micro_batch_seqs
            yield range(first, first + micro_batch_seqs)


def _loader(samples: Samples, wanted: Iterator[range], workers: int) -> DataLoader[Batch]:
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
