"""Reads checkpoints: what evaluation and release need of them, without the trainer.

A checkpoint is a folder `step-000000120` that stands complete under its name or not at all:

    manifest.json             step, tokens, and for every file its sha256 and the fragments it holds
    rank-00000.safetensors    1-D fp32 fragments `master/NAME/START`, `exp_avg/…`, `exp_avg_sq/…`

A fragment is a range of a flattened parameter, addressed by the parameter's name and the first index: files
depend on how many ranks wrote them, reading does not.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from configs.errors import UserError
from configs.schema import RunConfig
from model.decoder import Decoder

PREFIX = "step-"
MASTER = "master"
"""Kind of the fragments that hold the weights in fp32."""


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, by step."""
    return sorted(p.parent for p in (run_dir / "checkpoints").glob(f"{PREFIX}*/manifest.json"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def checkpoint_sha256(checkpoint: Path) -> str:
    """Hash of the manifest, and through it of every file."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def verify_files(checkpoint: Path) -> None:
    """Raises `UserError` naming the first file that is missing or not what the manifest says."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(checkpoint / "manifest.json", f"cannot be read ({error})") from None
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(path, "is missing")
        if (found := file_sha256(path)) != expected["sha256"]:
            raise _damaged(path, f"has sha256 {found[:16]}…, the manifest says {expected['sha256'][:16]}…")


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Fragment:
    """Where elements [start, start + numel) of a flattened parameter stand."""

    start: int
    numel: int
    file: str


class FragmentReader:
    """Reads any range of any parameter from a checkpoint, whoever wrote it."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.fragments: dict[str, list[Fragment]] = {}
        for file, entry in read_manifest(checkpoint)["files"].items():
            for name, start, numel in entry["fragments"]:
                self.fragments.setdefault(name, []).append(Fragment(start, numel, file))
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of parameter `name`, fp32, on the CPU.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        out = torch.empty(numel, dtype=torch.float32)
        n_filled = 0
        for fragment in self.fragments.get(name, []):
            first = max(start, fragment.start)
            last = min(start + numel, fragment.start + fragment.numel)
            if first < last:
                stored = self._file(fragment.file).get_slice(f"{kind}/{name}/{fragment.start}")
                out[first - start : last - start] = stored[first - fragment.start : last - fragment.start]
                n_filled += last - first
        if n_filled != numel:
            raise _damaged(self.checkpoint, f"holds {n_filled} of {numel} elements asked for of {kind} {name}")
        return out

    def read_into(self, decoder: Decoder) -> None:
        """Fills every parameter of a decoder, rounded to its dtype."""
        for name, parameter in decoder.named_parameters():
            flat = self.read(MASTER, name, 0, math.prod(parameter.shape))
            parameter.data.copy_(flat.view(parameter.shape))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.checkpoint / name, framework="pt")
        return self._open[name]


def load_decoder(checkpoint: Path, cfg: RunConfig) -> tuple[Decoder, str]:
    """The network of a checkpoint in fp32 on the CPU, in evaluation mode, and the checkpoint's sha256."""
    vocab_rows = read_manifest(checkpoint)["vocab_rows"]
    with torch.device("meta"):
        decoder = Decoder(cfg.model, vocab_rows)
    decoder.to_empty(device="cpu")
    FragmentReader(checkpoint).read_into(decoder)
    return decoder.eval(), checkpoint_sha256(checkpoint)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} {what}",
        "a checkpoint is used only whole and unchanged",
        "remove this checkpoint's folder; the run goes on from the one before it",
    )
