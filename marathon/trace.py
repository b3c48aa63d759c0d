"""From a step of training to the documents it learned from, and from a document to its removal."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configs.compose import load
from configs.errors import UserError
from data.loader import Samples
from data.order import unskipped
from data.removal import remove_documents
from ledger.record import Ledger
from marathon.stages import prepared_corpus
from model.weights import list_checkpoints, read_manifest
from train.progress import Progress


def trace(run_dir: Path, step: int) -> list[str]:
    """A line for each document of step `step`, counted from 1: source, language, id.

    Raises `UserError` where the run's newest checkpoint, which knows the mixture, is older than the step.
    """
    cfg = load(run_dir / "config.yaml")
    checkpoints = list_checkpoints(run_dir)
    progress = Progress.from_json(read_manifest(checkpoints[-1])["progress"]) if checkpoints else Progress()
    if not 1 <= step <= progress.step:
        raise UserError(
            f"step={step} of {run_dir}",
            f"its newest checkpoint is of step {progress.step}, and steps count from 1",
            f"step=1 to step={progress.step}" if progress.step else "train it first",
        )
    corpus_dir, seqs = prepared_corpus(run_dir)["path"], cfg.train.seqs_per_step
    samples = Samples(corpus_dir, progress.phases, cfg.train.seq_len, cfg.seed, cfg.mixture.packing)
    positions = unskipped(np.arange((step - 1) * seqs, step * seqs), progress.skipped)
    return ["\t".join((source, lang, name or "(removed)")) for source, lang, name in samples.documents(positions)]


def remove(run_dir: Path, ids: Iterable[str], reason: str) -> list[str]:
    """Takes documents out of the corpus of a run, for all runs that use it; the stems of the shards that changed."""
    shards = remove_documents(prepared_corpus(run_dir)["path"], ids, reason)
    Ledger(run_dir).append("documents_removed", reason=reason, shards=shards)
    return shards
