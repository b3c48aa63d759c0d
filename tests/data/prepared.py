"""Preparing small corpora, here and in other processes, and what then stands where."""

import copy
import os
import subprocess
import sys
from pathlib import Path

from configs.compose import freeze
from configs.schema import RunConfig
from data.documents import Documents
from data.files import sha256
from data.manifest import Manifest, verify
from data.pipeline import corpus_dir, prepare
from data.shards import read_sidecar

PREPARE = """
import fcntl, sys
from pathlib import Path
from configs.compose import load
from data.pipeline import prepare

def refuse(*_):
    raise OSError(38, "Function not implemented")

if len(sys.argv) > 2:
    fcntl.flock = refuse
prepare(load(Path(sys.argv[1])))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def documents(n: int, lang: str = "de") -> list[object]:
    return [{"id": f"{lang}/{i}", "lang": lang, "text": f"Dokument Nummer {i} über Äpfel."} for i in range(n)]


def elsewhere(cfg: RunConfig, scratch: Path) -> RunConfig:
    cfg = copy.deepcopy(cfg)
    cfg.cluster.scratch = str(scratch)
    return cfg


def start(cfg: RunConfig, *options: str) -> subprocess.Popen[str]:
    """`prepare` in a process group of its own."""
    path = Path(cfg.cluster.scratch).with_suffix(".yaml")
    freeze(cfg, path)
    command = [sys.executable, "-c", PREPARE, str(path), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def hashes(folder: Path) -> dict[str, str]:
    """Of all files below, hidden ones too."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def marks_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))  # which does not mind what vanishes


def documents_dir(cfg: RunConfig) -> Path:
    return Documents(cfg).store.folder


def ids_of(folder: Path, source: str = "*", split: str = "*") -> list[str]:
    return sorted(
        doc_id
        for path in (folder / "shards").glob(f"*.{source}.{split}.*.idx")
        for (doc_id,) in read_sidecar(path.with_suffix(""), "id")
    )


def outcome(cfg: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of all files of the documents and the corpus, which has to be complete."""
    verify(corpus_dir(cfg))
    return hashes(documents_dir(cfg)), hashes(corpus_dir(cfg))


def prepared(cfg: RunConfig) -> Manifest:
    """What `prepare` makes of it."""
    folder = prepare(cfg)
    assert folder is not None
    return Manifest.load(folder)
