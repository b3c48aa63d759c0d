"""Results on disk: RUN/eval/CHECKPOINT.json, one file a checkpoint, complete or absent."""

import hashlib
import json
import os
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

MEANS = ("acc", "acc_bytes", "gold_bpb", "chance")  # of a task, averaged over the languages of its family


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """All results of a run, by step."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / "eval").glob("*.json")]
    return sorted(found, key=lambda result: result["step"])


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Puts a result in its place, whole and on disk; another one there is kept, under eval/earlier."""
    path = run_dir / "eval" / (result["checkpoint"] + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        kept = path.parent / "earlier" / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.json"
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
