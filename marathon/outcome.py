"""What a check of this machine comes to."""

import os
from functools import partial
from typing import Literal, NamedTuple


class Outcome(NamedTuple):
    """Whether it passed, what was found, and how to mend it, empty where there is nothing to mend."""

    status: Literal["pass", "warn", "fail", "skip"]
    found: str
    repair: str = ""


passed = partial(Outcome, "pass")
"""Nothing to mend."""
warned = partial(Outcome, "warn")
"""A run can start and will be slower or more fragile than it has to be."""
failed = partial(Outcome, "fail")
"""A run started here will fail or compute wrongly."""


def does_not_apply(why: str) -> Outcome:
    """There is nothing here to look at."""
    return Outcome("skip", f"not applicable: {why}")


def in_job() -> bool:
    """Whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in os.environ
