"""A stage that is started again and again and gets no further is stopped, instead of burning node-hours."""

import os
from pathlib import Path

from configs.errors import UserError
from ledger.record import Ledger, json_lines

MAX_STARTS_WITHOUT_PROGRESS = 2


def note_start(stage: str, run_dir: Path) -> None:
    """Records that a stage starts, and how far the run had come.

    Raises:
        UserError: in a job, and the last starts of the stage had all come as far as this one finds it. The refusal
            is recorded, so that whoever mended the cause simply submits again.
    """
    ledger, reached, fruitless = Ledger(run_dir), _reached(stage, run_dir), 0
    for record in ledger.read():
        if record["event"] in ("start", "refused", "stage") and record["stage"] == stage:
            is_fruitless = record["event"] == "start" and record["reached"] == reached
            fruitless = fruitless + 1 if is_fruitless else 0
    # At a terminal, a person decides how often to try.
    if fruitless >= MAX_STARTS_WITHOUT_PROGRESS and "SLURM_JOB_ID" in os.environ:
        ledger.append("refused", stage=stage, reached=reached, starts=fruitless)
        raise UserError(
            f"{fruitless} starts of `{stage}` in a row have come no further than {reached}",
            "a job that makes no progress is not started again",
            f"read the end of the log and {run_dir / 'logs'}, mend the cause, submit again: this is said once",
        )
    ledger.append("start", stage=stage, reached=reached, job=os.environ.get("SLURM_JOB_ID", ""))


def _reached(stage: str, run_dir: Path) -> str:
    """How far the stage has come, in words that change with progress."""
    if stage == "train":
        # After a spike a run may save for a while below the furthest step.
        saved = max((path.name for path in (run_dir / "checkpoints").glob("step-*")), default="nothing")
        # A start that repeats steps since the last checkpoint is no progress yet.
        furthest = max((record.get("step") or 0 for record in json_lines(run_dir / "metrics.jsonl")), default=0)
        return f"step {furthest}, {saved} saved"
    if stage == "eval":
        return f"{sum(1 for _ in Ledger(run_dir).read('evaluation'))} evaluations"
    return "its beginning"
