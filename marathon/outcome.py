"""What a check of this machine comes to."""

import os
from typing import Literal

Status = Literal["pass", "warn", "fail", "skip"]
Outcome = tuple[Status, str, str]
"""Status, what was found, how to mend it."""


def passed(found: str) -> Outcome:
    """Nothing to mend."""
    return "pass", found, ""


def warned(found: str, repair: str) -> Outcome:
    """A run can start and will be slower or more fragile than it has to be."""
    return "warn", found, repair


def failed(found: str, repair: str) -> Outcome:
    """A run started here will fail or compute wrongly."""
    return "fail", found, repair


def does_not_apply(why: str) -> Outcome:
    """There is nothing here to look at."""
    return "skip", f"not applicable: {why}", ""


def in_job() -> bool:
    """Whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in os.environ
