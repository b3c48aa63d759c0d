"""Which checkpoints are kept, and whether the disk has room for them."""

import shutil
from pathlib import Path

from configs.errors import UserError
from configs.schema import RunConfig, TrainConfig
from model.decoder import padded_rows
from model.flops import count_parameters
from model.weights import PREFIX, list_checkpoints


def checkpoint_bytes(cfg: RunConfig, vocab_rows: int | None = None) -> int:
    """Bytes of one checkpoint: master weight and two moments in fp32 for each parameter."""
    return 12 * count_parameters(cfg.model, vocab_rows or padded_rows(cfg.tokenizer.vocab_size))


def checkpoints_on_disk(train: TrainConfig, from_step: int = 0) -> int:
    """Checkpoints that a run adds at the most from a step on, the one being written beside the others included."""
    written = -(-(train.steps - from_step) // train.save_every_steps) + (from_step == 0)
    if not train.keep_checkpoints:
        return written
    for_good = (train.steps - from_step) // train.keep_every_steps if train.keep_every_steps else 0
    return min(written, train.keep_checkpoints + 1 + for_good + (from_step == 0))


def require_space(run_dir: Path, cfg: RunConfig, vocab_rows: int, from_step: int) -> None:
    """Raises `UserError` where the disk cannot hold what is still to come; quotas are not seen."""
    train, free = cfg.train, shutil.disk_usage(run_dir).free
    rolling = [path for path in list_checkpoints(run_dir) if not _is_for_good(path, train.keep_every_steps)]
    to_come = checkpoints_on_disk(train, from_step)
    if train.keep_checkpoints:
        to_come -= min(len(rolling), train.keep_checkpoints)
    needed = max(to_come, 0) * checkpoint_bytes(cfg, vocab_rows)
    if needed > free:
        each = checkpoint_bytes(cfg, vocab_rows)
        raise UserError(
            f"{to_come} checkpoints of {each / 2**30:,.2f} GiB are to come, {run_dir} has {free / 2**30:,.2f} GiB free",
            "the disk has to hold them before the first step",
            f"train.keep_checkpoints={max(free // each - 1, 1)}, a larger train.save_every_steps, or more room",
        )


def remove_old(run_dir: Path, keep: int, keep_every_steps: int) -> None:
    """Leaves step 0, multiples of `keep_every_steps`, and the newest `keep` checkpoints; with keep = 0 all."""
    if not keep:
        return
    for checkpoint in list_checkpoints(run_dir)[:-keep]:
        if not _is_for_good(checkpoint, keep_every_steps):
            doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
            checkpoint.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _is_for_good(checkpoint: Path, keep_every_steps: int) -> bool:
    step = int(checkpoint.name.removeprefix(PREFIX))
    return step == 0 or (keep_every_steps > 0 and step % keep_every_steps == 0)
