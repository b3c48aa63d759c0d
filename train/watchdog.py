"""Ends a rank that hangs, after it has written where.

A hang is a step that takes longer than `engine.timeout_s`; whether logs still grow is not asked. All ranks wait for
the one that hangs, so all of them write their stacks at about the same time, and then end with a status that
makes the job start again.
"""

import faulthandler
import os
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

EXIT_HUNG = 76
"""Any status but those that the job script knows: the job starts again."""
GRACE_S = 5.0
"""Between writing stacks and ending, so that the first to end does not take the others' words away."""
LOOK_EVERY_S = 1.0
"""A fraction of the grace: ranks look at different moments."""


class Watchdog:
    """Watches one process; `alive` has to be called more often than every `timeout_s`."""

    def __init__(self, logs: Path, rank: int, timeout_s: float) -> None:
        self.path = logs / f"stacks-rank-{rank:05d}.txt"
        self.timeout_s = timeout_s
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
        self._alive_at_s = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.alive()

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
            self.path.unlink(missing_ok=True)

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
