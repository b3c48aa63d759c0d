"""What a step is, over a run: steps of growing size, z-loss, and a run that begins where another one stands."""

import errno
import itertools
import json
import os
import shutil
import time
from functools import partial

import pytest

from configs.compose import freeze
from configs.errors import EXIT_UNFINISHED
from data.order import Phase
from ledger.record import Ledger
from model.weights import checkpoint_sha256
from tests.train.ranks import run_ranks
from tests.train.runs import SEQ_LEN, SEQS, files, losses, order_hash, progress, small, spike, steps, stop_after, train
from tests.train.test_engine import SEQS as ENGINE_SEQS
from tests.train.test_engine import build, config, engine_steps, plain_loop

# Steps of growing size.

RAMP = [4, 4, 8, 8, 12, 12, 12]
"""Sequences of the steps of a run: 4 until 7 have been seen, 8 until 24."""
GROWING = (
    f"train.batch_ramp=[{{until_tokens: {7 * SEQ_LEN}, tokens_per_step: {4 * SEQ_LEN}}},"
    f"{{until_tokens: {24 * SEQ_LEN}, tokens_per_step: {8 * SEQ_LEN}}}]",
    f"train.tokens={sum(RAMP) * SEQ_LEN}",
    "train.save_every_steps=3",
)


