"""What a person sees while something long goes on: a bar on a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any

LINE_EVERY_S = 30.0  # between two plain lines that tell of progress alone


class Progress:
    """Counts `what` up to `total`, if that is known, in units told in the plural; a context manager."""

    def __init__(self, what: str, unit: str, total: int | None = None, *, done: int = 0, shown: bool = True) -> None:
        self.what, self.unit, self.total, self.done, self.shown = what, unit, total, done, shown
        self._next_line_s = time.monotonic() + LINE_EVERY_S
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            from rich import progress as columns  # which a rank behind a pipe never imports

            counts = ("{task.description}", columns.BarColumn(), columns.MofNCompleteColumn(), unit)
            times = (columns.TimeElapsedColumn(), "left", columns.TimeRemainingColumn())
            self._bar = columns.Progress(*counts, *times, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done)
            self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None and self.total is None:
            self.say(f"{self.what}: {self.done:,} {self.unit}")

    def stop(self) -> None:
        """Takes the bar away; for those who cannot be a `with` block."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, n: int = 1) -> None:
        """Counts `n` more."""
        self.done += n
        if self._bar is not None:
            self._bar.advance(self._task, n)
        elif time.monotonic() >= self._next_line_s:
            of = "" if self.total is None else f" of {self.total:,}"
            self.say(f"{self.what}: {self.done:,}{of} {self.unit}")

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self.shown:
            print(line, flush=True)
            self._next_line_s = time.monotonic() + LINE_EVERY_S
