"""`train.run.run` as real ranks: a run that is moved, stopped, killed, spoilt and changed ends as one that was not."""

import json
import math
import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest

from configs.enums import Packing
from configs.errors import EXIT_UNFINISHED
from data.loader import Samples
from data.manifest import Manifest
from data.order import CYCLE, Phase
from data.packing import build_packing, record_packing
from ledger.record import Ledger
from model.weights import list_checkpoints
from tests.train.ranks import start_ranks
from tests.train.runs import (
    SEED,
    SEQ_LEN,
    SEQS,
    files,
    losses,
    one_rank,
    order_hash,
    progress,
    small,
    spike,
    spoil,
    steps,
    stop_after,
    train,
)
from train.faults import RunLock

TWELVE = (steps(12), "train.save_every_steps=4")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    """Twelve steps on two ranks, with a self-test before them."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert train(run_dir, corpus, *TWELVE, "train.self_test=true", world_size=2).status == 0
    return run_dir


def events(run_dir, event):
    return list(Ledger(run_dir).read(event))


def test_worlds_and_stages_may_change_on_the_way(tmp_path, corpus):
    """4 ranks, 2, 1, 3 under ZeRO 1, 3, 2, 3, five steps each, against one rank that is never stopped."""
    moving, alone = tmp_path / "moving", tmp_path / "alone"
    for world_size, stage in ((4, 1), (2, 3), (1, 2), (3, 3)):
        last = world_size == 3
        settings = f"engine.zero_stage={stage}", "train.self_test=true"
        told = train(moving, corpus, *settings, world_size=world_size, faults=() if last else (partial(stop_after, 5),))
        assert told.status == (0 if last else EXIT_UNFINISHED), told.text
    assert train(alone, corpus).status == 0
    assert [record["layout"]["world_size"] for record in events(moving, "self_test")] == [4, 2, 1, 3]
    moved, expected = progress(moving, 20), progress(alone, 20)
    for key in ("step", "updates", "tokens", "order_state", "order_hash", "consumed_by_part", "flops", "phases"):
        assert moved[key] == expected[key], key
    assert moved["order_hash"] == order_hash(corpus, [Phase(**p) for p in moved["phases"]], range(20 * SEQS))
    found, expected = losses(moving), losses(alone)
    assert list(found) == list(range(1, 21))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_mixture_may_change_in_mid_run_and_back(tmp_path, corpus, undisturbed):
    run_dir, other = tmp_path, ("mixture.rule=weights", "mixture.weights={de:3,el:1}")
    assert train(run_dir, corpus, *TWELVE, world_size=2, faults=(partial(stop_after, 4),)).status == EXIT_UNFINISHED
    assert files(run_dir, 4) == files(undisturbed, 4)
    changed = train(run_dir, corpus, *TWELVE, *other, world_size=2, faults=(partial(stop_after, 3),))
    assert "the mixture changes at position 48" in changed.text
    again = train(run_dir, corpus, *TWELVE, *other, faults=(partial(stop_after, 2),))
    assert "the mixture changes" not in again.text
    back = train(run_dir, corpus, *TWELVE, world_size=2)
    assert "the mixture changes at position 108" in back.text

    first, second, third = (Phase(**phase) for phase in progress(run_dir, 12)["phases"])
    assert [phase.from_position for phase in (first, second, third)] == [0, 48, 108]
    assert [record["from_position"] for record in events(run_dir, "mixture_phase")] == [48, 108]
    assert second.slots == {"de/udhr": CYCLE * 3 // 4, "el/udhr": CYCLE // 4}
    assert third.slots == first.slots and sorted(first.slots.values()) == [87_381, 87_381, 87_382]
    # Only what is drawn is seen, and counted by language, source and both.
    samples = Samples(corpus, [first, second, third], SEQ_LEN, SEED)
    drawn = np.array(samples.parts)[samples.order.locate(range(12 * SEQS)).part]
    assert set(drawn[48:108]) == {"de/udhr", "el/udhr"}
    last = progress(run_dir, 12)
    by_part = {part: int((drawn == part).sum()) * SEQ_LEN for part in samples.parts}
    assert last["consumed_by_part"] == by_part and last["consumed_by_source"] == {"udhr": 12 * SEQS * SEQ_LEN}
    assert last["consumed"] == {part[:2]: tokens for part, tokens in by_part.items()}
    assert progress(run_dir, 12)["order_hash"] == order_hash(corpus, [first, second, third], range(12 * SEQS))
    assert progress(run_dir, 12)["order_hash"] != progress(undisturbed, 12)["order_hash"]
    assert list(losses(run_dir)) == list(range(1, 13))


def test_a_phase_to_come_takes_over_where_it_was_planned(tmp_path, corpus):
    """Also where the run is stopped before and after; its losses are not compared with those of the phase before."""
    begin = 8 * SEQS * SEQ_LEN
    phases = f"mixture.phases=[{{from_tokens: {begin}, rule: weights, weights: {{mt: 1}}, max_epochs: 1000}}]"
    for n_steps in (5, 4):
        told = train(tmp_path, corpus, *TWELVE, phases, faults=(partial(stop_after, n_steps),))
        assert told.status == EXIT_UNFINISHED and f"mixture from {begin:,} tokens on, by weights" in told.text, (
            told.text
        )
    assert [len(progress(tmp_path, step)["losses"]) for step in (5, 9)] == [5, 1]
    told = train(tmp_path, corpus, *TWELVE, phases, world_size=2)
    assert told.status == 0 and not events(tmp_path, "mixture_phase")
    last = progress(tmp_path, 12)
    assert [phase["from_position"] for phase in last["phases"]] == [0, 8 * SEQS]
    assert last["order_hash"] == order_hash(corpus, [Phase(**p) for p in last["phases"]], range(12 * SEQS))
    assert last["consumed"]["mt"] > 4 * SEQS * SEQ_LEN
    planned = events(tmp_path, "mixture")[0]
    assert planned["rule"] == "unimax, then weights" and len(planned["phases"]) == 2
    assert sum(row["tokens"] for row in planned["rows"]) == pytest.approx(12 * SEQS * SEQ_LEN, abs=3)


def test_a_run_reads_packed_sequences_once_the_corpus_has_them(tmp_path, corpus):
    settings = *TWELVE, "mixture.packing=best_fit"
    told = train(tmp_path / "refused", corpus, *settings)
    assert told.status is None and "has not been made" in told.text and "marathon data" in told.text
    packed = shutil.copytree(corpus, tmp_path / "corpus")
    for entry in Manifest.load(packed).shards:
        build_packing(packed / entry.stem, SEQ_LEN)
    record_packing(packed, SEQ_LEN)
    assert train(tmp_path / "run", packed, *settings, faults=(partial(stop_after, 5),)).status == EXIT_UNFINISHED
    assert train(tmp_path / "run", packed, *settings, world_size=2).status == 0
    found, last = losses(tmp_path / "run"), progress(tmp_path / "run", 12)
    assert len(found) == 12 and found[12] < found[1] - 0.4
    phases = [Phase(**phase) for phase in last["phases"]]
    assert last["order_hash"] == order_hash(packed, phases, range(12 * SEQS), Packing.best_fit)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["mixture.packing=best_fit"], "packing is best_fit, the checkpoint step-000000001 was trained with concat"),
        (["train.seq_len=128"], "seq_len is 128, the checkpoint step-000000001 was trained with 64"),
        (["seed=2"], "seed is 2, the checkpoint step-000000001 was trained with 1"),
    ],
)
def test_what_decides_the_order_cannot_change_under_a_name(begun, corpus, overrides, reason):
    told = train(begun, corpus, *TWELVE, *overrides, world_size=2)
    assert told.status is None
    assert reason in told.text
    assert "name=… begins a new run" in told.text


def test_another_corpus_cannot_take_the_place_of_the_first(begun, corpus, tmp_path):
    other = copy_of(corpus, tmp_path)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"].pop()
    (other / "manifest.json").write_text(json.dumps(manifest))
    told = train(begun, other, *TWELVE)
    was, now = (Manifest.load(folder).corpus_hash for folder in (corpus, other))
    assert f"corpus_hash is {now}, the checkpoint step-000000001 was trained with {was}" in told.text


@pytest.fixture(scope="module")
def begun(tmp_path_factory, corpus):
    """A run that was stopped after its first step."""
    run_dir = tmp_path_factory.mktemp("begun")
    assert train(run_dir, corpus, *TWELVE, faults=(partial(stop_after, 1),)).status == EXIT_UNFINISHED
    return run_dir


def copy_of(corpus, folder):
    return shutil.copytree(corpus, folder / "corpus")


# Spikes.

SPOILT = (15 * SEQS, 16 * SEQS)
"""The positions of step 16."""
WATCHFUL = ("faults.spike_window_steps=6", "faults.spike_sigmas=3", "faults.spike_skip_steps=1")


def without(run_dir, corpus, skipped, n_steps=20):
    """What the checkpoint of the last step has to say of the order, `skipped` left out."""
    positions = [p for p in range(2 * n_steps * SEQS) if not any(first <= p < end for first, end in skipped)]
    phases = [Phase(**phase) for phase in progress(run_dir, n_steps)["phases"]]
    return order_hash(corpus, phases, positions[: n_steps * SEQS])


def test_samples_that_make_the_loss_jump_are_left_out(tmp_path, corpus):
    """Noise in the batch of step 16, also where the run is killed after it has gone back, and started again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told = train(whole, corpus, *WATCHFUL, world_size=2, faults=(partial(spoil, *SPOILT),))
    assert told.status == 0, told.text
    [rewind] = events(whole, "rewind")
    assert (rewind["step"], rewind["checkpoint"], rewind["to_step"]) == (16, "step-000000015", 15)
    assert rewind["left_out_positions"] == list(SPOILT)
    assert rewind["loss"] > 1.05 * max(rewind["losses_before"])
    samples = Samples(corpus, [Phase(**p) for p in progress(whole, 20)["phases"]], SEQ_LEN, SEED)
    assert [tuple(name) for name in rewind["documents"]] == samples.documents(range(*SPOILT))
    assert "back to step-000000015" in told.text

    last = progress(whole, 20)
    assert (last["skipped"], last["rewinds"], last["updates"]) == ([list(SPOILT)], 1, 20)
    assert last["order_hash"] == without(whole, corpus, [SPOILT])
    assert sum(last["consumed"].values()) == last["tokens"] == 20 * SEQS * SEQ_LEN
    # Done and left out, the step has cost its operations.
    assert last["flops"] == 21 / 20 * events(whole, "train_start")[0]["flops_per_token"] * last["tokens"]

    (killed / "logs").mkdir(parents=True)
    cfg = small(*WATCHFUL, "cluster.devices_per_node=2")
    ranks, _ = start_ranks(one_rank, 2, cfg, killed, corpus, (partial(spoil, *SPOILT), partial(die_in_step, 18)))
    for rank in ranks:
        rank.join(60)
    assert -signal.SIGKILL in [rank.exitcode for rank in ranks]
    assert events(killed, "rewind")
    assert list_checkpoints(killed)[-1].name == "step-000000015", "before the first checkpoint that knows of it"
    assert train(killed, corpus, *WATCHFUL, world_size=2, faults=(partial(spoil, *SPOILT),)).status == 0
    assert files(killed, 20) == files(whole, 20)
    assert progress(killed, 20)["order_hash"] == last["order_hash"]


