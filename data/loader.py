"""Positions → batches. The whole state is the position; see `data/order.py` for what stands where."""

import multiprocessing
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, chain, tee
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from configs.enums import Packing
from data.manifest import TRAIN, Manifest
from data.order import Order, Phase, Stream, unskipped
from data.packing import open_packing, read_record
from data.shards import Shard, document_ids


class Batch(TypedDict):
    """Samples of one micro step on one rank; B sequences of T + 1 tokens, inputs and targets overlapping."""

    tokens: Tensor  # int64 [B, T + 1]
    doc: Tensor
    """int32 [B, T + 1]: number of the document within the sample, from 0; of padding, each token has its own."""
    position: Tensor  # int64 [B]: place in the order of the run
    sample_id: Tensor  # int64 [B]
    part: Tensor  # int64 [B]: index into `Samples.parts`


class DocumentName(NamedTuple):
    """Where a document comes from: `id` is the one it has in its source."""

    source: str
    language: str
    id: str


STEPS_AHEAD = 2  # steps that are read before they are asked for: one in reserve for a file system that hiccups
Piece = tuple[int, int, int]  # a stretch of a sequence: shard of the part, first token within the shard, and end


class Concatenated:
    """Sequence s of a part is its tokens s T … s T + T, its shards one after another and in a circle.

    The circle means that no token is lost at the end, and that a part shorter than a sequence works.
    """

    def __init__(self, n_tokens: Sequence[int], seq_len: int) -> None:
        self._bounds, self._seq_len = list(accumulate(n_tokens, initial=0)), seq_len
        self.n_sequences = -(-self._bounds[-1] // seq_len)

    def pieces(self, sequence: int) -> Iterator[Piece]:
        """The stretches that a sequence consists of, in order."""
        place, n_left = sequence * self._seq_len, self._seq_len + 1
        while n_left:
            place %= self._bounds[-1]
            k = bisect_right(self._bounds, place) - 1
            n = min(n_left, self._bounds[k + 1] - place)
            yield k, place - self._bounds[k], place - self._bounds[k] + n
            place, n_left = place + n, n_left - n


class BestFit:
    """The sequences that data/packing.py has made of each shard, one shard after another."""

    def __init__(self, indices: Sequence[tuple[str, int, int]]) -> None:
        self._bounds, self._indices = list(accumulate((n for _, n, _ in indices), initial=0)), indices
        self.n_sequences = self._bounds[-1]

    def pieces(self, sequence: int) -> Iterator[Piece]:
        """The documents that a sequence consists of, whole or what was cut from them."""
        k = bisect_right(self._bounds, sequence) - 1
        path, _, crc = self._indices[k]
        index, row = _open_packing(path, crc), sequence - self._bounds[k]
        first = bisect_left(index[:, 0], row)
        end = bisect_left(index[:, 0], row + 1, first)
        return ((k, start, stop) for _, start, stop in index[first:end].tolist())


class Samples(Dataset[Batch]):
    """Samples of a run by position. Shards are opened when they are first read, once in each process."""

    def __init__(
        self, corpus_dir: Path, phases: Sequence[Phase], seq_len: int, seed: int, packing: Packing = Packing.concat
    ) -> None:
        manifest, folder, self.seq_len = Manifest.load(corpus_dir), str(corpus_dir), seq_len
        self._tokenizer, self._is_packed = manifest.tokenizer, packing is Packing.best_fit
        self._has_removed = any(entry.n_removed for entry in manifest.shards)
        parts = {"/".join(part): shards for part, shards in manifest.parts(TRAIN).items()}
        self.parts = list(parts)
        """All parts with training text, sorted, whether a phase draws them or not."""
        self._stems = [[f"{folder}/{entry.stem}" for entry in shards] for shards in parts.values()]
        self._layouts: Sequence[Concatenated | BestFit]
        if self._is_packed:
            record = read_record(corpus_dir, seq_len, (entry for shards in parts.values() for entry in shards))
            self._layouts = [BestFit([record[entry.stem] for entry in shards]) for shards in parts.values()]
        else:
            self._layouts = [Concatenated([entry.n_tokens for entry in shards], seq_len) for shards in parts.values()]
        streams = []
        for (part, shards), layout in zip(parts.items(), self._layouts, strict=True):
            content = " ".join(entry.sha256[suffix] for entry in shards for suffix in (".bin", ".idx"))
            streams.append(Stream(part, layout.n_sequences, f"{packing.value} {content}"))
        self.order = Order(streams, seed, phases)

    def __getitem__(self, position: int) -> Batch:
        """The sample at one position, as a batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: ArrayLike) -> Batch:
        """The samples at `positions` as one batch; the name is the one DataLoader looks for."""
        places = np.asarray(positions, np.int64)
        found = self.order.locate(places)
        tokens = np.empty((len(places), self.seq_len + 1), np.int64)
        is_start = np.zeros(tokens.shape, np.int32)
        for row, (part, sequence) in enumerate(zip(found.part.tolist(), found.sequence.tolist(), strict=True)):
            at = 0
            for k, first, end in self._layouts[part].pieces(sequence):
                shard, stop = _open_shard(self._stems[part][k]), at + end - first
                tokens[row, at:stop] = shard.tokens[first:end]
                is_start[row, at] = 1
                if not self._is_packed:  # a piece of a packed sequence lies within a document
                    is_start[row, shard.starts_between(first, end) - first + at] = 1
                at = stop
            tokens[row, at:], is_start[row, at:] = self._tokenizer.pad_id, 1
        if self._has_removed:  # a removed document consists of </s>: each is one of its own, so that none is predicted
            is_end = tokens == self._tokenizer.eos_id
            is_start[:, 1:] |= is_end[:, 1:] & is_end[:, :-1]
        is_start[:, 0] = 0
        return Batch(
            tokens=torch.from_numpy(tokens),
            doc=torch.from_numpy(np.cumsum(is_start, axis=1, dtype=np.int32)),
            position=torch.from_numpy(places),
            sample_id=torch.from_numpy(found.sample_id),
            part=torch.from_numpy(found.part),
        )

    def documents(self, positions: ArrayLike) -> list[DocumentName]:
        """Every document that the samples at `positions` touch, each once, in the order in which they do.

        A sample's last token is only a target, and none where it begins a document: that document is not touched.
        """
        found, touched = self.order.locate(positions), dict[tuple[str, str, int], None]()
        for part, sequence in zip(found.part.tolist(), found.sequence.tolist(), strict=True):
            n_left = self.seq_len
            for k, first, end in self._layouts[part].pieces(sequence):
                stem, end = self._stems[part][k], min(end, first + n_left)
                if first < end:
                    rows = _open_shard(stem).rows_between(first, end)
                    touched |= dict.fromkeys((self.parts[part], stem, row) for row in rows)
                n_left -= end - first
        rows_of = defaultdict(list)
        for _, stem, row in touched:
            rows_of[stem].append(row)
        ids = {stem: document_ids(Path(stem), rows) for stem, rows in rows_of.items()}
        names = [(*part.split("/"), ids[stem][row]) for part, stem, row in touched]
        return [DocumentName(source, language, name) for language, source, name in names]


class Portion(NamedTuple):
    """What a step takes: its first sample, sequences over all ranks, and those of a micro batch of one rank."""

    first_sample: int
    seqs: int
    micro_batch_seqs: int

    def places(self, rank: int, world_size: int) -> Iterator[NDArray[np.int64]]:
        """Samples of each micro batch of a rank; raises `ValueError` where the ranks cannot share them evenly."""
        stride = world_size * self.micro_batch_seqs
        if self.seqs % stride:
            raise ValueError(f"{self.seqs} sequences do not divide into {world_size} ranks x {self.micro_batch_seqs}")
        mine = np.arange(self.micro_batch_seqs) + rank * self.micro_batch_seqs
        return (self.first_sample + start + mine for start in range(0, self.seqs, stride))


def batches(
    samples: Samples,
    portions: Iterable[Portion],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    workers: int = 0,
    skipped: Sequence[Sequence[int]] = (),
) -> Iterator[list[Batch]]:
    """For each step the micro batches of this rank, read while the steps before it are done.

    Whatever the ranks, workers and micro batches are, a step consists of the samples of its portion; sample k of the
    run stands at the k-th position that is not in `skipped`, sorted and disjoint [start, end). `workers` processes
    read, or a thread, which also pins memory for an accelerator. Raises `ValueError` as `Portion.places` does.
    """
    planned, again = tee([unskipped(k, skipped) for k in portion.places(rank, world_size)] for portion in portions)
    wanted, on_device = chain.from_iterable(planned), device.type == "cuda"
    read = iter(_loader(samples, wanted, workers)) if workers else map(samples.__getitems__, wanted)
    steps = ([_pinned(next(read)) if on_device else next(read) for _ in step] for step in again)
    # A thread begins on the first device, whatever the process has chosen.
    choose_device = (torch.cuda.set_device, (device,)) if on_device else (None, ())
    with ThreadPoolExecutor(1, "loader", *choose_device) as reader:
        ahead = deque(reader.submit(next, steps, None) for _ in range(STEPS_AHEAD))
        while step := ahead.popleft().result():
            ahead.append(reader.submit(next, steps, None))
            yield step


def _pinned(batch: Batch) -> Batch:
    """With what goes to the device in memory that it reads by itself, so that the copy waits for nothing."""
    return {**batch, "tokens": batch["tokens"].pin_memory(), "doc": batch["doc"].pin_memory()}


def _loader(samples: Samples, wanted: Iterator[NDArray[np.int64]], workers: int) -> DataLoader[Batch]:
    # Forking a process that holds a GPU and a network device is unsafe: workers are forked from a server that has
    # only imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return DataLoader(
        samples,
        batch_sampler=wanted,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=default_convert,  # they are tensors already
        multiprocessing_context=context,
        # Its own generator, or DataLoader would draw from the global one and workers would change a run's numbers.
        generator=torch.Generator(),
    )


# Each takes three mappings, of which Linux grants a process 65,530.
@lru_cache(1 << 14)
def _open_shard(stem: str) -> Shard:
    return Shard(Path(stem))


_open_packing = lru_cache(1 << 14)(open_packing)
