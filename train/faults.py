"""What ends a run before its last step or sends it back: signals, time, numbers that are not right."""

import fcntl
import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from configs.errors import UserError
from configs.schema import FaultConfig

JOB_ENDS_AT = "MARATHON_JOB_ENDS_AT"
"""Seconds since the epoch at which the machine ends this job; job scripts set it."""
MARGIN_S = 30.0
"""Kept free at the end of a job, besides twice the slowest step, validation and checkpoint so far."""
LOCK = "train.lock"
LOCK_WAIT_S = 60.0
"""How long a start waits for the processes of the one before to be gone."""


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and SIGINT, so that the loop ends its step and saves before it goes."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class JobClock:
    """Whether a job has time for one more step, its validation, and the checkpoint after it."""

    def __init__(self) -> None:
        self.ends_at = float(os.environ.get(JOB_ENDS_AT) or "inf")
        self._slowest_s: dict[str, float] = {}

    def took(self, what: str, seconds: float) -> None:
        """Remembers the longest time of each kind of work."""
        self._slowest_s[what] = max(self._slowest_s.get(what, 0.0), seconds)

    def is_over(self) -> bool:
        """Whether it is time to save and go."""
        return time.time() + MARGIN_S + 2 * sum(self._slowest_s.values()) > self.ends_at


class RunLock:
    """Keeps a second job from training the same run at the same time, where the file system has locks.

    Raises:
        UserError: the run is held by another process, and stays so for a minute.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file: IO[str] = open(run_dir / "logs" / LOCK, "a")  # noqa: SIM115 (held until the end)
        deadline = time.monotonic() + LOCK_WAIT_S
        if not _locks(self._file):
            print(f"another process trains this run: waiting up to {LOCK_WAIT_S:.0f} s for its end", flush=True)
        while not _locks(self._file):
            if time.monotonic() > deadline:
                raise _held(run_dir)
            time.sleep(0.5)


def refuse_if_held(run_dir: Path) -> None:
    """Raises `UserError` where a process of this machine, or of a shared file system with locks, trains the run."""
    path = run_dir / "logs" / LOCK
    if path.exists():
        with path.open("a") as file:
            if not _locks(file):
                raise _held(run_dir)


def _locks(file: IO[str]) -> bool:
    """Takes the lock that closing the file gives back; where a file system has none, nobody holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _held(run_dir: Path) -> UserError:
    return UserError(
        f"{run_dir} is being trained by another process",
        "one job at a time trains a run, with the settings it was started with",
        "wait for it or end it: squeue --me, or the other terminal",
    )


def refuse_bad_numbers(skipped_steps: Sequence[int], step: int, limit: int) -> None:
    """Stops a run whose gradients are not finite again and again.

    Args:
        skipped_steps: Steps that were left out, the one just done included.
        step: The step just done.
        limit: So many in a row are borne.
    """
    in_a_row = 0
    while in_a_row < len(skipped_steps) and skipped_steps[-1 - in_a_row] == step - in_a_row:
        in_a_row += 1
    if in_a_row > limit:
        raise UserError(
            f"gradients were not finite in {in_a_row} steps in a row, up to step {step}",
            f"faults.max_skipped_in_a_row = {limit}",
            "lower optim.lr or optim.grad_clip, or lengthen schedule.warmup_steps, under a new name=…; "
            "the checkpoints before these steps are sound",
        )


def is_spike(loss: float, losses: Sequence[float], cfg: FaultConfig) -> bool:
    """Whether a loss stands out above those before it, by median and MAD, which a spike cannot move."""
    if not cfg.spike_window_steps or len(losses) < max(cfg.spike_window_steps // 2, 2):
        return False
    median = statistics.median(losses)
    mad = statistics.median(abs(other - median) for other in losses)
    # 1.4826 x MAD is the standard deviation of normal numbers; a loss that hardly varies is not measured by it alone.
    return loss > median + cfg.spike_sigmas * max(1.4826 * mad, 0.02 * median)
