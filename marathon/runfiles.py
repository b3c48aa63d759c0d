"""The files of a run, read for show: a run may be in progress, or only some of its files may have been copied.

A line torn by a kill is passed over. Lines of a course that was given up at a restart are left out: a line for
an earlier step than the last one takes the place of all that came after it.
"""

import math
from pathlib import Path
from typing import Any

from configs.compose import load
from configs.errors import UserError
from configs.schema import RunConfig
from eval.results import read_results
from ledger.record import Ledger, json_lines
from marathon.choices import run_names

Record = dict[str, Any]


class RunFiles:
    """What the folder of one run says; raises `UserError` where there is no such folder."""

    def __init__(self, run_dir: Path) -> None:
        if not run_dir.is_dir():
            there = ", ".join(run_names(run_dir.parent)) or "none"
            found = f"{run_dir} is no folder; runs there: {there}"
            raise UserError(found, "a report is made of a run", "give its name or its folder")
        self.config, self.config_gap = _config(run_dir / "config.yaml")
        """Of the two one: the reason why there is no config, or the config."""
        self.name = self.config.name if self.config else run_dir.resolve().name
        metrics = _metrics(run_dir / "metrics.jsonl")
        self.train = [record for record in metrics if record["kind"] == "train"]
        self.valid = [record for record in metrics if record["kind"] == "valid"]
        self.evaluations = read_results(run_dir)
        self.ledger = list(Ledger(run_dir).read())

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
    def settled(self) -> Record:
        """What the last freezing, change and start of training found, the later before the earlier."""
        return self.last("frozen") | self.last("changed") | self.last("train_start")

    @property
    def checkpoints(self) -> list[Record]:
        """The newest record of each checkpoint."""
        return list({record["name"]: record for record in self.events("checkpoint")}.values())

    @property
    def planned(self) -> dict[str, Record]:
        """Rows of the newest planned mixture by language."""
        return {row["language"]: row for row in self.last("mixture").get("rows", [])}

    @property
    def languages(self) -> list[str]:
        """Every language that any file names, sorted."""
        found = set(self.config.corpus.languages if self.config else ()) | self.planned.keys()
        return sorted(found.union(*(record["bpb"] for record in (*self.valid, *self.evaluations))))


def _config(path: Path) -> tuple[RunConfig | None, str]:
    if not path.is_file():
        return None, "config.yaml is not there"
    try:
        return load(path), ""
    except UserError as error:
        return None, f"config.yaml does not fit this version: {error.found}"


def _metrics(path: Path) -> list[Record]:
    """Metric lines by step, without those that a restart from an earlier step has made void."""
    kept: dict[tuple[int, str], Record] = {}
    for record in json_lines(path, object_hook=_with_nan):
        while kept and next(reversed(kept))[0] > record["step"]:
            kept.popitem()
        kept[record["step"], record["kind"]] = record
    return list(kept.values())


def _with_nan(record: Record) -> Record:
    """JSON has no NaN: the trainer writes null for a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in record.items()}
