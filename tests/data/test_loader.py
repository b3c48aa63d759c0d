import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.schema import RunConfig
from data.loader import Batch, DocumentName, LanguageTokens, Samples, batches
from data.manifest import TRAIN, Manifest
from data.mixture import plan_mixture
from data.order import OrderHash, Phase, unskipped
from data.pipeline import prepare
from data.shards import Shard, ShardWriter, read_sidecar

SEQ_LEN, SEQS_PER_STEP = 64, 24


@pytest.fixture(scope="module")
def samples(corpus: Path, smoke_config: RunConfig) -> Samples:
    tokens = Manifest.load(corpus).tokens_by_language(TRAIN)
    shares = plan_mixture(tokens, smoke_config.mixture, smoke_config.train.tokens).shares
    return Samples(corpus, [Phase(0, shares, {})], SEQ_LEN, seed=5)


def read(
    samples: Samples,
    rank: int,
    world_size: int,
    micro: int,
    workers: int = 0,
    start: int = 3,
    skipped: Sequence[Sequence[int]] = (),
) -> list[list[Batch]]:
    return list(
        batches(
            samples,
            start_step=start,
            n_steps=4,
            seqs_per_step=SEQS_PER_STEP,
            micro_batch_seqs=micro,
            rank=rank,
            world_size=world_size,
            workers=workers,
            skipped=skipped,
        )
    )


def ids_of(steps: list[list[Batch]]) -> list[list[int]]:
    return [[int(i) for batch in step for i in batch["sample_id"]] for step in steps]


def read_in_process(samples: Samples, rank: int, world_size: int) -> tuple[list[list[int]], NDArray[np.int64]]:
    steps, consumed = read(samples, rank, world_size, micro=2), OrderHash(len(samples.languages))
    for batch in (b for step in steps for b in step):
        consumed.add(batch["position"], batch["sample_id"], batch["language"], SEQ_LEN)
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


def test_languages_keep_their_index_whatever_a_phase_draws(samples: Samples, corpus: Path) -> None:
    changed = Samples(corpus, [Phase(0, {"de": 0.5, "fr": 0.5}, {}), Phase(100, {"mt": 1.0}, {})], SEQ_LEN, seed=5)
    assert changed.languages == samples.languages == Manifest.load(corpus).languages(TRAIN)
    before, after = changed.__getitems__(range(100)), changed.__getitems__(range(100, 200))
    assert set(before["language"].tolist()) == {changed.languages.index(lang) for lang in ("de", "fr")}
    assert set(after["language"].tolist()) == {changed.languages.index("mt")}


def test_ranks_that_cannot_share_a_step_are_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match="24 sequences do not divide into 5 ranks x 1"):
        read(samples, 0, 5, 1)


def test_an_epoch_of_a_language_holds_each_of_its_tokens_in_place(corpus: Path) -> None:
    samples = Samples(corpus, [Phase(0, {"mt": 1.0}, {})], SEQ_LEN, seed=1)
    stem = Manifest.load(corpus).shards_of("mt", TRAIN)[0].stem
    tokens = np.asarray(Shard(corpus / stem).tokens).astype(np.int64)
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
    shards, flat, numbers = [], [], []
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, 100, bos_id=1, eos_id=2)
        for ids in [*documents, [1, 2, 1]]:
            writer.add("id", "source", "", ids)
            flat += [1, *ids, 2]
            numbers += [(numbers[-1] if numbers else 0) + 1] * (len(ids) + 2)
        writer.close()
        shards.append(Shard(tmp_path / name))
    language, n_turns = LanguageTokens(shards), 4
    all_tokens = np.tile(flat, n_turns)
    all_numbers = np.concatenate([np.array(numbers) + turn * numbers[-1] for turn in range(n_turns)])
    for start in range(len(flat)):
        for n in (1, 2, 7, len(flat), 2 * len(flat) + 3):
            tokens, doc = language.read(start, n)
            assert tokens.tolist() == all_tokens[start : start + n].tolist()
            assert doc.tolist() == (all_numbers[start : start + n] - all_numbers[start]).tolist()


def test_samples_travel_to_another_process_without_their_files(samples: Samples) -> None:
    samples.__getitems__([0])
    assert samples._open and not samples.__getstate__()["_open"]


def touched(corpus: Path, samples: Samples, positions: Sequence[int]) -> list[DocumentName]:
    """By laying out the name of every token of a language."""
    manifest, named = Manifest.load(corpus), {}
    for language in samples.languages:
        named[language] = [
            DocumentName(entry.source, language, doc_id)
            for entry in manifest.shards_of(language, TRAIN)
            for doc_id, n_tokens in read_sidecar(corpus / entry.stem, "id", "n_tokens")
            for _ in range(n_tokens)
        ]
    found, names = samples.order.locate(positions), []
    for lang, sequence in zip(found.language, found.sequence, strict=True):
        all_names, first = named[samples.languages[lang]], int(sequence) * samples.seq_len
        names += [all_names[place % len(all_names)] for place in range(first, first + samples.seq_len)]
    return list(dict.fromkeys(names))


def test_documents_of_samples_are_named(corpus: Path, samples: Samples) -> None:
    rng = np.random.default_rng(0)
    for positions in ([7], range(24), rng.integers(0, 10_000, 50)):
        found = samples.documents(positions)
        assert found == touched(corpus, samples, positions)  # type: ignore[arg-type]
        assert len(found) == len(set(found)) > 0
    assert samples.documents([]) == []


def test_documents_are_named_across_shards_and_around_the_circle(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cfg = make_config([{"id": f"a/{i}", "lang": "de", "text": "Wort " * (i % 7 + 1)} for i in range(60)])
    shutil.copy(tmp_path / "source.jsonl", tmp_path / "other.jsonl")
    other = make_config([{"id": f"b/{i}", "lang": "de", "text": "zwei"} for i in range(20)]).corpus.sources["small"]
    cfg.corpus.sources["first"] = cfg.corpus.sources["small"]
    cfg.corpus.sources["first"].path = str(tmp_path / "other.jsonl")
    cfg.corpus.sources["second"] = other
    del cfg.corpus.sources["small"]
    corpus = prepare(cfg)
    for seq_len in (3, 16, 5000):
        samples = Samples(corpus, [Phase(0, {"de": 1.0}, {})], seq_len, seed=1)
        n = -(-Manifest.load(corpus).tokens_by_language(TRAIN)["de"] // seq_len)
        for positions in (range(n), [n - 1], [0, 0, n]):
            assert samples.documents(positions) == touched(corpus, samples, positions)
        assert {name.source for name in samples.documents(range(n))} == {"first", "second"}
