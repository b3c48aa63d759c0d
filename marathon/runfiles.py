"""The files of a run, read for show: what is there is taken, what is missing or torn is passed over.

A run may be in progress, have been killed in mid-line, or come from a machine where only some of its files
were copied; reading never fails for it. Lines of a course that was given up at a restart are left out: a line
for an earlier step than the last one takes the place of all that came after it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import load
from configs.errors import UserError
from configs.schema import RunConfig
from ledger.record import Ledger, gap
from marathon.numerals import as_number

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
        return [record for record in self.ledger if record.get("event") == name]

    def last(self, name: str) -> Record:
        """The newest ledger record of one event; empty where there is none."""
        return (self.events(name) or [{}])[-1]

    def fact(self, key: str, *names: str) -> Any:
        """The newest value recorded under `key` by one of these events, or None."""
        for record in reversed(self.ledger):
            if record.get("event") in names and key in record:
                return record[key]
        return None

    @property
    def languages(self) -> list[str]:
        """Every language that any file names, sorted."""
        found: set[str] = set(self.config.corpus.languages) if self.config else set()
        for record in self.valid:
            found |= mapping(record, "bpb").keys() | mapping(record, "consumed").keys()
        for record in self.evaluations:
            found |= mapping(record, "bpb").keys()
        return sorted(found | {row["language"] for row in self.mixture})

    @property
    def mixture(self) -> list[Record]:
        """Rows of the newest planned mixture that name their language."""
        rows = self.last("mixture").get("rows")
        rows = rows if isinstance(rows, list) else []
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("language"), str)]


def read_run(run_dir: Path) -> RunFiles:
    """Reads a run's folder; raises `UserError` where there is no such folder."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder", "a report is made of a run's folder", "give SCRATCH/runs/NAME")
    config, config_gap = None, gap("config.yaml is not there")
    if (run_dir / "config.yaml").is_file():
        try:
            config = load(run_dir / "config.yaml")
        except UserError as error:
            config_gap = gap(f"config.yaml does not fit this version: {error.found}")
    metrics = _without_given_up(_json_lines(run_dir / "metrics.jsonl"))
    return RunFiles(
        run_dir=run_dir,
        config=config,
        config_gap=config_gap,
        train=[record for record in metrics if record["kind"] == "train"],
        valid=[record for record in metrics if record["kind"] == "valid"],
        evaluations=sorted(_evaluations(run_dir / "eval"), key=lambda record: as_number(record.get("step")) or 0),
        ledger=[record for record in Ledger(run_dir).read() if isinstance(record, dict)],
    )


def number(record: Record, key: str) -> float | None:
    """A number of a record; None where it has none under this key, NaN where it was written as null."""
    # JSON has no NaN: the trainer writes null for a number that was not finite.
    return math.nan if record.get(key, "") is None else as_number(record.get(key))


def mapping(record: Record, key: str) -> Record:
    """A nested record with its keys as text; empty where there is none under this key."""
    value = record.get(key)
    return {str(name): inner for name, inner in value.items()} if isinstance(value, dict) else {}


def _json_lines(path: Path) -> Iterator[Record]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _without_given_up(records: Iterator[Record]) -> list[Record]:
    """Metric lines by step, without those that a restart from an earlier step has made void."""
    kept: dict[tuple[int, str], Record] = {}
    for record in records:
        step, kind = record.get("step"), record.get("kind")
        if not isinstance(step, int) or kind not in ("train", "valid"):
            continue
        while kept and next(reversed(kept))[0] > step:
            kept.popitem()
        kept[step, kind] = record
    return list(kept.values())


def _evaluations(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue
        if isinstance(record, dict):
            yield record
