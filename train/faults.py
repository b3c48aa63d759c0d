"""What ends a run before its last step, and what is said and done then."""

import math
import signal
from pathlib import Path
from types import FrameType

from configs.errors import UserError
from ledger.record import Ledger

EXIT_SAVED = 75
"""Exit status of a run that was asked to stop, saved, and can go on (EX_TEMPFAIL of sysexits.h)."""

MAX_STARTS_WITHOUT_PROGRESS = 2


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and SIGINT, so that the loop ends its step and saves before it goes."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def refuse_restart_loop(run_dir: Path, step: int) -> None:
    """Stops a run that dies again and again before it has saved anything new.

    Raises:
        UserError: the last starts were all at this step. The refusal is recorded, so that whoever mended
            the cause simply starts the run again.
    """
    ledger, starts = Ledger(run_dir), 0
    for record in ledger.read():
        if record["event"] == "train_start" and record["step"] == step:
            starts += 1
        elif record["event"] in ("train_start", "checkpoint", "train_refused"):
            starts = 0
    if starts >= MAX_STARTS_WITHOUT_PROGRESS:
        ledger.append("train_refused", step=step, starts=starts)
        raise UserError(
            f"{starts} starts at step {step} ended before the next checkpoint",
            "a run that makes no progress is stopped instead of burning node-hours",
            f"read the end of the log and {run_dir / 'logs'}, mend the cause, start again: this is said once",
        )


def check_finite(step: int, grad_norm: float) -> None:
    """Stops on a gradient that is not a number, before it reaches a checkpoint.

    The norm is over all ranks, so all of them stop; a loss that is not finite shows in it too.

    Raises:
        UserError: names the value and the step.
    """
    if not math.isfinite(grad_norm):
        raise UserError(
            f"gradient norm {grad_norm} in step {step}",
            "training goes on only with finite numbers",
            "lower optim.lr or optim.grad_clip, or lengthen schedule.warmup_steps, under a new name=…",
        )
