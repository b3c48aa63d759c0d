"""The stages of a run, what each depends on, and whether it is done.

A stage is done when the ledger holds a record of it with the same inputs and its outputs are still there.
So a changed corpus, suite or checkpoint runs it again, and nothing else does. Looking takes no torch.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from configs.compose import config_hash, settings_hash
from configs.enums import Packing
from configs.errors import UserError
from configs.schema import RunConfig
from ledger.record import Ledger

CHECKPOINTS = "checkpoints"
ON_ALL_DEVICES = {"train", "eval"}
"""Stages of one process a device; the others are one process in all."""


def inputs_of(stage: str, cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What decides the outcome of a stage.

    Raises:
        UserError: an earlier stage has yet to run.
    """
    if stage == "data":
        return _inputs_of_data(cfg, run_dir)
    corpus_hash = prepared_corpus(run_dir)["corpus_hash"]
    if stage == "train":
        return {"corpus_hash": corpus_hash, "settings": settings_hash(cfg)}
    checkpoints = {path.parent.name: _sha256(path) for path in _manifests(run_dir)}
    if not checkpoints:
        raise UserError(
            f"{run_dir / CHECKPOINTS} holds no checkpoint", f"{stage} needs one", "run `marathon train` first"
        )
    if stage == "eval":
        return {"corpus_hash": corpus_hash, "checkpoints": checkpoints, "suite": config_hash(cfg.suite)}
    evaluations = {path.name: _sha256(path) for path in sorted((run_dir / "eval").glob("*.json"))}
    last = max(checkpoints)
    return {"checkpoint": checkpoints[last], "evaluations": evaluations, "release": config_hash(cfg.release)}


def is_done(stage: str, inputs: dict[str, Any], run_dir: Path) -> bool:
    """Whether the newest record of the stage has these inputs and its outputs are there."""
    record = Ledger(run_dir).last("stage", stage=stage)
    if record is None or record["inputs"] != inputs:
        return False
    return all(Path(os.path.normpath(run_dir / path)).exists() for path in record["outputs"])


def mark_done(stage: str, inputs: dict[str, Any], run_dir: Path, outputs: list[Path]) -> None:
    """Records a stage with what it was given and what it left."""
    # Relative, since a run may move to another machine.
    relative = [os.path.relpath(path, run_dir) for path in outputs]
    Ledger(run_dir).append("stage", stage=stage, inputs=inputs, outputs=relative)


def prepared_corpus(run_dir: Path) -> dict[str, Any]:
    """The ledger's newest `corpus` record: `path` on this machine, `corpus_hash` and what the corpus holds.

    Raises:
        UserError: the data stage has yet to run.
    """
    record = Ledger(run_dir).last("corpus")
    # The record names the folder of the machine that prepared it; the corpus stands under the run's own scratch folder.
    path = Path(os.path.abspath(run_dir)).parents[1] / "corpora" / Path(record["path"]).name if record else None
    if record is None or path is None or not (path / "manifest.json").exists():
        raise UserError(
            f"{run_dir} has no prepared corpus",
            "training, evaluation and release read what `marathon data` prepares",
            "run `marathon data` with the same arguments, or `marathon run` for all stages",
        )
    return {**record, "path": str(path)}


def moved_to(run_dir: Path) -> str | None:
    """Where the run has been moved to, if it has not gone on here since; None otherwise."""
    hops = [r for r in Ledger(run_dir).read() if r["event"] in ("moved", "arrived", "train_start")]
    return hops[-1]["to"] if hops and hops[-1]["event"] == "moved" else None


def _inputs_of_data(cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    from data.pipeline import corpus_key

    try:
        packing = f"fit-{cfg.train.seq_len}" if cfg.mixture.packing is Packing.best_fit else "concat"
        return {"corpus_key": corpus_key(cfg), "packing": packing}
    except UserError:
        # The sources may have stayed on another machine. A run with checkpoints keeps the settings of its corpus, so
        # what was prepared from them still is what is asked for.
        record = Ledger(run_dir).last("stage", stage="data")
        if record is None or not _manifests(run_dir) or not is_done("data", record["inputs"], run_dir):
            raise
        return record["inputs"]


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / CHECKPOINTS).glob("step-*/manifest.json"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
