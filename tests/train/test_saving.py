"""Checkpoints in the background: the loop goes on, failures are told, and all ranks agree."""

import os
import subprocess
import threading
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from configs.errors import UserError
from ledger.record import Ledger
from model.weights import list_checkpoints, verify_files
from tests.train.ranks import run_ranks
from tests.train.states import IDENTITY, Weights
from tests.train.test_engine import build, config, engine_steps
from train import checkpoint
from train.checkpoint import Saver, Staging, writing_folder
from train.progress import Progress


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES_S", (0.01, 0.02))


def saver_of(run, rank, keep=(0, 0)):
    return Saver(run, Weights(1), rank, IDENTITY, keep, say=lambda text: None)


def save(saver, step):
    saver.begin(Progress(step=step))
    saver.finish()


def steps_of(run):
    return [int(path.name[-9:]) for path in list_checkpoints(run)]


def settle(saver):
    """What the loop does after each step, on a single rank, until nothing is under way."""
    while saver._part or saver._commit:
        saver.advance(*saver.votes)


def fill_disk(run, step, name="rank-00000.safetensors"):
    """Every byte that is written to this file of the checkpoint meets a full disk."""
    folder = writing_folder(run, step)
    folder.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")


@pytest.fixture
def read_only(tmp_path):
    """A run whose folder of checkpoints cannot be written to, until it is called."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield lambda: folder.chmod(0o700)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "marathon-test", folder]).returncode:
        pytest.skip("root may write anywhere, and may not mount here")
    yield lambda: subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def test_a_checkpoint_is_told_with_what_it_holds(tmp_path, alone):
    told = []
    saver = Saver(tmp_path, Weights(1), alone, IDENTITY, (1, 0), told.append)
    for step in (0, 4, 8):
        consumed = {"consumed": {"de": step}, "consumed_by_source": {"web": step}, "consumed_by_part": {"de/web": step}}
        saver.begin(Progress(step=step, tokens=step * 7, order_hash=f"hash {step}", **consumed))
        saver.finish()
    assert steps_of(tmp_path) == [0, 8]
    assert told == [f"saved step-{step:09d}" for step in (0, 4, 8)]
    last = Ledger(tmp_path).last("checkpoint")
    expected = {"name": "step-000000008", "step": 8, "tokens": 56, "order_hash": "hash 8", **consumed}
    assert {key: last[key] for key in expected} == expected
    assert 0 <= last["blocked_s"] <= last["written_s"] <= saver.slowest_s + 1e-3


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(tmp_path, alone, impatient, capfd, name):
    saver = saver_of(tmp_path, alone)
    save(saver, 4)
    before = {path.name: path.read_bytes() for path in list_checkpoints(tmp_path)[0].iterdir()}
    fill_disk(tmp_path, 8, name)
    saver.begin(Progress(step=8))
    settle(saver)
    assert Ledger(tmp_path).last("checkpoint_failed")["step"] == 8
    assert "No space left on device" in Ledger(tmp_path).last("checkpoint_failed")["error"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    assert {path.name: path.read_bytes() for path in list_checkpoints(tmp_path)[0].iterdir()} == before
    told = capfd.readouterr().err
    assert told.count("trying again") == (2 if name.startswith("rank") else 0)
    assert "the checkpoint of step 8 could not be written" in told
    save(saver, 12)
    assert steps_of(tmp_path) == [4, 12]
    verify_files(list_checkpoints(tmp_path)[-1])


def test_a_ledger_on_the_same_full_disk_does_not_end_the_run(tmp_path, alone, impatient):
    saver = saver_of(tmp_path, alone)
    Ledger(tmp_path).path.symlink_to("/dev/full")
    fill_disk(tmp_path, 4)
    saver.begin(Progress(step=4))
    settle(saver)
    Ledger(tmp_path).path.unlink()
    save(saver, 8)
    assert steps_of(tmp_path) == [8]


def test_a_write_that_fails_once_is_tried_again(tmp_path, alone, monkeypatch):
    saver, slept = saver_of(tmp_path, alone), []
    fill_disk(tmp_path, 4)

    def make_room(pause_s):
        slept.append(pause_s)
        (writing_folder(tmp_path, 4) / "rank-00000.safetensors").unlink()

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(sleep=make_room, monotonic=checkpoint.time.monotonic))
    save(saver, 4)
    assert slept == [1.0]
    verify_files(list_checkpoints(tmp_path)[0])
    assert Ledger(tmp_path).last("checkpoint_failed") is None


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_the_last_checkpoint_has_to_be_written(tmp_path, alone, impatient, name):
    saver = saver_of(tmp_path, alone)
    fill_disk(tmp_path, 4, name)
    saver.begin(Progress(step=4))
    with pytest.raises(UserError) as refusal:
        saver.finish()
    assert "No space left on device" in refusal.value.found
    assert str(tmp_path / "checkpoints") in refusal.value.repair
    assert Ledger(tmp_path).last("checkpoint_failed")["step"] == 4
    saver.finish()
    save(saver, 8)
    assert steps_of(tmp_path) == [8]


def test_a_commit_that_fails_at_once_is_not_overlooked(tmp_path, alone, monkeypatch):
    """It may be over before `finish` has looked for the first time."""
    saver = saver_of(tmp_path, alone)

    def fail(*_):
        raise OSError(30, "Read-only file system")

    class AtOnce:
        def submit(self, action, *arguments):
            future = checkpoint.Future()
            try:
                future.set_result(action(*arguments))
            except OSError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(checkpoint, "commit", fail)
    saver._background = AtOnce()
    saver.begin(Progress(step=4))
    with pytest.raises(UserError, match="Read-only file system"):
        saver.finish()


def test_a_failure_without_words_is_told_all_the_same(tmp_path, alone, monkeypatch):
    def run_out(*_):
        raise MemoryError

    saver = saver_of(tmp_path, alone)
    monkeypatch.setattr(checkpoint, "write_part", run_out)
    saver.begin(Progress(step=4))
    settle(saver)
    assert Ledger(tmp_path).last("checkpoint_failed")["error"] == "MemoryError() (1 of 1 ranks failed)"


def test_a_folder_that_is_read_only(tmp_path, alone, impatient, read_only):
    saver = saver_of(tmp_path, alone)
    saver.begin(Progress(step=4))
    settle(saver)
    assert Ledger(tmp_path).last("checkpoint_failed")["step"] == 4
    saver.begin(Progress(step=8))
    with pytest.raises(UserError, match=r"Read-only file system|Permission denied"):
        saver.finish()
    read_only()
    save(saver, 12)
    assert steps_of(tmp_path) == [12]


def save_on_two_ranks(folder):
    """One rank: steps beside slow and failing writes; what the first rank has seen, and the others told it."""
    from train.dist import join, leave
    from train.schedule import step_shape

    cfg = config(2)
    rank = join(cfg)
    engine, _ = build(cfg, rank)
    shape, seen, may_write = step_shape(cfg), {}, threading.Event()
    saver = Saver(folder, engine, rank, IDENTITY, (0, 0), say=lambda text: None)
    checkpoint.PAUSES_S = (0.01, 0.02)
    write_part = checkpoint.write_part

    def write_when_allowed(*arguments):
        if rank.rank == 1:
            may_write.wait()
        write_part(*arguments)

    def step(number):
        engine_steps(engine, cfg, rank, shape, number, number + 1)
        votes = [int(vote) for vote in rank.sum(saver.votes)]
        saver.advance(*votes)
        return votes

    def steps_until_over(number):
        while any(rank.gather(saver._part is not None or saver._commit is not None)):
            step(number)

    def both(fact):
        rank.barrier()
        return rank.gather(fact)

    def fill_disk_of_second(number):
        if rank.rank == 1:
            fill_disk(folder, number)
            (writing_folder(folder, number) / "rank-00000.safetensors").rename(
                writing_folder(folder, number) / "rank-00001.safetensors"
            )
        rank.barrier()

    # The second rank's write is held up; both go on stepping.
    checkpoint.write_part = write_when_allowed
    step(0)
    then = {key: tensor.clone() for key, tensor in Staging(rank.device).copy(engine).tensors.items()}
    saver.begin(Progress(step=1))
    seen["votes"] = [step(number) for number in range(1, 4)]
    seen["while held up"] = both(steps_of(folder))
    may_write.set()
    steps_until_over(4)
    seen["after"] = both(steps_of(folder))
    stored = load_file(folder / f"checkpoints/step-000000001/rank-{rank.rank:05d}.safetensors")
    seen["is of then"] = both(
        stored.keys() == then.keys() and all(stored[key].equal(tensor) for key, tensor in then.items())
    )
    now = Staging(rank.device).copy(engine).tensors
    seen["has moved on"] = both(not any(now[key].equal(then[key]) for key in then if not key.startswith("random")))

    # A second one waits for the first.
    may_write.clear()
    saver.begin(Progress(step=5))
    threading.Timer(0.3, may_write.set).start()
    saver.begin(Progress(step=6))
    seen["first when second begins"] = steps_of(folder)
    saver.finish()
    seen["both"] = both(steps_of(folder))
    checkpoint.write_part = write_part

    # One rank fails: first seen by a step, then by the next beginning, then at the end.
    fill_disk_of_second(7)
    saver.begin(Progress(step=7))
    steps_until_over(7)
    fill_disk_of_second(8)
    saver.begin(Progress(step=8))
    saver.begin(Progress(step=9))
    saver.finish()
    seen["failed one"] = both(steps_of(folder))
    fill_disk_of_second(10)
    saver.begin(Progress(step=10))
    try:
        saver.finish()
        end = "nothing"
    except (UserError, SystemExit) as error:
        end = repr(error)
    seen["ends"] = both(end)
    saver.begin(Progress(step=11))
    saver.finish()
    seen["last"] = both(steps_of(folder))
    leave()
    return seen


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_ranks(save_on_two_ranks, 2, folder)


def test_the_loop_goes_on_while_one_rank_writes(on_two_ranks):
    _, seen = on_two_ranks
    assert seen["votes"][-1] == [1, 0]
    assert all(votes in ([1, 0], [2, 0]) for votes in seen["votes"])
    assert (seen["while held up"], seen["after"]) == ([[], []], [[1], [1]])


def test_what_is_written_is_of_the_moment_it_began(on_two_ranks):
    _, seen = on_two_ranks
    assert (seen["is of then"], seen["has moved on"]) == ([True, True], [True, True])


def test_a_second_checkpoint_waits_for_the_first(on_two_ranks):
    _, seen = on_two_ranks
    assert (seen["first when second begins"], seen["both"]) == ([1, 5], [[1, 5, 6]] * 2)


def test_what_fails_on_one_rank_is_left_by_all(on_two_ranks):
    folder, seen = on_two_ranks
    assert seen["failed one"] == [[1, 5, 6, 9]] * 2
    assert seen["last"] == [[1, 5, 6, 9, 11]] * 2
    failed = list(Ledger(folder).read("checkpoint_failed"))
    assert [record["step"] for record in failed] == [7, 8, 10]
    assert all(record["error"].endswith("No space left on device (1 of 2 ranks failed)") for record in failed)
    assert [path.name for path in (folder / "checkpoints").glob(".*")] == []
    for path in list_checkpoints(folder):
        verify_files(path)


def test_at_the_end_a_failure_of_any_rank_ends_all(on_two_ranks):
    folder, seen = on_two_ranks
    first, second = seen["ends"]
    assert first.startswith("UserError") and "No space left on device" in first and str(folder / "checkpoints") in first
    assert second == "SystemExit(78)"
