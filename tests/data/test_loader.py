import dataclasses
import multiprocessing
import pickle
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from data.loader import STEPS_AHEAD, Batch, DocumentName, Portion, Samples, batches
from data.manifest import TRAIN, Manifest
from data.order import CYCLE, OrderHash, Phase, unskipped
from data.shards import Shard, read_sidecar
from model.loss import IGNORED, next_token_labels
from tests.data.corpora import BOS, EOS, Ids, write_corpus

SEQ_LEN, SEQS_PER_STEP = 64, 24
PHASE = Phase(0, {"de/books": CYCLE // 4, "de/web": CYCLE // 4, "fr/web": CYCLE // 4, "mt/web": CYCLE // 4})


def only(part: str) -> list[Phase]:
    return [Phase(0, {part: CYCLE})]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parts of several shards, and one shorter than a sequence."""
    rng = np.random.default_rng(0)

    def shards(*sizes: int) -> list[Ids]:
        return [[rng.integers(4, 1_000, n).tolist() for n in rng.integers(0, 50, size)] for size in sizes]

    parts = {("de", "books"): shards(30, 2, 9), ("de", "web"): shards(300), ("fr", "web"): shards(80, 90)}
    return write_corpus(tmp_path_factory.mktemp("corpora") / "corpus", {**parts, ("mt", "web"): [[[7]], [[8, 9]]]})


@pytest.fixture(scope="module")
def samples(corpus: Path) -> Samples:
    return Samples(corpus, [PHASE], SEQ_LEN, seed=5)


def read(
    samples: Samples,
    rank: int,
    world_size: int,
    micro: int,
    workers: int = 0,
    start: int = 3,
    skipped: Sequence[Sequence[int]] = (),
) -> list[list[Batch]]:
    portions = [Portion(step * SEQS_PER_STEP, SEQS_PER_STEP, micro) for step in range(start, start + 4)]
    shares = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    return list(batches(samples, portions, **shares, workers=workers, skipped=skipped))  # type: ignore[arg-type]


def ids_of(steps: list[list[Batch]]) -> list[list[int]]:
    return [[int(i) for batch in step for i in batch["sample_id"]] for step in steps]


def read_in_process(samples: Samples, rank: int, world_size: int) -> tuple[list[list[int]], NDArray[np.int64]]:
    steps, consumed = read(samples, rank, world_size, micro=2), OrderHash(len(samples.parts))
    for batch in (b for step in steps for b in step):
        consumed.add(batch["position"], batch["sample_id"], batch["part"], SEQ_LEN)
    return ids_of(steps), consumed.state


def test_one_two_and_four_processes_consume_the_same_steps(samples: Samples) -> None:
    alone, state = read_in_process(samples, 0, 1)
    assert all(len(set(step)) == SEQS_PER_STEP for step in alone)
    for world_size in (2, 4):
        with multiprocessing.get_context("fork").Pool(world_size) as pool:
            ranks = pool.starmap(read_in_process, [(samples, rank, world_size) for rank in range(world_size)])
        for step, expected in enumerate(alone):
            # Micro step m of rank r holds positions m W b + r b …: put back in place, the step is the same list.
            blocks = [
                [ids[step][m * 2 : m * 2 + 2] for ids, _ in ranks] for m in range(SEQS_PER_STEP // world_size // 2)
            ]
            assert [i for micro_step in blocks for block in micro_step for i in block] == expected
        assert sum(part for _, part in ranks).tolist() == state.tolist()


def test_micro_batches_do_not_change_what_a_step_consumes(samples: Samples) -> None:
    whole = ids_of(read(samples, 0, 1, micro=24))
    assert whole == ids_of(read(samples, 0, 1, micro=3))
    assert [step[0]["tokens"].shape for step in read(samples, 0, 1, micro=24)] == [(24, SEQ_LEN + 1)] * 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_change_nothing(samples: Samples) -> None:
    torch.manual_seed(0)
    expected, drawn = read(samples, 1, 2, micro=3), torch.rand(1)
    for workers in (1, 3):
        torch.manual_seed(0)
        found = read(samples, 1, 2, micro=3, workers=workers)
        assert torch.equal(torch.rand(1), drawn), "the global generator is left alone"
        for step, expected_step in zip(found, expected, strict=True):
            for batch, expected_batch in zip(step, expected_step, strict=True):
                assert batch.keys() == expected_batch.keys()
                assert all(torch.equal(batch[k], expected_batch[k]) for k in batch)  # type: ignore[literal-required]


def test_a_restart_at_any_step_goes_on_as_if_nothing_had_happened(samples: Samples) -> None:
    assert ids_of(read(samples, 0, 2, 3, start=3))[2:] == ids_of(read(samples, 0, 2, 3, start=5))[:2]


def test_skipped_positions_are_left_out_and_every_step_is_full(samples: Samples) -> None:
    skipped = [[10, 34], [96, 97], [130, 178]]
    whole = [i for i in range(20 * SEQS_PER_STEP) if not any(first <= i < end for first, end in skipped)]
    for workers in (0, 1):
        steps = read(samples, 0, 1, micro=3, skipped=skipped, workers=workers)
        positions = [int(i) for step in steps for batch in step for i in batch["position"]]
        assert positions == whole[3 * SEQS_PER_STEP : 7 * SEQS_PER_STEP]
    ranks = [read(samples, rank, 2, micro=3, skipped=skipped) for rank in range(2)]
    shared = [int(i) for both in zip(*ranks, strict=True) for step in both for b in step for i in b["position"]]
    assert sorted(shared) == positions
    resumed = read(samples, 0, 1, micro=3, skipped=skipped, start=5)
    assert [int(i) for batch in resumed[0] for i in batch["position"]] == positions[2 * SEQS_PER_STEP :][:SEQS_PER_STEP]
    assert int(unskipped(5 * SEQS_PER_STEP, skipped)) == whole[5 * SEQS_PER_STEP]


def test_parts_keep_their_index_whatever_a_phase_draws(samples: Samples, corpus: Path) -> None:
    phases = [Phase(0, {"de/web": CYCLE // 2, "fr/web": CYCLE // 2}), Phase(100, {"mt/web": CYCLE})]
    changed = Samples(corpus, phases, SEQ_LEN, seed=5)
    assert changed.parts == samples.parts == ["de/books", "de/web", "fr/web", "mt/web"]
    before, after = changed.__getitems__(range(100)), changed.__getitems__(range(100, 200))
    assert set(before["part"].tolist()) == {1, 2} and set(after["part"].tolist()) == {3}


def test_ranks_that_cannot_share_a_step_are_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match="24 sequences do not divide into 5 ranks x 1"):
        read(samples, 0, 5, 1)


def test_an_epoch_of_a_part_holds_each_of_its_tokens_in_place(corpus: Path) -> None:
    samples = Samples(corpus, only("de/web"), SEQ_LEN, seed=1)
    tokens = np.asarray(Shard(corpus / "shards" / "de.web.train.00000").tokens).astype(np.int64)
    n = -(-len(tokens) // SEQ_LEN)
    batch = samples.__getitems__(range(n))
    order = np.argsort(samples.order.locate(np.arange(n)).sequence)
    laid_out = batch["tokens"].numpy()[order]
    assert laid_out[:, :-1].ravel()[: len(tokens)].tolist() == tokens.tolist()
    assert np.array_equal(laid_out[:-1, -1], laid_out[1:, 0]), "the last target is the first input of the next"
    assert laid_out[-1].tolist() == np.resize(tokens, (n + 1) * SEQ_LEN)[(n - 1) * SEQ_LEN :][: SEQ_LEN + 1].tolist()


@pytest.mark.parametrize("documents", [[[5]], [[5, 6, 7], [8]], [[], [], [9, 9]], [[3] * 40]])
def test_documents_are_numbered_from_real_boundaries_across_shards_and_the_circle(
    tmp_path: Path, documents: list[list[int]]
) -> None:
    """Two shards; ids 1 and 2 stand inside documents too, so scanning for them would be wrong."""
    shard = [*documents, [BOS, EOS, BOS]]
    corpus = write_corpus(tmp_path / "corpus", {("de", "web"): [shard, shard]})
    flat = [token for ids in (*shard, *shard) for token in (BOS, *ids, EOS)]
    numbers = [k for k, ids in enumerate((*shard, *shard)) for _ in range(len(ids) + 2)]
    n_turns = 4
    all_tokens = np.tile(flat, n_turns)
    all_numbers = np.concatenate([np.array(numbers) + turn * (numbers[-1] + 1) for turn in range(n_turns)])
    for seq_len in (1, 2, 7, len(flat), 2 * len(flat) + 3):
        samples = Samples(corpus, only("de/web"), seq_len, seed=1)
        n = -(-len(flat) // seq_len)
        batch, found = samples.__getitems__(range(n)), samples.order.locate(range(n))
        for tokens, doc, sequence in zip(batch["tokens"], batch["doc"], found.sequence.tolist(), strict=True):
            place = slice(sequence * seq_len, (sequence + 1) * seq_len + 1)
            assert tokens.tolist() == all_tokens[place].tolist()
            assert doc.tolist() == (all_numbers[place] - all_numbers[place.start]).tolist()


def test_nothing_of_a_removed_document_is_predicted(tmp_path: Path) -> None:
    """It consists of `</s>` alone, wherever a sequence begins in it."""
    corpus = write_corpus(tmp_path / "corpus", {("de", "web"): [[[5, 6], [7] * 30, [8, 9]]]})
    kept = Samples(corpus, only("de/web"), 8, seed=1).__getitems__(range(5))
    tokens = np.memmap(corpus / "shards" / "de.web.train.00000.bin", np.uint16, "r+")
    tokens[4:36] = EOS
    tokens.flush()
    manifest = Manifest.load(corpus)
    manifest.shards[0] = dataclasses.replace(manifest.shards[0], n_removed=1)
    manifest.save(corpus)
    batch = Samples(corpus, only("de/web"), 8, seed=1).__getitems__(range(5))
    labels, before = (next_token_labels(b["tokens"], b["doc"]) for b in (batch, kept))
    assert sorted(labels[labels != IGNORED].tolist()) == [EOS, EOS, 5, 6, 8, 9]
    assert (before != IGNORED).sum() == 6 + 31


def test_samples_travel_to_another_process(samples: Samples) -> None:
    there = pickle.loads(pickle.dumps(samples))
    assert all(torch.equal(a, b) for a, b in zip(there[7].values(), samples[7].values(), strict=True))  # type: ignore[call-overload]


def test_a_start_opens_no_shard(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((corpus / "manifest.json").read_bytes())
    samples = Samples(tmp_path, [PHASE], SEQ_LEN, seed=5)
    with pytest.raises(UserError, match=r"shards/.*\.idx"):
        samples[0]


def touched(corpus: Path, samples: Samples, positions: Sequence[int]) -> list[DocumentName]:
    """By laying out the name of every token of a part."""
    named: dict[str, list[DocumentName]] = {part: [] for part in samples.parts}
    for entry in Manifest.load(corpus).shards:
        assert entry.split == TRAIN
        for doc_id, n_tokens in read_sidecar(corpus / entry.stem, "id", "n_tokens"):
            named[f"{entry.language}/{entry.source}"] += [DocumentName(entry.source, entry.language, doc_id)] * n_tokens
    found, names = samples.order.locate(positions), []
    for part, sequence in zip(found.part, found.sequence, strict=True):
        all_names, first = named[samples.parts[part]], int(sequence) * samples.seq_len
        names += [all_names[place % len(all_names)] for place in range(first, first + samples.seq_len)]
    return list(dict.fromkeys(names))


def test_documents_of_samples_are_named(corpus: Path, samples: Samples) -> None:
    rng = np.random.default_rng(0)
    for positions in ([7], range(24), rng.integers(0, 10_000, 50)):
        found = samples.documents(positions)
        assert found == touched(corpus, samples, positions)  # type: ignore[arg-type]
        assert len(found) == len(set(found)) > 0
    assert samples.documents([]) == []


@pytest.mark.parametrize("seq_len", [3, 16, 5000])
def test_documents_are_named_across_shards_and_around_the_circle(corpus: Path, seq_len: int) -> None:
    samples = Samples(corpus, only("de/books"), seq_len, seed=1)
    n = -(-Manifest.load(corpus).tokens_by_part(TRAIN)["de", "books"] // seq_len)
    for positions in (range(n), [n - 1], [0, 0, n]):
        assert samples.documents(positions) == touched(corpus, samples, positions)
    assert len(samples.documents(range(n))) == 30 + 2 + 9


def test_a_step_may_take_more_than_the_one_before(samples: Samples) -> None:
    """Sizes and micro batches change from step to step, and every position comes once and in its step."""
    portions = [Portion(24, 6, 3), Portion(30, 6, 1), Portion(36, 24, 4), Portion(60, 12, 6)]
    for workers in (0, 2):
        ranks = [
            list(batches(samples, iter(portions), rank=rank, world_size=2, device=torch.device("cpu"), workers=workers))
            for rank in range(2)
        ]
        for portion, *of_ranks in zip(portions, *ranks, strict=True):
            found = [int(i) for of_rank in of_ranks for batch in of_rank for i in batch["position"]]
            assert sorted(found) == list(range(portion.first_sample, portion.first_sample + portion.seqs))
            assert {len(batch["tokens"]) for of_rank in of_ranks for batch in of_rank} == {portion.micro_batch_seqs}


def test_steps_are_read_before_they_are_asked_for_but_not_all_of_them(samples: Samples) -> None:
    wanted: list[int] = []
    portions = (Portion(wanted.append(step) or step * 2, 2, 1) for step in range(100))  # type: ignore[func-returns-value]
    steps = batches(samples, portions, rank=0, world_size=1, device=torch.device("cpu"))
    for n in range(1, 5):
        next(steps)
        deadline = time.monotonic() + 30
        while len(wanted) < n + STEPS_AHEAD and time.monotonic() < deadline:
            time.sleep(0.001)
        assert wanted == list(range(n + STEPS_AHEAD))
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_what_cannot_be_read_is_told_where_the_loop_asks_for_it(samples: Samples) -> None:
    def read_but_one(places: NDArray[np.int64]) -> Batch:
        if 4 in places:
            raise UserError("a shard", "is damaged", "bring it back")
        return samples.__getitems__(places)

    class Damaged:
        __getitems__ = staticmethod(read_but_one)

    portions = [Portion(step * 2, 2, 2) for step in range(5)]
    steps = batches(Damaged(), portions, rank=0, world_size=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert [batch["position"].tolist() for batch in [*next(steps), *next(steps)]] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="is damaged"):
        next(steps)
