"""Which checkpoints are kept, and whether the disk has room for them."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig, TrainConfig
from model.decoder import padded_rows
from model.weights import PREFIX, list_checkpoints
from train.optim import state_bytes


def checkpoint_bytes(cfg: RunConfig, vocab_rows: int | None = None) -> int:
    """Bytes of one checkpoint: master weights and moments in fp32."""
    return state_bytes(cfg, vocab_rows or padded_rows(cfg.tokenizer.vocab_size))


def checkpoints_on_disk(train: TrainConfig, from_step: int = 0, present: Sequence[int] = ()) -> int:
    """Checkpoints that a run has on disk at the most from a step on, the one being written beside the others included.

    `present` are the steps of those that are there; where there are none, the run begins, and writes one at step 0.
    """
    saved = *range(0, train.steps, train.save_every_steps), train.steps
    due = [step for step in saved if step > from_step or not present]
    if not train.keep_checkpoints:
        return len(present) + len(due)
    steps, most = list(present), len(present)
    for step in due:
        most = max(most, len(steps) + 1)
        steps = _kept(sorted({*steps, step}), step, train.keep_checkpoints, train.keep_every_steps)
    return most


def require_space(run_dir: Path, cfg: RunConfig, vocab_rows: int, from_step: int) -> None:
    """Raises `UserError` where the disk cannot hold what is to come; quotas are not seen."""
    train, each, free = cfg.train, checkpoint_bytes(cfg, vocab_rows), shutil.disk_usage(run_dir).free
    present = list(_by_step(run_dir))

    def to_come(keep: int) -> int:
        return checkpoints_on_disk(replace(train, keep_checkpoints=keep), from_step, present) - len(present)

    if (needed := to_come(train.keep_checkpoints)) * each > free:
        fitting = [f"train.keep_checkpoints={keep}, " for keep in range(1, 10) if to_come(keep) * each <= free]
        sizes = f"of {each / 2**30:,.2f} GiB are to come, {run_dir} has {free / 2**30:,.2f} GiB free"
        repair = "".join(fitting[-1:]) + "a larger train.save_every_steps or train.keep_every_steps, or more room"
        raise UserError(f"{needed} checkpoints {sizes}", "the disk has to hold them before the first step", repair)


def remove_old(run_dir: Path, newest: int, keep: int, keep_every_steps: int) -> None:
    """Leaves step 0, multiples of `keep_every_steps`, and `keep` checkpoints up to step `newest`; with keep = 0 all.

    Those of later steps stay too, and take nobody's place: they are not whole, or the run would not stand before them.
    """
    checkpoints = _by_step(run_dir)
    kept = _kept(list(checkpoints), newest, keep, keep_every_steps) if keep else checkpoints
    for step, checkpoint in checkpoints.items():
        if step not in kept:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; killed on the way, it leaves none that looks whole."""
    doomed = checkpoint.with_name(f".removing-{checkpoint.name}-{time.time_ns()}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _kept(steps: list[int], newest: int, keep: int, keep_every_steps: int) -> list[int]:
    oldest = [step for step in steps if step <= newest][-keep:][0]
    return [s for s in steps if s >= oldest or s == 0 or (keep_every_steps and s % keep_every_steps == 0)]


def _by_step(run_dir: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix(PREFIX)): path for path in list_checkpoints(run_dir)}
