"""What ends a run before its last step or sends it back: signals, time, hangs, numbers that are not right."""

import faulthandler
import fcntl
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from configs.errors import UserError
from configs.schema import FaultConfig

JOB_ENDS_AT = "MARATHON_JOB_ENDS_AT"  # seconds since the epoch at which the machine ends this job; job scripts set it
MARGIN_S = 30.0  # kept free at the end of a job, besides twice the slowest step, validation and checkpoint so far
LOCK = "train.lock"
LOCK_WAIT_S = 60.0  # how long a start waits for the processes of the one before to be gone
EXIT_HUNG = 76  # any status but those that the job script knows: the job starts again
GRACE_S = 5.0  # between writing stacks and ending, so that the first to end does not take the others' words away
LOOK_EVERY_S = 1.0  # a fraction of the grace: ranks look at different moments


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


class Watchdog:
    """Ends a rank that hangs, after it has written where; `alive` has to be called more often than every `timeout_s`.

    A hang is a step that takes longer; whether logs still grow is not asked. All ranks wait for the one that hangs, so
    all write their stacks at about the same time, and then end with a status that makes the job start again.
    """

    def __init__(self, logs: Path, rank: int, timeout_s: float) -> None:
        self.path, self.timeout_s = logs / f"stacks-rank-{rank:05d}.txt", timeout_s
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
        self._ended = threading.Event()
        self.alive()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """A step has ended, or another part of the work that may take as long."""
        self._alive_at_s = time.monotonic()
        # Written in C: it also works where Python itself does not run on, some seconds later.
        faulthandler.dump_traceback_later(self.timeout_s + 6 * GRACE_S, exit=True, file=self._file)

    def close(self) -> None:
        """Ends the watch; a file without stacks goes."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            waited_s = time.monotonic() - self._alive_at_s
            if waited_s > self.timeout_s:
                self._file.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S}: no step for {waited_s:.0f} s\n")
                self._file.flush()
                faulthandler.dump_traceback(self._file)
                print(f"no step for {waited_s:.0f} s: stacks are in {self.path}", file=sys.stderr, flush=True)
                time.sleep(GRACE_S)
                os._exit(EXIT_HUNG)


class RunLock:
    """Keeps a second job from training the same run at the same time, where the file system has locks.

    Raises `UserError` where another process holds the run, and still does after `LOCK_WAIT_S`, or, if asked, at once.
    """

    def __init__(self, run_dir: Path, at_once: bool = False) -> None:
        self._file = open(run_dir / "logs" / LOCK, "a")  # noqa: SIM115 (held until the end)
        deadline = time.monotonic() + (0 if at_once else LOCK_WAIT_S)
        if not (at_once or self._takes()):
            print(f"another process trains this run: waiting up to {LOCK_WAIT_S:.0f} s for its end", flush=True)
        while not self._takes():
            if time.monotonic() >= deadline:
                found = f"{run_dir} is being trained by another process"
                rule = "one job at a time trains a run, with the settings it was started with"
                raise UserError(found, rule, "wait for it or end it: squeue --me, or the other terminal")
            time.sleep(0.5)

    def _takes(self) -> bool:
        """Takes the lock, which closing the file gives back; where a file system has none, nobody else holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        return True


def refuse_if_held(run_dir: Path) -> None:
    """Raises `UserError` where a process of this machine, or of a shared file system with locks, trains the run."""
    if (run_dir / "logs" / LOCK).exists():
        RunLock(run_dir, at_once=True)


def refuse_bad_numbers(skipped_steps: Sequence[int], step: int, limit: int) -> None:
    """Raises `UserError` where more than `limit` steps in a row up to `step` are among those left out."""
    in_a_row = 0
    while in_a_row < len(skipped_steps) and skipped_steps[-1 - in_a_row] == step - in_a_row:
        in_a_row += 1
    if in_a_row > limit:
        found = f"gradients were not finite in {in_a_row} steps in a row, up to step {step}"
        repair = "a lower optim.lr or optim.grad_clip, or more schedule.warmup_steps, under a new name=…"
        repair += "; the checkpoints before these steps are sound"
        raise UserError(found, f"faults.max_skipped_in_a_row = {limit}", repair)


def is_spike(loss: float, losses: Sequence[float], cfg: FaultConfig) -> bool:
    """Whether a loss stands out above those before it, by median and MAD, which a spike cannot move."""
    if not cfg.spike_window_steps or len(losses) < max(cfg.spike_window_steps // 2, 2):
        return False
    median = statistics.median(losses)
    mad = statistics.median(abs(other - median) for other in losses)
    # 1.4826 x MAD is the standard deviation of normal numbers; a loss that hardly varies is not measured by it alone.
    return loss > median + cfg.spike_sigmas * max(1.4826 * mad, 0.02 * median)
