"""The one exception a user is meant to read."""

from collections.abc import Iterable

EXIT_UNFINISHED = 75
"""Exit status of a process that has saved and can go on, or that left the work to jobs (EX_TEMPFAIL of sysexits.h)."""
EXIT_MISTAKE = 78
"""Exit status of a process that has told such an error: starting it again would not help (EX_CONFIG of sysexits.h)."""


class UserError(Exception):
    """Something the user can mend: what was found, the rule it breaks, and the repair; `others` are told with it.

    It is printed without a traceback. Raise it before anything expensive starts, and only for what the user can mend.
    """

    def __init__(self, found: str, rule: str, repair: str, *others: "UserError") -> None:
        super().__init__(found, rule, repair, *others)  # as given: so it comes out of a worker process again
        self.found: str = "; ".join([found, *(other.found for other in others)])
        self.rule, self.repair = rule, repair

    def __str__(self) -> str:
        found, rule, repair, *others = self.args
        return "\n".join([f"{found}\n  rule:   {rule}\n  repair: {repair}", *map(str, others)])


def raise_together(errors: Iterable[UserError]) -> None:
    """Raises all collected errors as one, so that a config is mended in one round, not in five."""
    if collected := list(errors):
        first, *others = collected
        raise UserError(*first.args, *others)