def test_a_second_spike_before_the_next_checkpoint_keeps_what_the_first_left_out(tmp_path, corpus):
    # Steps 1 to 7, back to 5, 6 to 8, back to 5, 6 to 20.
    settings = steps(12), "faults.spike_skip_steps=1"
    told = train(tmp_path, corpus, *settings, faults=(partial(spike, 7, 10), partial(stop_after, 16)))
    assert told.status == EXIT_UNFINISHED, told.text
    skipped = [[6 * SEQS, 7 * SEQS], [8 * SEQS, 9 * SEQS]]
    assert [record["left_out_positions"] for record in events(tmp_path, "rewind")] == skipped
    assert progress(tmp_path, 11)["skipped"] == skipped
    assert train(tmp_path, corpus, *settings, world_size=2).status == 0
    last = progress(tmp_path, 12)
    assert (last["skipped"], last["rewinds"]) == (skipped, 2)
    assert last["order_hash"] == without(tmp_path, corpus, skipped, 12)


def test_what_is_left_out_twice_is_one_range_and_no_more_than_since_the_checkpoint(tmp_path, corpus):
    # A spike in step 7 takes steps 6 and 7 with it; the next, in the step 6 that follows, what stands there then.
    told = train(tmp_path, corpus, steps(8), "faults.spike_skip_steps=3", faults=(partial(spike, 7, 8),))
    assert told.status == 0, told.text
    assert [r["left_out_positions"] for r in events(tmp_path, "rewind")] == [[60, 84], [84, 96]]
    assert progress(tmp_path, 8)["skipped"] == [[60, 96]]
    assert progress(tmp_path, 8)["order_hash"] == without(tmp_path, corpus, [(60, 96)], 8)


