"""Starts that get no further are refused, and a stage process says by its status whether to start it again."""

import errno
import json
import os
import subprocess
import sys

import pytest

from configs.compose import compose, freeze
from configs.errors import EXIT_MISTAKE, UserError
from ledger.record import Ledger
from marathon import stage
from marathon.stages import mark_done, note_start


@pytest.fixture
def run_dir(tmp_path):
    """A run with its frozen config and nothing else."""
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    freeze(compose(["experiment=smoke", "name=small", f"cluster.scratch={tmp_path}"]), folder / "config.yaml")
    return folder


@pytest.fixture
def in_a_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("SLURM_JOB_ID", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def train_to(run_dir, *steps):
    """What a start leaves that logs these steps."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": "train", "step": step}) + "\n" for step in steps)


def save(run_dir, step):
    (run_dir / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)


def is_refused(run_dir, stage="train"):
    try:
        note_start(stage, run_dir)
    except UserError:
        return True
    return False


def starts(run_dir, *what_each_does):
    """Whether each of these starts was refused; what it does follows where it was not."""
    told = []
    for action in what_each_does:
        told.append(is_refused(run_dir))
        if not told[-1]:
            action()
    return told


def nothing():
    """A start that crashes before its first line."""


def test_the_third_start_without_progress_is_refused_and_this_is_said_once(run_dir, in_a_job):
    assert starts(run_dir, *6 * [nothing]) == [False, False, True, False, False, True]
    events = [record["event"] for record in Ledger(run_dir).read()]
    assert events == ["start", "start", "refused", "start", "start", "refused"]
    assert [record["job"] for record in Ledger(run_dir).read("start")] == 4 * ["4711"]


def test_the_refusal_says_how_far_the_run_has_come_and_where_to_look(run_dir, in_a_job):
    train_to(run_dir, 10, 20)
    save(run_dir, 16)
    starts(run_dir, nothing, nothing)
    with pytest.raises(UserError) as refusal:
        note_start("train", run_dir)
    assert "2 starts of `train` in a row have come no further than step 20" in refusal.value.found
    assert "step-000000016" in refusal.value.found
    assert str(run_dir / "logs") in refusal.value.repair


def test_a_person_at_a_terminal_is_never_refused(run_dir):
    assert starts(run_dir, *6 * [nothing]) == 6 * [False]


def test_progress_begins_the_count_anew(run_dir, in_a_job):
    further = [lambda: train_to(run_dir, 1), nothing, lambda: train_to(run_dir, 2), nothing, nothing, nothing]
    assert starts(run_dir, *further) == [False, False, False, False, False, True]


def test_steps_done_again_are_no_progress(run_dir, in_a_job):
    """Each start goes on from step 4 and dies at 7, whatever it writes on the way."""
    save(run_dir, 4)
    train_to(run_dir, *range(1, 8))
    assert starts(run_dir, *3 * [lambda: train_to(run_dir, 5, 6, 7)]) == [False, False, True]


def test_a_checkpoint_is_progress_also_below_the_furthest_step(run_dir, in_a_job):
    """A run that went back a long way after a spike, in jobs that end before it is where it was."""
    save(run_dir, 4)
    train_to(run_dir, *range(1, 40))
    further = [lambda step=step: save(run_dir, step) for step in (10, 20, 30)]
    assert starts(run_dir, *further, nothing, nothing, nothing) == [False, False, False, False, False, True]


def test_half_written_files_do_not_count(run_dir, in_a_job):
    train_to(run_dir, 3)
    torn = ['{"kind": "train", "st', '{"kind": "train", "step": 9', "[1]\n", "\0\0\n", '{"step": null}\n']
    for text in torn:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(text + "\n")
    (run_dir / "checkpoints/.writing-step-000000009").mkdir(parents=True)
    assert starts(run_dir, nothing, nothing, nothing) == [False, False, True]
    assert Ledger(run_dir).last("refused")["reached"].startswith("step 3")


def test_what_has_been_completed_may_begin_again(run_dir, in_a_job):
    """A release of every checkpoint that a longer and longer run comes to."""
    for number in range(4):
        assert not is_refused(run_dir, "release")
        mark_done("release", {"checkpoint": number}, run_dir, [])
    assert [is_refused(run_dir, "release") for _ in range(3)] == [False, False, True]


def test_stages_are_counted_apart(run_dir, in_a_job):
    assert [is_refused(run_dir, name) for name in ("train", "eval", "train", "eval", "train")] == 4 * [False] + [True]
    Ledger(run_dir).append("evaluation", name="step-000000004")
    assert not is_refused(run_dir, "eval"), "it has evaluated a checkpoint since"
    assert [is_refused(run_dir, "eval") for _ in range(2)] == [False, True]
    assert [is_refused(run_dir, "release") for _ in range(3)] == [False, False, True]


# Statuses of a process.


def staged(monkeypatch, action):
    """Puts `action` in the place of the data stage's work."""
    monkeypatch.setattr(stage, "run_stage", lambda name, cfg, run_dir: action())


def fail(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("number", "said", "repair"),
    [
        (errno.ENOSPC, "No space left on device", "make room on the disk"),
        (errno.EDQUOT, "Disk quota exceeded", "make room in your quota"),
        (errno.EROFS, "Read-only file system", "made writable"),
    ],
)
def test_a_disk_that_takes_no_more_is_a_persons_to_mend(run_dir, monkeypatch, capsys, number, said, repair):
    staged(monkeypatch, fail(OSError(number, os.strerror(number), "/scratch/x.bin")))
    assert stage.main(["data", str(run_dir)]) == EXIT_MISTAKE == 78
    told = capsys.readouterr().err
    assert told.startswith(f"error in data: /scratch/x.bin: {said}\n  rule:")
    assert told.count("rule:") == told.count("repair:") == 1
    assert repair in told
    assert "Traceback" not in told

    staged(monkeypatch, fail(OSError(number, os.strerror(number))))
    assert stage.main(["data", str(run_dir)]) == 78
    assert f"error in data: {run_dir}: {said}" in capsys.readouterr().err, "where no file is named"


def test_a_ledger_that_cannot_be_written_is_told_alike(run_dir, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert stage.main(["data", str(run_dir)]) == 78
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_other_failures_of_a_file_system_are_crashes(run_dir, monkeypatch, number):
    staged(monkeypatch, fail(OSError(number, os.strerror(number), "/scratch/x.bin")))
    with pytest.raises(OSError, match=r"/scratch/x\.bin"):
        stage.main(["data", str(run_dir)])


def test_a_mistake_is_told_whole_once_and_by_other_ranks_in_a_line(run_dir, monkeypatch, capsys):
    staged(monkeypatch, fail(UserError("the value", "the rule", "the repair")))
    assert stage.main(["data", str(run_dir)]) == 78
    assert capsys.readouterr().err == "error in data: the value\n  rule:   the rule\n  repair: the repair\n"
    monkeypatch.setenv("RANK", "3")
    assert stage.main(["data", str(run_dir)]) == 78
    assert capsys.readouterr().err == "[rank 3] the value\n"


def test_what_saved_and_wants_to_go_on_is_not_done(run_dir, monkeypatch):
    staged(monkeypatch, lambda: None)
    assert stage.main(["data", str(run_dir)]) == 75
    assert Ledger(run_dir).last("stage") is None
    assert Ledger(run_dir).last("start", stage="data")


def test_the_refusal_of_a_start_is_a_status_too(run_dir, monkeypatch, in_a_job, capsys):
    def crash():
        raise RuntimeError("as always")

    staged(monkeypatch, crash)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stage.main(["data", str(run_dir)])
    assert stage.main(["data", str(run_dir)]) == 78
    assert "2 starts of `data` in a row" in capsys.readouterr().err


def test_the_process_ends_with_the_status(tmp_path):
    command = [sys.executable, "-m", "marathon.stage", "train", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert f"{tmp_path / 'config.yaml'} is not there" in ended.stderr
    assert "Traceback" not in ended.stderr
