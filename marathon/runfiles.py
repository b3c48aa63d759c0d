"""The files of a run, read for show: a run may be in progress, or only some of its files may have been copied.

A line torn by a kill is passed over. Lines of a course that was given up at a restart are left out: a line for
an earlier step than the last one takes the place of all that came after it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import load
from configs.errors import UserError
from configs.schema import RunConfig
from ledger.record import Ledger

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What the folder of one run says."""

    run_dir: Path
    config: RunConfig | None
    config_gap: str
    """Why there is no config, where there is none."""
    train: list[Record]
    """Training lines of metrics.jsonl by step."""
    valid: list[Record]
    """Validation lines of metrics.jsonl by step."""
    evaluations: list[Record]
    """Contents of eval/*.json by step."""
    ledger: list[Record]
    """All records in the order they were written."""

    def events(self, name: str) -> list[Record]:
        """Ledger records of one event."""
        return [record for record in self.ledger if record["event"] == name]

    def last(self, name: str) -> Record:
        """The newest ledger record of one event; empty where there is none."""
        return (self.events(name) or [{}])[-1]

    def fact(self, key: str) -> Any:
        """The newest value that the ledger has under `key`, or None."""
        return next((record[key] for record in reversed(self.ledger) if key in record), None)

    @property
    def planned(self) -> dict[str, Record]:
        """Rows of the newest planned mixture by language."""
        return {row["language"]: row for row in self.last("mixture").get("rows", [])}

    @property
    def languages(self) -> list[str]:
        """Every language that any file names, sorted."""
        found = set(self.config.corpus.languages if self.config else ()) | self.planned.keys()
        return sorted(found.union(*(record["bpb"] for record in (*self.valid, *self.evaluations))))


def read_run(run_dir: Path) -> RunFiles:
    """Reads a run's folder; raises `UserError` where there is no such folder."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder", "a report is made of a run's folder", "give SCRATCH/runs/NAME")
    config, config_gap = None, "config.yaml is not there"
    if (run_dir / "config.yaml").is_file():
        try:
            config = load(run_dir / "config.yaml")
        except UserError as error:
            config_gap = f"config.yaml does not fit this version: {error.found}"
    metrics = _metrics(run_dir / "metrics.jsonl")
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / "eval").glob("*.json")]
    return RunFiles(
        run_dir=run_dir,
        config=config,
        config_gap=config_gap,
        train=[record for record in metrics if record["kind"] == "train"],
        valid=[record for record in metrics if record["kind"] == "valid"],
        evaluations=sorted(evaluations, key=lambda record: record["step"]),
        ledger=list(Ledger(run_dir).read()),
    )


def number(record: Record, key: str) -> float | None:
    """A number of a record; None where it has none under this key, NaN where it was written as null."""
    # JSON has no NaN: the trainer writes null for a number that was not finite.
    value = record.get(key, "")
    return math.nan if value is None else value if isinstance(value, int | float) else None


def _metrics(path: Path) -> list[Record]:
    """Metric lines by step, without those that a restart from an earlier step has made void."""
    kept: dict[tuple[int, str], Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        while kept and next(reversed(kept))[0] > record["step"]:
            kept.popitem()
        kept[record["step"], record["kind"]] = record
    return list(kept.values())
