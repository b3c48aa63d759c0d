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
from data.files import write_whole
from model import weights
from model.weights import MASTER, RANDOM, FragmentReader, rank_file, read_manifest
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
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def copy(self, engine: Engine) -> Snapshot:
        """This rank's fragments and random states as they are now."""
        tensors, fragments, on_device = {}, [], self.device.type == "cuda"
        for owned in engine.fragments():
            fragments.append((owned.name, owned.start, owned.tensors[MASTER].numel()))
            for kind, tensor in owned.tensors.items():
                key = f"{kind}/{owned.name}/{owned.start}"
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
                tensors[key] = self._buffers[key].copy_(tensor, non_blocking=True)
        tensors[f"{RANDOM}/cpu"] = torch.get_rng_state()
        if on_device:
            torch.cuda.synchronize(self.device)
            tensors[f"{RANDOM}/cuda"] = torch.cuda.get_rng_state(self.device)
        return Snapshot(tensors, fragments)


def writing_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it has its name."""
    return run_dir / "checkpoints" / f".writing-{weights.PREFIX}{step:09d}"


def write_part(folder: Path, rank: int, snapshot: Snapshot) -> None:
    """Writes one rank's file, and beside it the entry that the manifest takes over."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_file(rank)
    sha256, n_bytes = _write_safetensors(path, snapshot.tensors)
    entry = {"sha256": sha256, "bytes": n_bytes, "fragments": snapshot.fragments}
    write_whole(path.with_suffix(".json"), json.dumps(entry))


def commit(run_dir: Path, progress: dict[str, Any], facts: dict[str, Any], world_size: int) -> Path:
    """Makes a checkpoint of what all ranks have written; returns its folder.

    `progress` is of the moment of the snapshot, as `Progress.to_json` gives it; `facts` are what the checkpoint belongs
    to (corpus hash, sequence length, rows of the vocabulary, …).
    """
    folder = writing_folder(run_dir, progress["step"])
    entries = {rank_file(rank): (folder / rank_file(rank)).with_suffix(".json") for rank in range(world_size)}
    files = {name: json.loads(_once_seen(entry).read_text(encoding="utf-8")) for name, entry in entries.items()}
    found = {"format": FORMAT, "world_size": world_size, "progress": progress, **facts, "files": files}
    manifest = json.dumps(found, indent=1).encode()
    for name, content in ((weights.MANIFEST, manifest), (weights.MANIFEST_SHA256, weights.manifest_sha256(manifest))):
        (folder / name).write_bytes(content)
        _sync(folder / name)
    for entry in entries.values():
        entry.unlink()
    _sync(folder)
    final = folder.with_name(folder.name.removeprefix(".writing-"))
    if final.exists():  # not whole, or it would have been gone on from
        remove(final)
    folder.rename(final)
    _sync(final.parent)
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
    for name in reversed(rank.tell([path.name for path in weights.list_checkpoints(run_dir)])):
        checkpoint, complaint = run_dir / "checkpoints" / name, ""
        try:
            weights.verify_files(checkpoint, rank.rank, rank.world_size)
        except UserError as error:
            complaint = str(error)
        found = sorted(filter(None, rank.gather(complaint)))
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
        if then != now and not (key == "corpus_hash" and then in earlier_corpora):
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


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Writes a file in the format of safetensors; returns its sha256 and its bytes.

    The library would make a second copy of everything and could be hashed only by reading it again. The format:
    uint64 length of the header, the header as JSON padded with spaces to a multiple of 8, the bytes of the tensors.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = _SAFETENSORS_TYPES[tensor.dtype]
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        before = len(text).to_bytes(8, "little") + text
        for whole in (memoryview(before), *(memoryview(t.numpy().data).cast("B") for t in tensors.values())):
            sha256.update(whole)
            while whole:
                whole = whole[file.write(whole) :]
        os.fsync(file.fileno())
        return sha256.hexdigest(), file.tell()


def _once_seen(path: Path) -> Path:
    deadline = time.monotonic() + WAIT_FOR_ENTRIES_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{path} does not appear, though its rank has written it")
        time.sleep(0.05)
    return path


def _sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
