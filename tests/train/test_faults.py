"""What ends a run or sends it back: jumps of the loss, gradients that are not finite, signals, time, other processes."""

import math
import os
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import FaultConfig
from train import faults
from train.faults import JOB_ENDS_AT, MARGIN_S, JobClock, RunLock, StopSignals, is_spike, refuse_bad_numbers

LOSSES = st.floats(0.01, 20.0)
WINDOW = 16


def watchful(sigmas=8.0, window=WINDOW):
    return FaultConfig(spike_window_steps=window, spike_sigmas=sigmas)


# Spikes.


@given(st.lists(LOSSES, min_size=2, max_size=3 * WINDOW), st.floats(0.1, 20.0))
def test_losses_that_fall_never_spike(losses, sigmas):
    falling = sorted(losses, reverse=True)
    for step in range(len(falling)):
        assert not is_spike(falling[step], falling[:step][-WINDOW:], watchful(sigmas))


@given(LOSSES, st.lists(st.floats(-0.02, 0.02), min_size=WINDOW // 2, max_size=WINDOW), st.floats(1.35, 100.0))
def test_a_jump_out_of_the_noise_is_a_spike_and_the_noise_is_none(level, noise, factor):
    losses = [level * (1 + part) for part in noise]
    assert is_spike(level * factor, losses, watchful())
    assert not is_spike(level * 1.02, losses, watchful())


@given(LOSSES, st.integers(WINDOW // 2, WINDOW), st.floats(0.5, 12.0))
def test_a_loss_that_has_not_varied_is_measured_by_its_height(level, n, sigmas):
    losses = [level] * n
    assert not is_spike(level * (1 + 0.0199 * sigmas), losses, watchful(sigmas))
    assert is_spike(level * (1 + 0.0201 * sigmas), losses, watchful(sigmas))


@given(st.integers(0, WINDOW // 2 - 1), st.floats(2.0, 1e6))
def test_spikes_in_the_window_do_not_hide_the_next(n_spikes, factor):
    losses = [2.0 + 0.01 * (step % 5) for step in range(WINDOW - n_spikes)] + [2.0 * factor] * n_spikes
    assert is_spike(3.0, losses, watchful())


@given(st.integers(0, 3 * WINDOW), st.integers(0, 2 * WINDOW))
def test_a_window_that_is_not_half_full_says_nothing(n, window):
    assert is_spike(1e9, [2.0] * n, watchful(window=window)) == (window > 0 and n >= max(window // 2, 2))


def test_a_loss_that_is_no_number_is_left_to_the_gradient():
    assert not is_spike(math.nan, [2.0] * WINDOW, watchful())
    assert is_spike(math.inf, [2.0] * WINDOW, watchful())


# Gradients that are not finite.


@given(st.sets(st.integers(1, 40)), st.integers(0, 6))
def test_so_many_in_a_row_are_borne_and_no_more(bad, limit):
    """Step by step, as the loop asks: after each step that was left out."""
    longest = max((len(run) for run in "".join("x" if s in bad else " " for s in range(42)).split()), default=0)
    left_out, refused_at = [], None
    for step in sorted(bad):
        left_out.append(step)
        try:
            refuse_bad_numbers(left_out, step, limit)
        except UserError as refusal:
            assert f"in {limit + 1} steps in a row, up to step {step}" in refusal.found
            refused_at = step
            break
    assert (refused_at is not None) == (longest > limit)


# Time, signals, locks.


def test_a_job_without_an_end_is_never_over(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv(JOB_ENDS_AT, raising=False)
        if value is not None:
            monkeypatch.setenv(JOB_ENDS_AT, value)
        clock = JobClock()
        clock.took("step", 1e9)
        assert not clock.is_over()


@given(
    st.lists(st.tuples(st.sampled_from(["step", "validation", "checkpoint"]), st.floats(0, 500)), max_size=8),
    st.floats(-100, 3000),
)
def test_time_is_kept_for_twice_the_slowest_of_everything(took, seconds_left):
    now_s = 1_800_000_000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(JOB_ENDS_AT, str(now_s + seconds_left))
        patch.setattr(faults.time, "time", lambda: now_s)
        clock = JobClock()
        for what, seconds in took:
            clock.took(what, seconds)
        slowest = [
            max((s for what, s in took if what == kind), default=0.0) for kind in ("step", "validation", "checkpoint")
        ]
        needed_s = MARGIN_S + 2 * sum(slowest)
        if abs(needed_s - seconds_left) > 1e-3:
            assert clock.is_over() == (seconds_left < needed_s)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_does_not_end_the_process(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        signals = StopSignals()
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number.name
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_start_waits_for_the_one_before_to_be_gone(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    held = [RunLock(tmp_path)]
    threading.Timer(0.3, held.clear).start()
    began_s = time.monotonic()
    RunLock(tmp_path)
    assert 0.3 <= time.monotonic() - began_s < 10

    monkeypatch.setattr(faults, "LOCK_WAIT_S", 0.0)
    held.append(RunLock(tmp_path))
    with pytest.raises(UserError, match="is being trained by another process"):
        RunLock(tmp_path)


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(faults.fcntl, "flock", refuse)
    RunLock(tmp_path)
    RunLock(tmp_path)
