"""The stages of a run, what each depends on, and whether it is done.

A stage is done when the ledger holds a record of it with the same inputs and its outputs are still there.
So a changed corpus, suite or checkpoint runs it again, and nothing else does. Looking takes no torch.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import config_hash, settings_hash
from configs.errors import UserError
from configs.schema import RunConfig
from ledger.record import Ledger

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Stage:
    """One of the steps from text to release."""

    name: str
    on_all_devices: bool
    """One process a device, or one in all."""
    help: str


STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", False, "text to tokenizer, shards and manifest"),
        Stage("train", True, "train, validate, write checkpoints"),
        Stage("eval", True, "ask every checkpoint: bits per byte, tasks"),
        Stage("release", False, "export the last checkpoint as a Hugging Face folder and verify it"),
    )
}


def inputs_of(stage: str, cfg: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What decides the outcome of a stage.

    Raises:
        UserError: an earlier stage has yet to run.
    """
    if stage == "data":
        from data.pipeline import corpus_key

        return {"corpus_key": corpus_key(cfg)}
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
    return record is not None and record["inputs"] == inputs and all(Path(p).exists() for p in record["outputs"])


def mark_done(stage: str, inputs: dict[str, Any], run_dir: Path, outputs: list[Path]) -> None:
    """Records a stage with what it was given and what it left."""
    Ledger(run_dir).append("stage", stage=stage, inputs=inputs, outputs=[str(p) for p in outputs])


def prepared_corpus(run_dir: Path) -> dict[str, Any]:
    """The ledger's newest `corpus` record: `path`, `corpus_hash` and what the corpus holds.

    Raises:
        UserError: the data stage has yet to run.
    """
    record = Ledger(run_dir).last("corpus")
    if record is None or not Path(record["path"]).exists():
        raise UserError(
            f"{run_dir} has no prepared corpus",
            "training, evaluation and release read what `marathon data` prepares",
            "run `marathon data` with the same arguments, or `marathon run` for all stages",
        )
    return record


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / CHECKPOINTS).glob("step-*/manifest.json"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