def test_a_phase_outlives_a_rewind_to_before_it(tmp_path, corpus):
    """The checkpoint gone back to was saved under the first mixture; those that follow know of the second."""
    other = "mixture.rule=weights", "mixture.weights={mt:1}"
    assert train(tmp_path, corpus, steps(8), faults=(partial(stop_after, 4),)).status == EXIT_UNFINISHED
    settings = steps(8), "train.save_every_steps=8", *other, "faults.spike_skip_steps=1"
    told = train(tmp_path, corpus, *settings, faults=(partial(spike, 2), partial(stop_after, 5)))
    assert told.status == EXIT_UNFINISHED, told.text
    assert [phase["from_position"] for phase in progress(tmp_path, 7)["phases"]] == [0, 48]
    assert "the mixture changes" not in train(tmp_path, corpus, *settings).text
    last = progress(tmp_path, 8)
    assert [phase["from_position"] for phase in last["phases"]] == [0, 48]
    assert last["order_hash"] == without(tmp_path, corpus, [(60, 72)], 8)


def test_a_run_goes_back_only_so_often(tmp_path, corpus):
    settings = steps(12), "faults.max_rewinds=2"
    told = train(tmp_path, corpus, *settings, world_size=2, faults=(partial(spike, *range(7, 50)),))
    assert told.status is None
    assert "after 2 rewinds" in told.text
    assert "faults.max_rewinds = 2" in told.text
    assert len(events(tmp_path, "rewind")) == 2


