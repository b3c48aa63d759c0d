"""Ranks that hang, each in its own way: all of them say where, and end long before a collective gives up."""

import ctypes
import json
import os
import re
import signal
import time
from functools import partial

import pytest

from tests.train.ranks import start_ranks
from tests.train.runs import one_rank, small, steps, train
from train import faults
from train.faults import EXIT_HUNG, Watchdog

TIMEOUT_S = 2.0


def stacks(logs, rank=0):
    return (logs / f"stacks-rank-{rank:05d}.txt").read_text()


def hurry(timeout_s):
    """The watchdog counts from the first step on, so that a slow start of a busy machine is no hang."""
    from train import run

    go = run.train
    faults.GRACE_S = 1.0
    faults.LOOK_EVERY_S = 0.2

    def train_in_a_hurry(job):
        job.watchdog.timeout_s = timeout_s
        job.watchdog.alive()
        return go(job)

    run.train = train_in_a_hurry


def in_step(do, rank, every=False):
    """On one rank, the third step, or every one, does this as well."""
    from train.engine import Engine

    step, done = Engine.step, []

    def troubled_step(self, lr):
        done.append(lr)
        if (every or len(done) == 3) and rank in (self.rank.rank, None):
            do()
        return step(self, lr)

    Engine.step = troubled_step


def sleep_for_ever():
    time.sleep(10_000)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_two_ranks(run_dir, corpus, how):
    """Starts two ranks of which the second comes to a standstill, and returns them once the first has ended."""
    (run_dir / "logs").mkdir()
    cfg = small(steps(8), "train.log_every_steps=1000", "cluster.devices_per_node=2", "engine.timeout_s=600")
    ranks, _ = start_ranks(
        one_rank, 2, cfg, run_dir, corpus, (partial(hurry, TIMEOUT_S), partial(in_step, how, rank=1))
    )
    ranks[0].join(90)
    assert ranks[0].exitcode == EXIT_HUNG
    # What a hung rank and one that waits for it in a collective have written.
    for text in ("in train", "in troubled_step", "in one_rank", "no step for 2 s"):
        assert text in stacks(run_dir / "logs")
    assert re.search(r"in (_sum|all_reduce|average_tensor|allreduce_bucket)\b", stacks(run_dir / "logs"))
    return ranks


def test_all_ranks_tell_where_they_wait_for_one_that_sleeps(tmp_path, corpus):
    ranks = hang_two_ranks(tmp_path, corpus, sleep_for_ever)
    ranks[1].join(30)
    assert ranks[1].exitcode == EXIT_HUNG
    assert "in sleep_for_ever" in stacks(tmp_path / "logs", 1)
    assert "in sleep_for_ever" not in stacks(tmp_path / "logs", 0)


def test_the_others_end_where_one_is_frozen(tmp_path, corpus):
    ranks = hang_two_ranks(tmp_path, corpus, freeze)
    assert ranks[1].is_alive()
    assert stacks(tmp_path / "logs", 1) == ""
    ranks[1].kill()
    ranks[1].join(30)
    assert ranks[1].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("held", ["by C", "by a regular expression"])
def test_a_rank_that_does_not_run_python_any_more_ends_all_the_same(tmp_path, held):
    [rank], _ = start_ranks(hold_the_interpreter, 1, tmp_path, held)
    rank.join(60)
    assert rank.exitcode == 1
    assert "in hold_the_interpreter" in stacks(tmp_path)
    assert "no step for" not in stacks(tmp_path), "the thread in Python could not have told"


def hold_the_interpreter(logs, held):
    """Watched for half a second, and never lets another thread of Python run."""
    faults.GRACE_S = 0.2
    Watchdog(logs, 0, 0.5)
    if held == "by C":
        ctypes.PyDLL(None).sleep(1000)
    re.match("(a+)+$", 64 * "a" + "b")


def test_a_slow_run_that_moves_is_left_alone_though_it_logs_nothing(tmp_path, corpus):
    nap = partial(in_step, partial(time.sleep, 0.5), rank=None, every=True)
    faults = partial(hurry, 1.5), nap
    began_s = time.monotonic()
    assert train(tmp_path, corpus, steps(6), "train.log_every_steps=1000", world_size=2, faults=faults).status == 0
    assert time.monotonic() - began_s > 3.0
    assert [line["kind"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [
        "valid",
        "train",
        "valid",
    ]
    assert list((tmp_path / "logs").glob("stacks-*")) == []


def test_stacks_of_an_earlier_hang_are_kept(tmp_path):
    path = tmp_path / "stacks-rank-00003.txt"
    path.write_text("from before\n")
    Watchdog(tmp_path, 3, 60).close()
    assert path.read_text() == "from before\n"
    other = Watchdog(tmp_path, 4, 60)
    assert other.path.exists()
    other.close()
    assert not other.path.exists()
