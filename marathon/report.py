"""RUN/report.html: one page that shows a run to others, offline, from the files in its folder.

Every number is a rendering of config.yaml, ledger.jsonl, metrics.jsonl or eval/*.json; a fact that they do
not hold is shown as `GAP: reason`. The page has no script and fetches nothing: style and drawings stand in it,
and its own policy forbids the browser any request. What it says stands in report.html.j2, which calls the functions
of this file for what has to be reckoned.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import yaml
from babel import Locale

from data.files import write_whole
from ledger.pages import environment, render
from marathon.charts import Frame, Point, axis
from marathon.runfiles import Record, RunFiles

_HERE = Path(__file__).parent
_ENGLISH = Locale("en")


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path; `UserError` where RUN is no folder."""
    reckoned = (language_name, axis, curve, bpb_curves, frame, typical, of_family, standard_error, history)
    functions = {function.__name__: function for function in reckoned}
    path = run_dir / "report.html"
    write_whole(path, render(_HERE / "report.html.j2", run=RunFiles(run_dir), **functions))
    return path


def language_name(code: str) -> str:
    """The English name of a BCP-47 code, or the code itself where it has none."""
    return str(_ENGLISH.languages.get(code.split("-")[0], code))


def curve(records: Iterable[Record], key: str, scale: float = 1) -> list[Point]:
    """A figure over tokens seen, where it was written."""
    return [(r["tokens"], r[key] * scale) for r in records if isinstance(r.get(key), int | float)]


def bpb_curves(run: RunFiles) -> dict[str, list[Point]]:
    """Bits per byte over tokens seen, by language."""
    lines = [{**record["bpb"], "tokens": record["tokens"]} for record in run.valid]
    return {code: curve(lines, code) for code in run.languages}


def frame(run: RunFiles, curves: Iterable[list[Point]], height_px: int, from_zero: bool = True) -> Frame:
    """Across, all charts show the same tokens, so that they can be read one above the other."""
    tokens = axis([record["tokens"] for record in (*run.train, *run.valid)])
    values = [value for points in curves for _, value in points]
    return Frame(tokens, axis(values, 5 if height_px > 200 else 3, from_zero), height_px)


def typical(run: RunFiles, key: str) -> float | None:
    """The median of a figure of the training lines."""
    found = [value for _, value in curve(run.train, key) if math.isfinite(value)]
    return median(found) if found else None


def of_family(record: Record, family: str) -> dict[str, Record]:
    """Results of an evaluation by language: a task is named FAMILY_LANGUAGE."""
    prefix = f"{family}_"
    return {task.removeprefix(prefix): found for task, found in record["tasks"].items() if task.startswith(prefix)}


def standard_error(results: dict[str, Record]) -> float:
    """Of the mean accuracy, if languages are independent."""
    return math.hypot(*(result["acc_stderr"] for result in results.values())) / len(results)


def history(run: RunFiles) -> list[tuple[float, str]]:
    """Time and sentence of each event that history.yaml has words for."""
    words = yaml.safe_load((_HERE / "history.yaml").read_text(encoding="utf-8"))
    told = [record for record in run.ledger if record["event"] in words]
    return [(r["time"], environment(_HERE).from_string(words[r["event"]]).render(r)) for r in told]