def die_in_step(step):
    """The last rank is killed within this step of the run, once it has been done before."""
    from train.engine import Engine

    do, done = Engine.step, []

    def die(self, lr):
        done.append(lr)
        # One step more than that has been done: the spike's.
        if self.rank.rank == self.rank.world_size - 1 and len(done) == step + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, lr)

    Engine.step = die


# Gradients that are not finite.


def not_finite(*at, rank):
    """On one rank, the loss of the first micro batch of these steps, counted from the start of the process."""
    from train.engine import NextTokenLoss

    forward, n_passes = NextTokenLoss.forward, 0

    def spoilt(self, tokens, doc=None):
        nonlocal n_passes
        if doc is None:
            return forward(self, tokens)
        loss, counts = forward(self, tokens, doc)
        n_passes += 1
        passes_per_step = SEQS // int(os.environ["WORLD_SIZE"]) // 3
        is_spoilt = (n_passes - 1) / passes_per_step + 1 in at and int(os.environ["RANK"]) == rank
        return (loss * float("nan"), counts * float("nan")) if is_spoilt else (loss, counts)

    NextTokenLoss.forward = spoilt


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(tmp_path, corpus):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, corpus, steps(8), world_size=2, faults=(partial(not_finite, 3, rank=1),)).status == 0
    [left_out] = events(whole, "step_left_out")
    assert left_out["step"] == 3
    assert not math.isfinite(float(left_out["grad_norm"]))
    last = progress(whole, 8)
    assert (last["step"], last["updates"], last["skipped_steps"]) == (8, 7, [3])
    assert last["order_hash"] == without(whole, corpus, [], 8), "its samples count as consumed"
    assert [loss is None for loss in losses(whole).values()] == [step == 3 for step in range(1, 9)]
    assert len(last["losses"]) == 7

    settings, halt = (steps(8), "train.log_every_steps=4"), (partial(not_finite, 3, rank=1), partial(stop_after, 4))
    assert train(parts, corpus, *settings, world_size=2, faults=halt).status == EXIT_UNFINISHED
    assert progress(parts, 4)["updates"] == 3
    assert losses(parts)[4] == pytest.approx(np.mean([losses(whole)[step] for step in (1, 2, 4)]), rel=1e-3)
    assert train(parts, corpus, *settings, world_size=2).status == 0
    assert files(parts, 8) == files(whole, 8)
    assert progress(parts, 8)["losses"] == last["losses"]


def test_too_many_of_them_in_a_row_stop_the_run(tmp_path, corpus):
    limit = "faults.max_skipped_in_a_row=2"
    told = train(tmp_path, corpus, steps(12), limit, world_size=2, faults=(partial(not_finite, 2, 4, 6, 7, 8, rank=0),))
    assert told.status is None
    assert "not finite in 3 steps in a row, up to step 8" in told.text
    assert [record["step"] for record in events(tmp_path, "step_left_out")] == [2, 4, 6, 7, 8]


# The corpus.


