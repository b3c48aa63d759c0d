"""Reads checkpoints: what evaluation and release need of them, without the trainer.

A checkpoint is a folder `step-000000120` that stands complete under its name or not at all:

    manifest.json             progress, and for every file its sha256 and the fragments it holds
    manifest.sha256           hashes of the manifest and of all files, as `sha256sum -c` reads them
    rank-00000.safetensors    1-D fp32 fragments `master/NAME/START`, `exp_avg/…` and other moments; random states

A fragment is a range of a flattened parameter, or of some columns of it (`Columns`), addressed by name and first index:
files depend on how many ranks wrote them and how, reading does not. Moments are exp_avg and exp_avg_sq; exp_avg_slow
besides with AdEMAMix; exp_avg alone for the matrices that Muon steps. Nothing here can hold code: JSON and safetensors.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from configs.errors import UserError
from configs.schema import RunConfig
from model.decoder import Decoder

PREFIX = "step-"
MANIFEST, MANIFEST_SHA256 = "manifest.json", "manifest.sha256"
MASTER, RANDOM = "master", "random"
"""Kinds of tensors: fragments of the weights in fp32, and states of random generators."""


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by step; whether one is whole, `verify_files` says."""
    names = (run_dir / "checkpoints").glob(PREFIX + 9 * "[0-9]")  # somebody's copy beside them is none
    return sorted(path for path in names if path.is_dir())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises `UserError` where it is missing, or not what was written."""
    content: bytes = _read(checkpoint / MANIFEST, Path.read_bytes)
    expected = _read(checkpoint / MANIFEST_SHA256, Path.read_bytes)
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # of what is no manifest at all
        if manifest_sha256(content) == expected:
            manifest: dict[str, Any] = json.loads(content)
            return manifest
    raise _damaged(checkpoint / MANIFEST, f"is not what {MANIFEST_SHA256} says")


def manifest_sha256(content: bytes) -> bytes:
    """What stands beside a manifest of this content: its hash and those of its files, as `sha256sum -c` reads them."""
    hashes = {MANIFEST: hashlib.sha256(content).hexdigest()}
    hashes |= {name: entry["sha256"] for name, entry in json.loads(content)["files"].items()}
    return "".join(f"{sha256}  {name}\n" for name, sha256 in hashes.items()).encode()


def checkpoint_sha256(checkpoint: Path) -> str:
    """Hash of the manifest, and through it of every file."""
    return file_sha256(checkpoint / MANIFEST)


def verify_files(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Raises `UserError` for the first file, of one `part` of them, that is missing or not what the manifest says."""
    files = read_manifest(checkpoint)["files"]
    for name in sorted(files)[part::parts]:
        expected, found = files[name]["sha256"], _read(checkpoint / name, file_sha256)
        if found != expected:
            raise _damaged(checkpoint / name, f"has sha256 {found[:16]}…, the manifest says {expected[:16]}…")


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Columns(NamedTuple):
    """Some columns of a matrix, which flattened are a parameter of their own; as text, NAME@FIRST:END/ALL."""

    name: str
    first: int
    end: int
    all: int

    def __str__(self) -> str:
        return f"{self.name}@{self.first}:{self.end}/{self.all}"

    @classmethod
    def parse(cls, text: str) -> "Columns | None":
        """From the name of a fragment; None where it is one of whole rows."""
        found = re.fullmatch(r"(.+)@(\d+):(\d+)/(\d+)", text)
        return found and cls(found[1], *map(int, found.groups()[1:]))

    def of(self, flat: Tensor) -> Tensor:
        """These columns of a flattened matrix, flattened."""
        return flat.view(-1, self.all)[:, self.first : self.end].flatten()


class FragmentReader:
    """Reads any range of any parameter from a checkpoint, whoever wrote it."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.files = checkpoint, read_manifest(checkpoint)["files"]
        self._fragments: dict[str, list[tuple[str, int, int]]] = {}
        for file, entry in self.files.items():
            for name, start, numel in entry["fragments"]:
                self._fragments.setdefault(name, []).append((file, start, start + numel))
        parsed = filter(None, map(Columns.parse, self._fragments))
        self._by_columns = {name: list(parts) for name, parts in groupby(sorted(parsed), attrgetter("name"))}
        self._file: Callable[[str], Any] = functools.cache(lambda name: safe_open(checkpoint / name, framework="pt"))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a parameter, or of columns of one, fp32, on the CPU.

        Raises `UserError` where some are missing.
        """
        if name not in self._fragments and (wanted := Columns.parse(name)):
            width = wanted.end - wanted.first
            first, end = start // width, -(-(start + numel) // width)
            rows = self.read(kind, wanted.name, first * wanted.all, (end - first) * wanted.all)
            return wanted.of(rows)[start - first * width :][:numel]
        if parts := self._by_columns.get(name):
            first, end = start // parts[0].all, -(-(start + numel) // parts[0].all)
            out = torch.empty(end - first, parts[0].all)
            for part in parts:
                width = part.end - part.first
                stored = self.read(kind, str(part), first * width, (end - first) * width)
                out[:, part.first : part.end] = stored.view(-1, width)
            return out.flatten()[start - first * parts[0].all :][:numel]
        out, n_filled = torch.empty(numel, dtype=torch.float32), 0
        for file, begin, end in self._fragments.get(name, []):
            first, last = max(start, begin), min(start + numel, end)
            if first < last:
                stored = self._file(file).get_slice(f"{kind}/{name}/{begin}")
                out[first - start : last - start] = stored[first - begin : last - begin]
                n_filled += last - first
        if n_filled != numel:
            raise _damaged(self.checkpoint, f"holds {n_filled} of {numel} elements asked for of {kind} {name}")
        return out

    def read_into(self, decoder: Decoder) -> None:
        """Fills every parameter of a decoder, rounded to its dtype."""
        for name, parameter in decoder.named_parameters():
            parameter.data.copy_(self.read(MASTER, name, 0, parameter.numel()).view(parameter.shape))

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """State of each random generator of a rank, by device; none where fewer ranks wrote the checkpoint."""
        if rank_file(rank) not in self.files:
            return {}
        stored, prefix = self._file(rank_file(rank)), f"{RANDOM}/"
        keys = [key for key in stored.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {key.removeprefix(prefix): stored.get_tensor(key) for key in keys}


def load_decoder(checkpoint: Path, cfg: RunConfig) -> tuple[Decoder, str]:
    """The network of a checkpoint in fp32 on the CPU, in evaluation mode, and the checkpoint's sha256."""
    decoder = Decoder(cfg.model, read_manifest(checkpoint)["vocab_rows"])
    FragmentReader(checkpoint).read_into(decoder)
    return decoder.eval(), checkpoint_sha256(checkpoint)


def _read(path: Path, content_of: Callable[[Path], Any]) -> Any:
    """A disk that fails is one more way of not being whole: there may be a checkpoint before it."""
    try:
        return content_of(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _damaged(path: Path, what: str) -> UserError:
    found, rule = f"{path} {what}", "a checkpoint is used only whole and unchanged"
    return UserError(found, rule, "remove this checkpoint's folder and go on from the one before it")
