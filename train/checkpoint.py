"""Checkpoints: complete under their name, or not there.

Every rank writes its own fragments, hashed while they are written and forced to disk; the manifest comes last, and
then the folder is renamed. Whatever moment a job is killed at, the newest folder named `step-…` is whole. The
format is told in model/weights.py, which reads it; when these functions are called, in train/saving.py.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from model.weights import (
    MANIFEST,
    MANIFEST_SHA256,
    MASTER,
    PREFIX,
    RANDOM,
    FragmentReader,
    list_checkpoints,
    manifest_sha256,
    rank_file,
    read_manifest,
    verify_files,
)
from train.dist import Rank
from train.engine import Engine
from train.progress import Progress
from train.retention import remove

FORMAT = 3
WAIT_FOR_ENTRIES_S = 60
"""For the small files of other nodes to be seen here: network file systems may show them late."""
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes: copies on the host, which the training does not touch."""

    tensors: dict[str, Tensor]
    """By key, in the order of the file; contiguous, on the CPU."""
    fragments: list[tuple[str, int, int]]
    """Name, first index and length of each fragment."""


class Staging:
    """Host memory for one snapshot, taken once: a copy into it is what stops the loop, and nothing else.

    Fresh memory for each snapshot would cost more than the copy, page by page.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def copy(self, engine: Engine) -> Snapshot:
        """This rank's fragments and random states as they are now."""
        tensors: dict[str, Tensor] = {}
        fragments = []
        for owned in engine.fragments():
            fragments.append((owned.name, owned.start, owned.tensors[MASTER].numel()))
            for kind, tensor in owned.tensors.items():
                key = f"{kind}/{owned.name}/{owned.start}"
                tensors[key] = self._buffer(key, tensor).copy_(tensor, non_blocking=True)
        if self.on_device:
            torch.cuda.synchronize(self.device)
        random = {f"{RANDOM}/{name}": state for name, state in random_states(self.device).items()}
        return Snapshot(tensors | random, fragments)

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=self.on_device)
        return self._buffers[key]


def writing_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    return run_dir / "checkpoints" / f".writing-{PREFIX}{step:09d}"


def write_part(folder: Path, rank: int, snapshot: Snapshot) -> None:
    """Writes one rank's file, and beside it the entry that the manifest takes over."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(rank)
    sha256, n_bytes = _write_safetensors(path, snapshot.tensors)
    entry = {"sha256": sha256, "bytes": n_bytes, "fragments": snapshot.fragments}
    beside = path.with_suffix(".tmp")
    _write_synced(beside, json.dumps(entry))
    beside.rename(path.with_suffix(".json"))


def commit(run_dir: Path, progress: dict[str, Any], facts: dict[str, Any], world_size: int) -> Path:
    """Makes a checkpoint of what all ranks have written; returns its folder.

    Args:
        run_dir: Folder of the run.
        progress: Of the moment of the snapshot, as `Progress.to_json` gives it.
        facts: What the checkpoint belongs to (corpus hash, sequence length, rows of the vocabulary, …).
        world_size: Number of ranks.
    """
    folder = writing_folder(run_dir, progress["step"])
    files = {}
    for rank in range(world_size):
        entry = (folder / rank_file(rank)).with_suffix(".json")
        _wait_for(entry)
        files[rank_file(rank)] = json.loads(entry.read_text(encoding="utf-8"))
    manifest = json.dumps(
        {"format": FORMAT, "world_size": world_size, "progress": progress, **facts, "files": files}, indent=1
    )
    _write_synced(folder / MANIFEST, manifest)
    _write_synced(folder / MANIFEST_SHA256, manifest_sha256(manifest.encode()).decode())
    for rank in range(world_size):
        (folder / rank_file(rank)).with_suffix(".json").unlink()
    _sync_folder(folder)
    final = folder.with_name(folder.name.removeprefix(".writing-"))
    if final.exists():  # not whole, or it would have been gone on from
        remove(final)
    folder.rename(final)
    _sync_folder(final.parent)
    return final


def remove_unfinished(run_dir: Path) -> None:
    """Removes what killed jobs have left half-written or half-removed."""
    for pattern in (".writing-*", ".removing-*"):
        for folder in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def newest_usable(run_dir: Path, rank: Rank) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones are not used; collective.

    Each rank hashes a share of the files.
    """
    complaints: list[str] = []
    for name in reversed(rank.tell([path.name for path in list_checkpoints(run_dir)])):
        checkpoint = run_dir / "checkpoints" / name
        try:
            verify_files(checkpoint, rank.rank, rank.world_size)
            complaint = ""
        except UserError as error:
            complaint = str(error)
        found = sorted(set(rank.gather(complaint)) - {""})
        if not found:
            return checkpoint, complaints
        complaints.append(found[0])
    return None, complaints


def require_identity(checkpoint: Path, identity: dict[str, Any], earlier_corpora: Collection[str] = ()) -> None:
    """Raises `UserError` where the checkpoint was trained on another corpus, sequence length or seed.

    `earlier_corpora` are hashes that this corpus had before documents were taken out of it.
    """
    manifest = read_manifest(checkpoint)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint.name} has format {manifest.get('format')}",
            f"this version of Marathon reads format {FORMAT}",
            "go on with the version that wrote it, which the ledger names, or begin a new run with name=…",
        )
    for key, now in identity.items():
        then = manifest[key]
        if key == "corpus_hash" and then in earlier_corpora:
            continue
        if then != now:
            raise UserError(
                f"{key} is {now}, the checkpoint {checkpoint.name} was trained with {then}",
                "a run keeps corpus, tokenizer, sequence length and seed: they make its order of samples",
                "name=… begins a new run; or put back what has changed since",
            )


def restore(checkpoint: Path, engine: Engine, rank: Rank, seed: int) -> Progress:
    """Fills weights, moments and random states and returns the progress; each rank reads what it holds."""
    progress, reader = Progress.from_json(read_manifest(checkpoint)["progress"]), FragmentReader(checkpoint)
    engine.fill(reader, progress.updates)
    seed_random(seed + progress.step, rank)
    for name, state in reader.random_states(rank.rank).items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif rank.device.type == name:
            torch.cuda.set_rng_state(state, rank.device)
    return progress


def seed_random(seed: int, rank: Rank) -> None:
    """Random numbers of this rank's own: at the first start, and where a checkpoint was written by fewer ranks."""
    torch.manual_seed(seed * 2**20 + rank.rank)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """State of each generator that PyTorch draws from here, by device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[device.type] = torch.cuda.get_rng_state(device)
    return states


def _sync_folder(path: Path) -> None:
    """Forces the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Writes a file in the format of safetensors; returns its sha256 and its bytes.

    The library would make a second copy of everything and could be hashed only by reading it again. The format:
    uint64 length of the header, the header as JSON padded with spaces to a multiple of 8, the bytes of the tensors.
    """
    header, n_bytes = {}, 0
    for key, tensor in tensors.items():
        end = n_bytes + tensor.nbytes
        header[key] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [n_bytes, end],
        }
        n_bytes = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        start = len(text).to_bytes(8, "little") + text
        for whole in (memoryview(start), *(memoryview(t.numpy().data).cast("B") for t in tensors.values())):
            sha256.update(whole)
            while whole:
                whole = whole[file.write(whole) :]
        os.fsync(file.fileno())
        return sha256.hexdigest(), file.tell()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_FOR_ENTRIES_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{path} does not appear, though its rank has written it")
        time.sleep(0.05)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
