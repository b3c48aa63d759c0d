"""What stays on disk, and how much room it takes."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.compose import compose
from configs.errors import UserError
from model.weights import list_checkpoints
from train import retention
from train.retention import checkpoint_bytes, checkpoints_on_disk, remove_old, require_space

SMOKE = compose(["experiment=smoke"])
ROWS = 512
EACH = checkpoint_bytes(SMOKE, ROWS)


@pytest.fixture
def run():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def folder_of(run, step):
    return run / "checkpoints" / f"step-{step:09d}"


def steps_of(run):
    return [int(path.name[-9:]) for path in list_checkpoints(run)]


def settings(steps, save_every, keep, keep_every):
    train = SMOKE.train
    return replace(
        SMOKE,
        train=replace(
            train,
            tokens=steps * train.tokens_per_step,
            save_every_steps=save_every,
            keep_checkpoints=keep,
            keep_every_steps=keep_every,
        ),
    )


def save(run, step, keep, keep_every):
    """Takes the room of one, and then its name, as a commit does; returns how many there were in between."""
    n_present = len(steps_of(run)) + 1
    shutil.rmtree(folder_of(run, step), ignore_errors=True)
    folder_of(run, step).mkdir(parents=True)
    remove_old(run, step, keep, keep_every)
    return n_present


def train_through(run, cfg, from_step, to_step):
    """The largest number of checkpoints at any time of a job that ends after `to_step`, where it saves."""
    train, most = cfg.train, 0
    for step in range(from_step + 1 if steps_of(run) else 0, to_step + 1):
        if step % train.save_every_steps == 0 or step == to_step:
            most = max(most, save(run, step, train.keep_checkpoints, train.keep_every_steps))
    return most


SMALL = st.integers(1, 8)


@given(
    steps=st.sets(st.integers(0, 40), min_size=1, max_size=12),
    later=st.sets(st.integers(41, 60), max_size=3),
    keep=st.integers(0, 5),
    keep_every=st.integers(0, 6),
)
def test_what_stays_is_step_0_the_multiples_and_the_newest(steps, later, keep, keep_every):
    with tempfile.TemporaryDirectory() as folder:
        for step in steps | later:
            folder_of(Path(folder), step).mkdir(parents=True)
        remove_old(Path(folder), max(steps), keep, keep_every)
        expected = {step for step in steps if step == 0 or (keep_every and step % keep_every == 0)}
        expected |= set(sorted(steps)[-keep:]) if keep else steps
        assert steps_of(Path(folder)) == sorted(expected | later)
        assert sorted(path.name for path in Path(folder, "checkpoints").iterdir()) == [
            f"step-{step:09d}" for step in sorted(expected | later)
        ]


def test_one_that_is_not_whole_takes_nobodys_place(run):
    """A run that went back before a damaged checkpoint keeps what it writes on its way there."""
    for step in (0, 100):
        folder_of(run, step).mkdir(parents=True)
    for step, expected in ((20, [0, 20, 100]), (40, [0, 40, 100]), (100, [0, 100]), (120, [0, 120])):
        save(run, step, 1, 0)
        assert steps_of(run) == expected


def test_what_cannot_be_removed_whole_does_not_stop_the_next(run):
    """The same step goes twice, as after a rewind, and the first time something in it was held open."""
    for _ in range(2):
        (folder_of(run, 4) / "held").mkdir(parents=True)
        folder_of(run, 8).mkdir(exist_ok=True)
        remove_old(run, 8, 1, 0)
        folder_of(run, 4).with_name(".removing-step-000000004").mkdir(exist_ok=True)
        (folder_of(run, 4).with_name(".removing-step-000000004") / "held").touch()
        assert steps_of(run) == [8]


@given(
    steps=st.integers(1, 40), save_every=SMALL, keep=st.integers(0, 4), keep_every=SMALL | st.just(0), data=st.data()
)
def test_room_is_asked_for_exactly_what_a_run_takes(steps, save_every, keep, keep_every, data):
    """From its beginning, and from any step at which a job was stopped and saved."""
    with tempfile.TemporaryDirectory() as folder:
        run, cfg = Path(folder), settings(steps, save_every, keep, keep_every)
        stopped_at = data.draw(st.none() | st.integers(1, steps))
        if stopped_at:
            train_through(run, cfg, 0, stopped_at)
        there = steps_of(run)
        told = checkpoints_on_disk(cfg.train, stopped_at or 0, there)
        assert told == max(train_through(run, cfg, stopped_at or 0, steps), len(there))


def test_too_little_room_is_refused_and_the_repair_helps(run, monkeypatch):
    free = 0
    monkeypatch.setattr(retention.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    cfg = settings(steps=100, save_every=10, keep=0, keep_every=0)
    free = 11 * EACH
    require_space(run, cfg, ROWS, 0)
    free -= 1
    with pytest.raises(UserError) as refusal:
        require_space(run, cfg, ROWS, 0)
    assert refusal.value.found.startswith(f"11 checkpoints of {EACH / 2**30:,.2f} GiB are to come, {run} has ")
    assert refusal.value.repair.startswith("train.keep_checkpoints=8, ")
    require_space(run, settings(100, 10, 8, 0), ROWS, 0)
    with pytest.raises(UserError):
        require_space(run, settings(100, 10, 9, 0), ROWS, 0)
    for step in (0, 10, 20):
        folder_of(run, step).mkdir(parents=True)
    free = EACH
    require_space(run, settings(100, 10, 2, 0), ROWS, 20)
    free = EACH - 1
    with pytest.raises(UserError) as refusal:
        require_space(run, settings(100, 10, 2, 0), ROWS, 20)
    assert refusal.value.found.startswith("1 checkpoints")
    assert refusal.value.repair.startswith("a larger train.save_every_steps")
    free = 0
    require_space(run, settings(20, 10, 2, 0), ROWS, 20)
