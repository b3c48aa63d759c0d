"""After a loss spike: back to the last checkpoint, and on without the samples that led to it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig
from data.loader import Samples
from data.order import unskipped
from ledger.record import Ledger
from train import checkpoint
from train.dist import Rank
from train.engine import Engine
from train.progress import Progress


def rewind(run_dir: Path, progress: Progress, engine: Engine, rank: Rank, samples: Samples, cfg: RunConfig) -> None:
    """Sets engine and progress to the last checkpoint; the samples of the spike's steps are left out from then on.

    The spike's loss is the last of `progress.losses`. The ledger names the documents.

    Raises:
        UserError: the run has gone back too often, or there is no checkpoint.
    """
    *before, loss = progress.losses
    if progress.rewinds >= cfg.faults.max_rewinds:
        raise UserError(
            f"loss {loss:.3f} at step {progress.step} after {progress.rewinds} rewinds",
            f"faults.max_rewinds = {cfg.faults.max_rewinds}",
            "the ledger names the documents of each; lower optim.lr under a new name=…, or raise the limit",
        )
    target, complaints = checkpoint.newest_usable(run_dir, rank)
    if target is None:
        raise UserError(
            f"loss {loss:.3f} at step {progress.step} and no checkpoint to go back to: {complaints}",
            "a spike is answered by going back",
            "faults.spike_window_steps=0 switches this off",
        )
    old = dataclasses.replace(progress)
    restored = checkpoint.restore(target, engine, rank, cfg.seed)
    for field in dataclasses.fields(Progress):
        setattr(progress, field.name, getattr(restored, field.name))
    first_step = max(old.step - cfg.faults.spike_skip_steps, progress.step)
    seqs = cfg.train.seqs_per_step
    first, last = unskipped([first_step * seqs, old.step * seqs - 1], old.skipped).tolist()
    progress.skipped = _with_range(old.skipped, (first, last + 1))
    progress.rewinds = old.rewinds + 1
    # They tell what stands at a position, and the checkpoint may be older than the newest of them.
    progress.phases = old.phases
    # Spent all the same.
    progress.flops, progress.device_s = old.flops, old.device_s
    if rank.is_first:
        Ledger(run_dir).append(
            "rewind",
            step=old.step,
            loss=loss,
            losses_before=before[-8:],
            checkpoint=target.name,
            to_step=restored.step,
            left_out_steps=[first_step + 1, old.step],
            left_out_positions=[first, last + 1],
            documents=samples.documents(range(first, last + 1)),
        )
        print(
            f"loss {loss:.3f} at step {old.step}: back to {target.name}, without the samples of steps "
            f"{first_step + 1} to {old.step}; the ledger names their documents",
            flush=True,
        )


def _with_range(ranges: Sequence[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Sorted and disjoint, the new one joined with those it touches."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted([*ranges, new]):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined
