"""RUN/report.html: one page that shows a run to others, offline, from the files in its folder.

A fact that they do not hold is shown as `GAP: reason`. The page has no script, and its own policy forbids the browser
any request. What it says stands in report.html.j2, which calls this file to reckon; charts.svg.j2 draws.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml
from babel import Locale

from configs.compose import load
from configs.errors import UserError
from configs.schema import RunConfig
from data.files import write_whole
from eval.results import read_results
from ledger.pages import environment, render
from ledger.record import Ledger, json_lines
from marathon.choices import run_names

Record = dict[str, Any]
Point = tuple[float, float]
_HERE = Path(__file__).parent
_STRETCHES = 300  # of each, the lowest and highest point of a line are drawn: no spike is lost, no file grows large


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path; `UserError` where RUN is no folder."""
    functions = {reckon.__name__: reckon for reckon in (language_name, axis, curve, of_family, standard_error)}
    path = run_dir / "report.html"
    write_whole(path, render(_HERE / "report.html.j2", run=RunFiles(run_dir), **functions))
    return path


class Axis(NamedTuple):
    """A range of values, ends included, and the round numbers to be written along it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def across(self, value: float) -> str:
        """Where a value lies, as a share of the width."""
        return f"{(value - self.low) / (self.high - self.low):.2%}"

    def down(self, value: float, height_px: int) -> float:
        """Where a value lies below the top of a drawing of that height."""
        return round((self.high - value) / (self.high - self.low) * height_px, 1)


class Frame(NamedTuple):
    """What curves are drawn into: two axes, and a height in pixels."""

    x: Axis
    y: Axis
    height_px: int

    def trace(self, points: Iterable[Point]) -> list[Point]:
        """What is drawn of a curve by ascending x: thousandths of the width, and pixels from the top."""
        finite = [point for point in points if math.isfinite(point[1])]
        size = -(-len(finite) // _STRETCHES) or 1
        stretches = [sorted(finite[n : n + size], key=lambda point: point[1]) for n in range(0, len(finite), size)]
        drawn = [point for stretch in stretches for point in sorted({stretch[0], stretch[-1]})] + finite[-1:]
        range_ = self.x.high - self.x.low
        return [(round((at - self.x.low) / range_ * 1000, 1), self.y.down(v, self.height_px)) for at, v in drawn]


def axis(values: Iterable[float], n_ticks: int = 5, from_zero: bool = True) -> Axis:
    """An axis that holds all finite values, with about `n_ticks` round numbers."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = (min(0.0, *finite) if from_zero else min(finite)), max(finite)
    if high - low <= 1e-6 * abs(high):
        high = low + max(abs(low), 1.0)
    rough = (high - low) / (n_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)))


class RunFiles:
    """The files of a run, which may be in progress or copied in part; raises `UserError` where there is no folder."""

    def __init__(self, run_dir: Path) -> None:
        if not run_dir.is_dir():
            found = f"{run_dir} is no folder; runs there: {', '.join(run_names(run_dir.parent)) or 'none'}"
            raise UserError(found, "a report is made of a run", "give its name or its folder")
        self.config, self.config_gap = _config(run_dir / "config.yaml")
        self.name = self.config.name if self.config else run_dir.resolve().name
        metrics = _metrics(run_dir / "metrics.jsonl")
        self.train = [record for record in metrics if record["kind"] == "train"]
        self.valid = [record for record in metrics if record["kind"] == "valid"]
        self.evaluations = read_results(run_dir)
        self.ledger = list(Ledger(run_dir).read())
        # What the last freezing, change and start of training found, the later before the earlier.
        self.settled = self.last("frozen") | self.last("changed") | self.last("train_start")
        self.n_removed = sum(record.get("documents", 0) for record in self.events("documents_removed"))
        audit = f"../../corpora/{self.last('corpus').get('documents_folder')}/audit.html"
        self.audit = audit if (run_dir / audit).is_file() else ""
        self.checkpoints = list({record["name"]: record for record in self.events("checkpoint")}.values())
        self.planned: dict[str, Record] = {row["language"]: row for row in self.last("mixture").get("rows", [])}
        configured = self.config.corpus.languages if self.config else []
        measured = (record["bpb"] for record in (*self.valid, *self.evaluations))
        self.languages = sorted({*configured, *self.planned}.union(*measured))

    def events(self, name: str) -> list[Record]:
        """Ledger records of one event."""
        return [record for record in self.ledger if record["event"] == name]

    def last(self, name: str) -> Record:
        """The newest ledger record of one event; empty where there is none."""
        return (self.events(name) or [{}])[-1]

    def fact(self, key: str) -> Any:
        """The newest value that the ledger has under `key`, or None."""
        return next((record[key] for record in reversed(self.ledger) if key in record), None)

    def typical(self, key: str) -> float | None:
        """The median of a figure of the training lines."""
        found = [value for _, value in curve(self.train, key) if math.isfinite(value)]
        return median(found) if found else None

    def bpb_curves(self) -> dict[str, list[Point]]:
        """Bits per byte over tokens seen, by language."""
        lines = [{**record["bpb"], "tokens": record["tokens"]} for record in self.valid]
        return {code: curve(lines, code) for code in self.languages}

    def frame(self, curves: Iterable[list[Point]], height_px: int, from_zero: bool = True) -> Frame:
        """Across, all charts show the same tokens, so that they can be read one above the other."""
        tokens = axis([record["tokens"] for record in (*self.train, *self.valid)])
        values = [value for points in curves for _, value in points]
        return Frame(tokens, axis(values, 5 if height_px > 200 else 3, from_zero), height_px)

    def history(self) -> list[tuple[float, str]]:
        """Time and sentence of each event that history.yaml has words for."""
        words = yaml.safe_load((_HERE / "history.yaml").read_text(encoding="utf-8"))
        told = [record for record in self.ledger if record["event"] in words]
        return [(r["time"], environment(_HERE).from_string(words[r["event"]]).render(r)) for r in told]


def _config(path: Path) -> tuple[RunConfig | None, str]:
    if not path.is_file():
        return None, "config.yaml is not there"
    try:
        return load(path), ""
    except UserError as error:
        return None, f"config.yaml does not fit this version: {error.found}"


def _metrics(path: Path) -> list[Record]:
    """Metric lines by step; after a restart, one for an earlier step takes the place of all that came after it."""
    kept: dict[tuple[int, str], Record] = {}
    for record in json_lines(path, object_hook=_with_nan):
        while kept and next(reversed(kept))[0] > record["step"]:
            kept.popitem()
        kept[record["step"], record["kind"]] = record
    return list(kept.values())


def _with_nan(record: Record) -> Record:
    """JSON has no NaN: the trainer writes null for a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in record.items()}


def language_name(code: str) -> str:
    """The English name of a BCP-47 code, or the code itself where it has none."""
    return str(Locale("en").languages.get(code.split("-")[0], code))


def curve(records: Iterable[Record], key: str, scale: float = 1) -> list[Point]:
    """A figure over tokens seen, where it was written."""
    return [(r["tokens"], r[key] * scale) for r in records if isinstance(r.get(key), int | float)]


def of_family(record: Record, family: str) -> dict[str, Record]:
    """Results of an evaluation by language: a task is named FAMILY_LANGUAGE."""
    prefix = f"{family}_"
    return {task.removeprefix(prefix): found for task, found in record["tasks"].items() if task.startswith(prefix)}


def standard_error(results: dict[str, Record]) -> float:
    """Of the mean accuracy, if languages are independent."""
    return math.hypot(*(result["acc_stderr"] for result in results.values())) / len(results)
