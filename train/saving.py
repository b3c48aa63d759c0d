"""When checkpoints are written: in the background, one at a time, while the loop goes on.

The loop stands still for the copy to host memory. Each rank then writes its file in a thread; with every step the
ranks tell each other how many are still writing and how many have failed, and once nobody writes any more the
first rank's thread commits. All ranks see the same numbers, so they agree on it without a collective of its own.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

from configs.errors import UserError
from ledger.record import Ledger
from model.weights import checkpoint_sha256
from train import checkpoint
from train.checkpoint import Snapshot, Staging
from train.dist import Rank
from train.engine import Engine
from train.progress import Progress
from train.retention import remove_old

PAUSES_S = (1.0, 5.0)
"""Between attempts to write a file; a file system that hiccups is given so many more chances."""


class Saver:
    """Writes checkpoints of one run; every method is called by all ranks alike."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        rank: Rank,
        facts: dict[str, Any],
        keep: tuple[int, int],
        say: Callable[[str], None] = print,
    ) -> None:
        """`facts` go into every manifest; `keep` is for `remove_old`; `say` tells of checkpoints on the terminal."""
        self.run_dir, self.engine, self.rank, self.facts, self.keep, self.say = run_dir, engine, rank, facts, keep, say
        self.slowest_s = 0.0
        """The longest that a checkpoint has taken from its snapshot to its name; known to the first rank."""
        self._staging = Staging(rank.device)
        self._staging.copy(engine)  # takes the memory now and not while the loop waits
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._part: Future[None] | None = None
        self._commit: Future[Path] | None = None

    def begin(self, progress: Progress) -> None:
        """Takes a snapshot and begins to write it; waits for the one before, where that is not complete."""
        self.wait()
        progress.ledger_bytes = Ledger(self.run_dir).n_bytes if self.rank.is_first else 0
        self._began_s = time.monotonic()
        snapshot = self._staging.copy(self.engine)
        self._blocked_s = time.monotonic() - self._began_s
        self._progress = deepcopy(progress)
        folder = checkpoint.writing_folder(self.run_dir, progress.step)
        self._part = self._background.submit(_write_with_patience, folder, self.rank.rank, snapshot)

    @property
    def votes(self) -> tuple[int, int]:
        """Whether this rank is writing, and whether it has failed, each 0 or 1."""
        if self._part is None:
            return 0, 0
        return (0, int(self._part.exception() is not None)) if self._part.done() else (1, 0)

    def advance(self, n_writing: float, n_failed: float) -> None:
        """Takes the sums of all ranks' votes: commits what is written, gives up what has failed."""
        if self._part is not None and n_writing == 0:
            self._end_part(self._part, n_failed)
        self._collect_commit(wait=False)

    def finish(self) -> None:
        """Returns when no checkpoint is under way; collective.

        Raises:
            UserError: the one under way could not be written, on any rank.
        """
        failure = self.wait()

        def refuse() -> None:
            if failure:
                raise UserError(
                    f"a checkpoint cannot be written: {failure}",
                    "a run ends only with its last state on disk; the checkpoints before it are whole",
                    f"make room, or mend the file system, at {self.run_dir / 'checkpoints'}, "
                    "then start the same line again",
                )

        self.rank.together(refuse)

    def wait(self) -> BaseException | None:
        """Returns when no checkpoint is under way, with what has failed on this rank; collective."""
        failure = None
        if self._part is not None:
            failure = self._part.exception()
            [n_failed] = self.rank.sum([failure is not None])
            self._end_part(self._part, n_failed)
        return failure or self._collect_commit(wait=True)

    def _end_part(self, part: Future[None], n_failed: float) -> None:
        """All ranks have come to the end of their files. Where one failed, training goes on without this checkpoint."""
        self._part = None
        if n_failed:
            error = part.exception()
            told = [text for text in self.rank.gather(error and (str(error) or repr(error))) if text]
            if self.rank.is_first:
                self._tell_failure(f"{told[0]} ({len(told)} of {self.rank.world_size} ranks failed)")
        elif self.rank.is_first:
            self._commit = self._background.submit(self._commit_and_clean)

    def _commit_and_clean(self) -> Path:
        path = checkpoint.commit(self.run_dir, self._progress.to_json(), self.facts, self.rank.world_size)
        remove_old(self.run_dir, self._progress.step, *self.keep)
        return path

    def _tell_failure(self, error: str) -> None:
        step = self._progress.step
        shutil.rmtree(checkpoint.writing_folder(self.run_dir, step), ignore_errors=True)
        print(f"the checkpoint of step {step} could not be written: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk has no room for the ledger either
            Ledger(self.run_dir).append("checkpoint_failed", step=step, error=error)

    def _collect_commit(self, wait: bool) -> BaseException | None:
        """Tells of a checkpoint that has got its name, or has not; only the first rank ever has one."""
        if self._commit is None or not (wait or self._commit.done()):
            return None
        commit, self._commit = self._commit, None
        if failure := commit.exception():
            self._tell_failure(str(failure))
            return failure
        path, progress = commit.result(), self._progress
        written_s = time.monotonic() - self._began_s
        self.slowest_s = max(self.slowest_s, written_s)
        Ledger(self.run_dir).append(
            "checkpoint",
            name=path.name,
            step=progress.step,
            tokens=progress.tokens,
            sha256=checkpoint_sha256(path),
            order_hash=progress.order_hash,
            **progress.consumption,
            blocked_s=round(self._blocked_s, 3),
            written_s=round(written_s, 3),
        )
        self.say(f"saved {path.name}")
        return None


def _write_with_patience(folder: Path, rank: int, snapshot: Snapshot) -> None:
    for pause_s in PAUSES_S:
        try:
            checkpoint.write_part(folder, rank, snapshot)
        except OSError as error:
            print(f"[rank {rank}] {error}: trying again in {pause_s:g} s", file=sys.stderr, flush=True)
            time.sleep(pause_s)
        else:
            return
    checkpoint.write_part(folder, rank, snapshot)
