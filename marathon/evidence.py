"""The tables of the report: languages seen, evaluations, checkpoints, history, software.

Each function returns the parts of one section, as markup, from the files of a run.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ledger.record import gap
from marathon import markup
from marathon.charts import Interval, axis, bar, dot_plot
from marathon.markup import folded, hash_digits, language_name, missing, note, text
from marathon.numerals import as_number, count, fixed, moment, percent, plural, short
from marathon.runfiles import Record, RunFiles, mapping, number

_Z = 1.96
"""Standard errors on either side of an accuracy for an interval of 95 %."""
_OWN_SECTION = ("checkpoint", "evaluation")
"""Events that have a table of their own."""


def mixture(run: RunFiles) -> list[str]:
    """Tokens of each language: seen, planned, and how often all there are."""
    planned = {row["language"]: row for row in run.mixture}
    consumed = mapping(run.valid[-1], "consumed") if run.valid else {}
    if not planned and not consumed:
        return [missing("neither a planned mixture in the ledger nor consumed tokens in metrics.jsonl")]
    seen = {code: as_number(value) for code, value in consumed.items()}
    total = sum(v for v in seen.values() if v is not None and math.isfinite(v))
    shares = {code: v / total if v is not None and total else None for code, v in seen.items()}
    plan = {code: number(row, "share") for code, row in planned.items()}
    largest = max((v for v in [*shares.values(), *plan.values()] if v is not None and math.isfinite(v)), default=0.0)
    rows = [
        [
            text(language_name(code)),
            bar(shares.get(code), plan.get(code), largest),
            text(percent(shares.get(code))),
            text(percent(plan.get(code))),
            text(count(seen.get(code))),
            text(_epochs(seen.get(code), number(planned.get(code, {}), "available_tokens"))),
            text(fixed(number(planned.get(code, {}), "epochs")))
            + (" (cap)" if planned.get(code, {}).get("capped") else ""),
            text(count(number(planned.get(code, {}), "available_tokens"))),
        ]
        for code in sorted(planned.keys() | seen.keys())
    ]
    head = ["Language", "", "Share", "Planned", "Tokens seen", "Epochs", "Planned", "Tokens there are"]
    key = '<span class="key"></span> seen, <span class="key stroke"></span> planned.'
    where = f"Counted up to step {count(number(run.valid[-1], 'step'))}." if run.valid else gap("no tokens counted yet")
    return [f'<p class="note">{key} {text(where)}</p>', markup.table(head, rows, n_words=2)]


def evaluations(run: RunFiles) -> list[str]:
    """Bits per byte with intervals and tasks of the newest evaluated checkpoint, then all of them as tables."""
    if not run.evaluations:
        return [missing("no checkpoint has been evaluated: eval/ holds no result")]
    newest = run.evaluations[-1]
    families = _families(run)
    plots = [_bpb_plot(newest), *(_family_plot(newest, name, tasks) for name, tasks in families.items())]
    return [
        f'<p class="note">Newest evaluated checkpoint: {text(newest.get("checkpoint"))}, step '
        f"{text(count(number(newest, 'step')))}. Lines are 95 % intervals: of bits per byte by a bootstrap over "
        f"documents, of accuracy {_Z} standard errors to either side. The upright stroke is chance.</p>",
        f'<div class="pair">{"".join(filter(None, plots))}</div>',
        "" if families else missing("no task was evaluated"),
        "<h3>By checkpoint</h3>",
        _by_checkpoint(run, families),
        note("Accuracies are unweighted means over languages, with their standard error if languages are independent."),
        folded("Bits per byte by language and checkpoint", _bpb_table(run)),
        *(folded(f"{name}: accuracy by language and checkpoint", _task_table(run, t)) for name, t in families.items()),
    ]


def checkpoints(run: RunFiles) -> list[str]:
    """A row for each checkpoint with its hashes."""
    newest = {str(record.get("name")): record for record in run.events("checkpoint")}
    if not newest:
        return [missing("the ledger records no checkpoint")]
    rows = [
        [
            text(record.get("name")),
            text(count(number(record, "step"))),
            text(count(number(record, "tokens"))),
            hash_digits(record.get("sha256")),
            text("no sample yet") if number(record, "tokens") == 0 else hash_digits(record.get("order_hash")),
            text(moment(number(record, "time"))),
        ]
        for record in newest.values()
    ]
    return [
        note("sha256 is of the weights; the order hash is of the ids of all samples consumed so far, in their order."),
        markup.table(["Name", "Step", "Tokens", "sha256", "Order hash", "Written"], rows),
    ]


def history(run: RunFiles) -> list[str]:
    """What happened, in order, as the ledger has it."""
    rows = [
        f"<li><time>{text(moment(number(record, 'time')))}</time><span>{text(_told(record))}</span></li>\n"
        for record in run.ledger
        if record.get("event") not in _OWN_SECTION
    ]
    return [f'<ol class="history">{"".join(rows)}</ol>' if rows else missing("ledger.jsonl is missing or empty")]


def software(run: RunFiles) -> list[str]:
    """Versions, container and machine, and the full hashes that name this run."""
    settled = ("frozen", "changed", "train_start")
    rows = [
        *_flat("Software", run.fact("software", *settled)),
        *_flat("Hardware", run.fact("hardware", "train_start")),
        ("Device", run.fact("device", "train_start")),
        ("Container", run.fact("container", "train_start")),
        ("Commit", run.fact("commit", *settled)),
        ("Config hash", run.fact("config_hash", "frozen", "changed")),
        ("Corpus hash", run.last("corpus").get("corpus_hash")),
    ]
    return [markup.facts(rows)]


def _epochs(tokens: float | None, available: float | None) -> str:
    if tokens is None or not available:
        return gap("needs tokens seen and tokens there are")
    return fixed(tokens / available)


def _families(run: RunFiles) -> dict[str, list[str]]:
    """Tasks by family: `agreement_de` belongs to `agreement` where `de` is a language of the run."""
    found: dict[str, list[str]] = {}
    for name in sorted({task for record in run.evaluations for task in mapping(record, "tasks")}):
        found.setdefault(_family(name, run.languages), []).append(name)
    return found


def _family(task: str, languages: list[str]) -> str:
    family, _, language = task.rpartition("_")
    return family if family and language in languages else task


def _bpb_plot(record: Record) -> str:
    rows = []
    for code in mapping(record, "bpb"):
        value, low, high = (_finite(mapping(mapping(record, "bpb"), code), key) for key in ("bpb", "low", "high"))
        rows.append(Interval(language_name(code), value, low, high, _short_gap(value)))
    if not rows:
        return missing("no bits per byte in the newest evaluation")
    rows.sort(key=lambda row: (math.isnan(row.value), row.value, row.name))
    x = axis([v for row in rows for v in (row.value, row.low, row.high)], 4, rounded=True)
    return dot_plot("Bits per byte, lower is better", rows, x)


def _family_plot(record: Record, family: str, tasks: list[str]) -> str:
    rows = []
    for task in tasks:
        if not (result := mapping(mapping(record, "tasks"), task)):
            continue
        accuracy, error = _finite(result, "acc"), _finite(result, "acc_stderr")
        low, high = max(accuracy - _Z * error, 0.0), min(accuracy + _Z * error, 1.0)
        words = f"{_short_gap(accuracy)}, n {count(number(result, 'items'))}"
        name = language_name(task.removeprefix(f"{family}_"))
        rows.append(Interval(name, accuracy, low, high, words, number(result, "chance")))
    if not rows:
        return ""
    return dot_plot(f"{family}: accuracy, n questions", rows, axis([0.0, 1.0], 5))


def _by_checkpoint(run: RunFiles, families: dict[str, list[str]]) -> str:
    chances = {name: _constant(run, tasks, "chance") for name, tasks in families.items()}
    head = ["Checkpoint", "Step", "Tokens", "Bits per byte, mean", *(f"{n} (chance {c})" for n, c in chances.items())]
    rows = [
        [
            text(record.get("checkpoint")),
            text(count(number(record, "step"))),
            text(count(number(record, "tokens"))),
            text(fixed(number(record, "bpb_mean"), 3)),
            *(text(_family_mean(record, tasks)) for tasks in families.values()),
        ]
        for record in run.evaluations
    ]
    return markup.table(head, rows)


def _family_mean(record: Record, tasks: list[str]) -> str:
    results = [mapping(mapping(record, "tasks"), task) for task in tasks]
    accuracies = [v for r in results if math.isfinite(v := _finite(r, "acc"))]
    errors = [v for r in results if math.isfinite(v := _finite(r, "acc_stderr"))]
    if not accuracies:
        return gap("not evaluated")
    mean = fixed(sum(accuracies) / len(accuracies), 3)
    error = fixed(math.hypot(*errors) / len(errors), 3) if len(errors) == len(accuracies) else gap("no standard error")
    return f"{mean} ± {error}"


def _constant(run: RunFiles, tasks: list[str], key: str) -> str:
    """What all results of some tasks agree on, such as the chance; `mixed` where they do not."""
    found = {number(mapping(mapping(record, "tasks"), task), key) for record in run.evaluations for task in tasks} - {
        None
    }
    return gap("not recorded") if not found else short(found.pop() or 0.0) if len(found) == 1 else "mixed"


def _bpb_table(run: RunFiles) -> str:
    def cell(record: Record, code: str) -> str:
        found = mapping(mapping(record, "bpb"), code)
        if not found:
            return gap("not evaluated")
        return f"{fixed(number(found, 'bpb'), 3)} ({fixed(number(found, 'low'))} to {fixed(number(found, 'high'))})"

    head = ["", *(f"step {count(number(record, 'step'))}" for record in run.evaluations)]
    return markup.table(
        head, [[text(code), *(text(cell(record, code)) for record in run.evaluations)] for code in run.languages]
    )


def _task_table(run: RunFiles, tasks: list[str]) -> str:
    def cell(record: Record, task: str) -> str:
        found = mapping(mapping(record, "tasks"), task)
        if not found:
            return gap("not evaluated")
        return f"{fixed(number(found, 'acc'), 3)} ± {fixed(number(found, 'acc_stderr'), 3)}"

    head = ["", "chance", "questions", *(f"step {count(number(record, 'step'))}" for record in run.evaluations)]
    rows = [
        [
            text(task),
            text(_constant(run, [task], "chance")),
            text(_constant(run, [task], "items")),
            *(text(cell(record, task)) for record in run.evaluations),
        ]
        for task in tasks
    ]
    return markup.table(head, rows)


def _told(record: Record) -> str:
    """One ledger record in a sentence."""
    event = record.get("event")
    step, tokens = count(number(record, "step")), count(number(record, "tokens"))
    if event == "frozen":
        return f"Settings frozen, config {str(record.get('config_hash'))[:12]}"
    if event == "corpus":
        return f"Corpus ready: {count(number(record, 'documents'))} documents, {tokens} tokens"
    if event == "mixture":
        rows = record.get("rows")
        return f"Mixture planned for {len(rows) if isinstance(rows, list) else gap('no rows')} languages"
    if event == "train_start":
        begun = f"Training resumed at step {step}" if (number(record, "step") or 0) > 0 else "Training started"
        return f"{begun} on {plural(number(record, 'world_size'), 'device')}"
    if event == "train_end":
        return f"Training ended after {count(number(record, 'steps'))} steps and {tokens} tokens"
    if event == "train_stop":
        return f"Training stopped after {count(number(record, 'steps'))} steps by {record.get('reason')}"
    if event == "changed":
        return f"Settings changed: {_changes(mapping(record, 'settings')) or gap('not recorded which')}"
    if event == "stage":
        return f"Stage {record.get('stage')} done"
    if event == "release":
        return f"Released to {Path(str(record.get('path'))).name}"
    rest = {key: value for key, value in record.items() if key not in ("event", "time")}
    return f"{event}: {', '.join(f'{key} {value}' for key, value in rest.items())}"[:300]


def _changes(settings: Record) -> str:
    pairs = ((key, value) for key, value in settings.items() if isinstance(value, list) and len(value) == 2)
    return ", ".join(f"{key} from {old} to {new}" for key, (old, new) in pairs)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A nested fact as rows of name and value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(str(key), inner)
    elif isinstance(value, list) and value:
        yield name, ", ".join(str(v) for v in value)
    else:
        yield name, short(value) if isinstance(value, float) and math.isfinite(value) else value


def _finite(record: Record, key: str) -> float:
    value = number(record, key)
    return value if value is not None else math.nan


def _short_gap(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "GAP: not a number"