def steps_of_sizes(sizes, layouts):
    """One rank: losses and norms of steps of so many sequences, in micro batches of two."""
    from train.dist import join, leave
    from train.schedule import StepShape

    rank, told = join(config(2)), {}
    for layout in layouts:
        cfg, told[layout] = config(2, *layout), []
        engine, _ = build(cfg, rank)
        for step, n_seqs in enumerate(sizes):
            shape = StepShape(n_seqs, 2, n_seqs // 4)
            engine.begin_step(shape.accumulation_steps)
            told[layout] += engine_steps(engine, cfg, rank, shape, step, step + 1)
    leave()
    return told


def test_every_layout_takes_steps_of_growing_size_as_a_plain_loop():
    sizes, layouts = (4, ENGINE_SEQS, 8, ENGINE_SEQS), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
    expected, _ = plain_loop(len(sizes), sizes)
    for layout, told in run_ranks(steps_of_sizes, 2, sizes, layouts).items():
        is_exact = layout[1] == "fp32"
        assert [nats for nats, _ in told] == pytest.approx([n for n, _ in expected], rel=1e-5 if is_exact else 2e-2), (
            layout
        )
        assert [norm for _, norm in told] == pytest.approx([n for _, n in expected], rel=1e-4 if is_exact else 0.1), (
            layout
        )


@pytest.fixture(scope="module")
def grown(tmp_path_factory, corpus):
    """A ramp on one rank that is never stopped."""
    run_dir = tmp_path_factory.mktemp("grown")
    told = train(run_dir, corpus, *GROWING)
    assert told.status == 0 and "7 steps of 256, then 512, then 768 tokens" in told.text
    return run_dir


def test_a_ramp_goes_on_anywhere_on_other_devices(tmp_path, corpus, grown):
    """Stopped within its first stage and within its second."""
    for world_size, stage, parallel, n_steps in ((2, 3, 2, 1), (4, 1, 1, 2), (1, 2, 1, 9)):
        layout = f"engine.zero_stage={stage}", f"engine.sequence_parallel={parallel}"
        halt, is_last = (partial(stop_after, n_steps),), n_steps == 9
        told = train(tmp_path, corpus, *GROWING, *layout, world_size=world_size, faults=halt)
        assert told.status == (0 if is_last else EXIT_UNFINISHED), told.text
    found, expected = progress(tmp_path, 7), progress(grown, 7)
    for key in ("tokens", "order_state", "order_hash", "flops", "consumed_by_part"):
        assert found[key] == expected[key], key
    assert losses(tmp_path) == pytest.approx(losses(grown), rel=1e-5)
    assert found["tokens"] == sum(RAMP) * SEQ_LEN
    assert found["order_hash"] == order_hash(corpus, [Phase(**p) for p in found["phases"]], range(sum(RAMP)))
    tokens = [json.loads(line)["tokens"] for line in (grown / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(tokens)) == [n * SEQ_LEN for n in itertools.accumulate(RAMP, initial=0)]


def test_a_spike_within_a_ramp_leaves_out_what_its_steps_had(tmp_path, corpus):
    """At step 5, of twelve, back to step 3: what steps 4 and 5 had is left out, and all sizes stay."""
    told = train(tmp_path, corpus, *GROWING, faults=(partial(spike, 5),))
    assert told.status == 0, told.text
    [rewind] = Ledger(tmp_path).read("rewind")
    assert (rewind["step"], rewind["to_step"], rewind["left_out_positions"]) == (5, 3, [16, 36])
    last = progress(tmp_path, 7)
    positions = [*range(16), *range(36, sum(RAMP) + 20)]
    assert last["order_hash"] == order_hash(corpus, [Phase(**p) for p in last["phases"]], positions)
    assert last["tokens"] == sum(RAMP) * SEQ_LEN


# From a checkpoint of another run.

PLATEAU = (steps(12), "schedule.name=wsd", "schedule.decay_share=0.25", "train.save_every_steps=4")
DECAY = (steps(14), "schedule.name=wsd", "schedule.decay_share=0.29", "schedule.decay_shape=sqrt")
BEGIN = "train.begin_from=plateau/checkpoints/step-000000008"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """A folder of runs that holds one of twelve steps, which has begun to decay before step 10."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "plateau", corpus, *PLATEAU).status == 0
    freeze(small(*PLATEAU), folder / "plateau" / "config.yaml")
    return folder


def test_a_run_begins_where_another_one_stands(runs, corpus):
    """With a decay of its own: as the other up to it, and as if it had been one run, also where it is stopped at once."""
    run_dir, plateau = runs / "decay", runs / "plateau"
    halted = train(run_dir, corpus, *DECAY, BEGIN, faults=(partial(stop_after, 1),))
    assert halted.status == EXIT_UNFINISHED and "resuming at step 8, 6,144 tokens" in halted.text
    assert train(run_dir, corpus, *DECAY, BEGIN).status == 0
    found, expected = losses(run_dir), losses(plateau)
    assert list(found) == list(range(9, 15))
    # The other decays from step 10 on, counted from 1 the 11th: its loss is the first that may be another.
    assert {n: found[n] for n in (9, 10)} == {n: expected[n] for n in (9, 10)}
    assert found[12] != expected[12]
    last = progress(run_dir, 14)
    assert last["order_hash"] == order_hash(corpus, [Phase(**p) for p in last["phases"]], range(14 * SEQS))

    assert files(run_dir, 8) == files(plateau, 8)
    own = run_dir / "checkpoints" / "step-000000008"
    assert all(os.path.samefile(path, plateau / "checkpoints" / own.name / path.name) for path in own.iterdir())
    source = plateau / "checkpoints" / "step-000000008"
    [begun] = Ledger(run_dir).read("begun_from")
    assert (begun["path"], begun["sha256"]) == (str(source), checkpoint_sha256(source))
    assert not list(Ledger(run_dir).read("ledger_short"))


def test_its_first_checkpoint_is_its_own(runs, corpus):
    """It goes on where the other run is gone, and its own may go without the other losing any."""
    shutil.copytree(runs / "plateau", runs / "lent")
    begin = "train.begin_from=lent/checkpoints/step-000000008"
    settings = *DECAY, begin, "train.save_every_steps=1", "train.keep_checkpoints=1"
    halt = no_links, partial(stop_after, 2)
    assert train(runs / "own", corpus, *settings, faults=halt).status == EXIT_UNFINISHED
    assert [path.name for path in (runs / "own/checkpoints").iterdir()] == ["step-000000010"]
    assert files(runs / "lent", 8) == files(runs / "plateau", 8)
    shutil.rmtree(runs / "lent")
    assert train(runs / "own", corpus, *settings).status == 0


def no_links():
    """As between two file systems."""

    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    os.link = refuse


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=2"], "repair: seed=1"),
        (["model.rope_theta=1000"], "repair: model.rope_theta=500000.0"),
        ([steps(8)], f"repair: train.tokens={9 * SEQS * SEQ_LEN} or more"),
        ([f"train.tokens_per_step={24 * SEQ_LEN}"], f"until_tokens: {8 * SEQS * SEQ_LEN}"),
        (["train.begin_from=plateau/checkpoints/step-000000009"], "plateau/checkpoints/step-000000012"),
        (["train.begin_from=plateau"], "plateau/manifest.json cannot be read"),
        (["train.begin_from=/gone"], "OTHER/checkpoints/"),
    ],
)
def test_what_does_not_go_on_from_there_is_refused(runs, corpus, tmp_path_factory, overrides, said):
    run_dir = runs / tmp_path_factory.mktemp("refused").name
    told = train(run_dir, corpus, *DECAY, BEGIN, *overrides)
    assert told.status is None and said in told.text and "repair:" in told.text
    assert not list((run_dir / "checkpoints").glob("*"))


def test_a_damaged_checkpoint_is_not_begun_from(runs, corpus):
    spoilt = shutil.copytree(runs / "plateau", runs / "spoilt") / "checkpoints" / "step-000000008"
    weights = spoilt / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    told = train(runs / "misled", corpus, *DECAY, BEGIN.replace("plateau", "spoilt"), world_size=2)
    assert told.status is None and "has sha256" in told.text
    assert not list((runs / "misled" / "checkpoints").glob("*"))


def test_a_larger_step_after_the_other_run_is_a_ramp(runs, corpus):
    """What the refusal of another size proposes."""
    ramp = f"train.batch_ramp=[{{until_tokens: {8 * SEQS * SEQ_LEN}, tokens_per_step: {SEQS * SEQ_LEN}}}]"
    larger = f"train.tokens_per_step={24 * SEQ_LEN}"
    assert train(runs / "larger", corpus, *DECAY, BEGIN, ramp, larger).status == 0
    last = progress(runs / "larger", 11)
    assert last["order_hash"] == order_hash(corpus, [Phase(**p) for p in last["phases"]], range(14 * SEQS))


# z-loss.


def test_z_loss_moves_the_weights_and_not_the_loss_that_is_told(runs, corpus):
    run_dir, settings = runs / "drawn", (*PLATEAU, "train.z_loss=0.01", "train.self_test=true")
    assert train(run_dir, corpus, *settings, faults=(partial(stop_after, 4),)).status == EXIT_UNFINISHED
    assert Ledger(run_dir).last("self_test")["passed"], "against a reference that has the term too"
    found, expected = losses(run_dir), losses(runs / "plateau")
    assert found[1] == expected[1] and found[4] != expected[4]
    assert all(found[n] == pytest.approx(expected[n], rel=0.1) for n in found), "nats, not the sum"


# Waiting for data.


def slow_disk(seconds):
    """Reading a micro batch takes so long."""
    from data.loader import Samples

    read = Samples.__getitems__
    Samples.__getitems__ = lambda self, positions: (time.sleep(seconds), read(self, positions))[1]


def test_metrics_tell_how_long_a_run_waited_for_text(runs, corpus):
    run_dir, settings = runs / "waiting", (*PLATEAU, "train.log_every_steps=2")
    halt = partial(slow_disk, 0.1), partial(stop_after, 4)
    assert train(run_dir, corpus, *settings, faults=halt).status == EXIT_UNFINISHED
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [(line["split_s"]["data"], line["starved_steps"]) for line in lines if line["kind"] == "train"]
    assert [starved for _, starved in told] == [2, 2]
    # Four micro batches a step; what is read while a step is done is not waited for.
    assert 0.4 < sum(data_s for data_s, _ in told) < 1.6
    assert losses(run_dir)[4] < losses(run_dir)[2]
