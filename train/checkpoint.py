"""Checkpoints: complete under their name, or not there. Their format is told in model/weights.py, which reads it.

Every rank writes its own fragments, hashed while they are written and forced to disk; the manifest comes last, and
then the folder is renamed. Whatever moment a job is killed at, the newest folder named `step-…` is whole.

The loop stands still for the copy to host memory. Each rank then writes its file in a thread; with every step the ranks
tell each other how many are still writing and how many have failed, and once nobody writes any more the first rank's
thread commits. All ranks see the same numbers, so they agree on it without a collective of its own.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from data.files import write_whole
from ledger.record import Ledger
from model import weights
from model.weights import MASTER, RANDOM, FragmentReader, rank_file, read_manifest
from train.dist import Rank
from train.engine import Engine
from train.progress import Progress
from train.retention import remove, remove_old

FORMAT = 3
WAIT_FOR_ENTRIES_S = 60  # for the small files of other nodes to be seen here: network file systems may show them late
PAUSES_S = (1.0, 5.0)  # between attempts to write a file; a file system that hiccups is given so many more chances
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.uint8: "U8"}


class Snapshot(NamedTuple):
    """What one rank writes: copies on the host, which the training does not touch."""

    tensors: dict[str, Tensor]  # by key, in the order of the file; contiguous, on the CPU
    fragments: list[tuple[str, int, int]]  # name, first index and length of each fragment


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
    """Makes a checkpoint of what all ranks have written, with the progress of that moment and further facts."""
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
        folder = writing_folder(self.run_dir, progress.step)
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
        """Returns when no checkpoint is under way; raises `UserError` where it could not be written; collective."""
        failure = self.wait()

        def refuse() -> None:
            if failure:
                found = f"a checkpoint cannot be written: {failure}"
                rule = "a run ends only with its last state on disk; the checkpoints before it are whole"
                repair = f"make room, or mend the file system, at {self.run_dir / 'checkpoints'}, then start again"
                raise UserError(found, rule, repair)

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
        path = commit(self.run_dir, self._progress.to_json(), self.facts, self.rank.world_size)
        remove_old(self.run_dir, self._progress.step, *self.keep)
        return path

    def _tell_failure(self, error: str) -> None:
        step = self._progress.step
        shutil.rmtree(writing_folder(self.run_dir, step), ignore_errors=True)
        print(f"the checkpoint of step {step} could not be written: {error}", file=sys.stderr, flush=True)
        with suppress(OSError):  # a full disk has no room for the ledger either
            Ledger(self.run_dir).append("checkpoint_failed", step=step, error=error)

    def _collect_commit(self, wait: bool) -> BaseException | None:
        """Tells of a checkpoint that has got its name, or has not; only the first rank ever has one."""
        if self._commit is None or not (wait or self._commit.done()):
            return None
        done, self._commit = self._commit, None
        if failure := done.exception():
            self._tell_failure(str(failure))
            return failure
        path, progress = done.result(), self._progress
        written_s = time.monotonic() - self._began_s
        self.slowest_s = max(self.slowest_s, written_s)
        Ledger(self.run_dir).append(
            "checkpoint",
            name=path.name,
            step=progress.step,
            tokens=progress.tokens,
            sha256=weights.checkpoint_sha256(path),
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
            write_part(folder, rank, snapshot)
            return
        except OSError as error:
            print(f"[rank {rank}] {error}: trying again in {pause_s:g} s", file=sys.stderr, flush=True)
            time.sleep(pause_s)
    write_part(folder, rank, snapshot)


def remove_unfinished(run_dir: Path) -> None:
    """Removes what killed jobs have left half-written or half-removed."""
    for pattern in (".writing-*", ".removing-*"):
        for folder in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def newest_usable(run_dir: Path, rank: Rank) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is what its manifest says, and why newer ones are not; each rank reads a share."""
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


def adopt(source: Path, run_dir: Path) -> None:
    """Makes another run's checkpoint one of this run too: files linked, or copied from another file system."""
    beside = run_dir / "checkpoints" / f".writing-{source.name}"
    beside.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, beside / file.name)
        except OSError:
            shutil.copyfile(file, beside / file.name)
            _sync(beside / file.name)
    _sync(beside)
    beside.rename(beside.with_name(source.name))
    _sync(beside.parent)


def require_identity(checkpoint: Path, identity: dict[str, Any], earlier_corpora: Collection[str] = ()) -> None:
    """Raises `UserError` where a run is another than the checkpoint's; its corpus may have lost documents since."""
    manifest = read_manifest(checkpoint)
    if manifest.get("format") != FORMAT:
        found = f"{checkpoint.name} has format {manifest.get('format')}"
        rule = f"this version of Marathon reads format {FORMAT}"
        repair = "go on with the version that wrote it, which the ledger names, or begin a new run with name=…"
        raise UserError(found, rule, repair)
    for key, now in identity.items():
        then = manifest[key]
        if then != now and not (key == "corpus_hash" and then in earlier_corpora):
            found = f"{key} is {now}, the checkpoint {checkpoint.name} was trained with {then}"
            rule = "a run keeps corpus, tokenizer, sequence length and seed: they make its order of samples"
            raise UserError(found, rule, "name=… begins a new run; or put back what has changed since")


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
