"""Results on disk: RUN/eval/CHECKPOINT.json, one file a checkpoint, complete or absent.

A result belongs to an identity: these weights, this suite, these held-out documents. While all three are the
same it is not computed again.
"""

import hashlib
import json
import os
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

IDENTITY = ("model_sha256", "suite_hash", "corpus_hash")
"""What a result is a function of, up to rounding."""
MEANS = ("acc", "acc_bytes", "gold_bpb", "chance")
"""Figures of a task that are averaged over the languages of its family."""


def result_path(run_dir: Path, checkpoint: str) -> Path:
    """Where the result of a checkpoint stands."""
    return run_dir / "eval" / f"{checkpoint}.json"


def read_result(path: Path, **identity: str) -> dict[str, Any] | None:
    """The result in a file; None where there is none, or one of another identity (keywords are of `IDENTITY`)."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if identity.items() <= result.items() else None


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """All results of a run, by step."""
    found = [read_result(path) for path in (run_dir / "eval").glob("*.json")]
    return sorted((result for result in found if result), key=lambda result: result["step"])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Puts a result in its place, whole and on disk; one of another identity there is kept, under eval/earlier."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if earlier := read_result(path):
        named = " ".join(str(earlier.get(name)) for name in IDENTITY)
        kept = path.parent / "earlier" / f"{path.stem}-{hashlib.sha256(named.encode()).hexdigest()[:8]}.json"
        kept.parent.mkdir(exist_ok=True)
        os.replace(path, kept)
    os.replace(beside, path)


def family_means(tasks: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figures of each family, the plain mean over its languages, and their number."""
    means = {}
    for family, names in groupby(sorted(tasks), key=lambda task: task.split("_")[0]):
        of_family = [tasks[name] for name in names]
        means[family] = {key: fmean(task[key] for task in of_family) for key in MEANS} | {"languages": len(of_family)}
    return means
