"""Checkpoints: complete under their name, or not there.

Every rank writes its own fragments in parallel, hashed and forced to disk; the manifest is written last, and
then the folder is renamed. Whatever moment a job is killed at, the newest folder named `step-…` is whole. The
format is told in model/weights.py, which reads it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from configs.errors import UserError
from model.weights import PREFIX, FragmentReader, file_sha256, list_checkpoints, read_manifest, verify_files
from train.dist import Rank
from train.engine import Engine

FORMAT = 1


@dataclass
class Progress:
    """What a run has behind it; all that a resume needs besides weights and moments."""

    step: int = 0
    """Optimizer steps done; the next sample is number step x seqs_per_step."""
    tokens: int = 0
    """Tokens trained on, repetitions counted."""
    order_state: list[int] = field(default_factory=list)
    """`data.order.OrderHash.state` summed over all ranks: a proof of what was consumed, whoever consumed it."""
    order_hash: str = ""
    """The same proof as hexadecimal digits."""
    consumed: dict[str, int] = field(default_factory=dict)
    """Tokens by language."""
    flops: float = 0.0
    """Operations of forward and backward so far."""
    device_s: float = 0.0
    """Seconds of stepping so far, times devices."""


def save(run_dir: Path, engine: Engine, progress: Progress, identity: dict[str, Any], rank: Rank) -> Path:
    """Writes a checkpoint and returns its folder; collective.

    Args:
        run_dir: Folder of the run.
        engine: Holds weights and moments.
        progress: Goes into the manifest.
        identity: What the checkpoint belongs to (corpus hash, sequence length, rows of the vocabulary, …).
        rank: This process.
    """
    final = run_dir / "checkpoints" / f"{PREFIX}{progress.step:09d}"
    beside = final.with_name(f".writing-{final.name}")
    if rank.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    rank.barrier()
    _write_fragments(beside, engine, rank)
    rank.barrier()
    if rank.is_first:
        _write_manifest(beside, {"format": FORMAT, "progress": asdict(progress), **identity})
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _sync_folder(final.parent)
    rank.barrier()
    return final


def newest_usable(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones are not used."""
    complaints = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            verify_files(checkpoint)
        except UserError as error:
            complaints.append(str(error))
            continue
        return checkpoint, complaints
    return None, complaints


def require_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises `UserError` where the checkpoint was trained on another corpus, mixture, sequence length or seed."""
    manifest = read_manifest(checkpoint)
    for key, now in identity.items():
        if (then := manifest[key]) != now:
            raise UserError(
                f"{key} is {now}, the checkpoint {checkpoint.name} was trained with {then}",
                "a run keeps corpus, tokenizer, mixture, sequence length and seed: they make its order of samples",
                "name=… begins a new run; or put back what has changed since",
            )


def restore(checkpoint: Path, engine: Engine) -> Progress:
    """Fills weights and moments and returns the progress; each rank reads what it holds."""
    progress = Progress(**read_manifest(checkpoint)["progress"])
    engine.restore(FragmentReader(checkpoint), progress.step)
    return progress


def remove_old(run_dir: Path, keep: int) -> None:
    """Leaves step 0 and the newest `keep` checkpoints; 0 keeps all."""
    if keep:
        for checkpoint in list_checkpoints(run_dir)[1:-keep]:
            doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)


def _write_fragments(folder: Path, engine: Engine, rank: Rank) -> None:
    path = folder / f"rank-{rank.rank:05d}.safetensors"
    tensors, fragments = {}, []
    for owned in engine.fragments():
        fragments.append([owned.name, owned.start, owned.tensors["master"].numel()])
        for kind, tensor in owned.tensors.items():
            tensors[f"{kind}/{owned.name}/{owned.start}"] = tensor.cpu()
    save_file(tensors, path)
    _sync_file(path)
    entry = {"sha256": file_sha256(path), "bytes": path.stat().st_size, "fragments": fragments}
    _write_synced(path.with_suffix(".json"), json.dumps(entry))


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    for entry in _entries(folder):
        files[entry.with_suffix(".safetensors").name] = json.loads(entry.read_text(encoding="utf-8"))
        entry.unlink()
    _write_synced(folder / "manifest.json", json.dumps({**facts, "files": files}, indent=1))
    _sync_folder(folder)


def _entries(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("rank-*.json"))


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