def damage(corpus, how):
    """Spoils one shard, and returns what the message has to name."""
    shard = sorted((corpus / "shards").rglob("*.bin"))[1]
    content = bytearray(shard.read_bytes())
    if how == "vanished":
        shard.unlink()
        return f"{shard.relative_to(corpus)}: No such file"
    content[len(content) // 2] ^= 1
    shard.write_bytes(content[:-2] if how == "cut off" else content)
    return str(shard)


@pytest.mark.parametrize("how", ["vanished", "flipped", "cut off"])
@pytest.mark.parametrize("is_first_start", [True, False], ids=["at once", "later"])
def test_a_damaged_corpus_is_told_before_the_first_step(tmp_path, corpus, how, is_first_start):
    here, run_dir = copy_of(corpus, tmp_path), tmp_path / "run"
    if not is_first_start:
        assert train(run_dir, here, steps(8), faults=(partial(stop_after, 1),)).status == EXIT_UNFINISHED
    named = damage(here, how)
    told = train(run_dir, here, steps(8), world_size=2)
    assert told.status is None
    assert named in told.text
    assert told.text.count("rule:") == 1


def never_hash():
    """Hashing a file of the corpus fails."""
    from data import manifest

    manifest.sha256 = None


def test_a_corpus_is_hashed_once_for_as_long_as_it_is_unchanged(tmp_path, corpus):
    here, run_dir = copy_of(corpus, tmp_path), tmp_path / "run"
    assert train(run_dir, here, steps(8), world_size=2, faults=(partial(stop_after, 1),)).status == EXIT_UNFINISHED
    stop_unhashed = never_hash, partial(stop_after, 1)
    assert train(run_dir, here, steps(8), world_size=2, faults=stop_unhashed).status == EXIT_UNFINISHED
    [verified] = events(run_dir, "corpus_verified")
    assert verified["files"] == len(verified["marks"]) > 9
    shard = next((here / "shards").rglob("*.bin"))
    shard.touch()
    assert train(run_dir, here, steps(8), world_size=2).status == 0
    assert [record["files"] for record in events(run_dir, "corpus_verified")] == [verified["files"], 1]


# The job.


def test_a_run_saves_before_its_job_ends(tmp_path, corpus):
    """Half a minute before, with the real margin; the checkpoint is one to go on from."""
    ends_at = time.time() + 34
    told = train(tmp_path, corpus, "train.tokens=7680000", world_size=2, faults=(partial(job_ends, ends_at),))
    assert told.status == EXIT_UNFINISHED
    assert time.time() < ends_at - 20
    [stop] = events(tmp_path, "train_stop")
    assert stop["reason"] == "the end of the job's time"
    assert list_checkpoints(tmp_path)[-1].name == f"step-{stop['steps']:09d}"
    assert stop["steps"] >= 1


def job_ends(at):
    """What the job script exports."""
    os.environ["MARATHON_JOB_ENDS_AT"] = str(at)


def wait_little():
    """A start does not wait long for the one before to be gone."""
    from train import faults

    faults.LOCK_WAIT_S = 0.6


def test_one_process_at_a_time_trains_a_run(begun, corpus):
    before = (begun / "ledger.jsonl").read_text()
    lock = RunLock(begun)
    told = train(begun, corpus, *TWELVE, world_size=2, faults=(wait_little,))
    assert told.status is None
    assert "is being trained by another process" in told.text
    assert (begun / "ledger.jsonl").read_text() == before
    del lock
    assert train(begun, corpus, *TWELVE, faults=(wait_little, partial(stop_after, 1))).status == EXIT_UNFINISHED


def test_a_damaged_checkpoint_is_told_and_the_run_ends_the_same(tmp_path, corpus, undisturbed):
    assert train(tmp_path, corpus, *TWELVE, world_size=2, faults=(partial(stop_after, 8),)).status == EXIT_UNFINISHED
    spoilt = tmp_path / "checkpoints/step-000000008/rank-00001.safetensors"
    content = bytearray(spoilt.read_bytes())
    content[-1] ^= 1
    spoilt.write_bytes(content)
    told = train(tmp_path, corpus, *TWELVE, "train.self_test=true", world_size=2)
    assert told.status == 0
    assert f"not used: {spoilt} has sha256" in told.text
    assert "resuming at step 4" in told.text
    [record] = events(tmp_path, "checkpoint_damaged")
    assert str(spoilt) in record["complaint"]
    for step in (8, 12):
        assert files(tmp_path, step) == files(undisturbed, step)
        assert progress(tmp_path, step)["order_hash"] == progress(undisturbed, step)["order_hash"]
