"""The one exception a user is meant to read."""

from collections.abc import Iterable
from typing import Any

EXIT_UNFINISHED = 75
"""Exit status of a process that has saved and can go on, or that left the work to jobs (EX_TEMPFAIL of sysexits.h)."""
EXIT_MISTAKE = 78
"""Exit status of a process that has told such an error: starting it again would not help (EX_CONFIG of sysexits.h)."""


class UserError(Exception):
    """Something the user can mend: what was found, the rule it breaks, and the repair.

    It is printed without a traceback. Raise it before anything expensive starts; anything that is not the user's
    to mend should stay an ordinary exception.
    """

    def __init__(self, found: str, rule: str, repair: str) -> None:
        self.found, self.rule, self.repair = found, rule, repair
        super().__init__(f"{found}\n  rule:   {rule}\n  repair: {repair}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.found, self.rule, self.repair)  # from a worker process to the one that tells it


def raise_together(errors: Iterable[UserError]) -> None:
    """Raises all collected errors as one, so that a config is mended in one round, not in five."""
    if found := list(errors):
        raise found[0] if len(found) == 1 else SeveralUserErrors(found)


class SeveralUserErrors(UserError):
    """Several `UserError`s reported at once."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors, self.found = errors, "; ".join(e.found for e in errors)
        Exception.__init__(self, "\n".join(str(e) for e in errors))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors,)
