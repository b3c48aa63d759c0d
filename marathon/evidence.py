"""The tables of the report: languages seen, evaluations, checkpoints, history, software.

Each function returns the parts of one section, as markup, from the files of a run.
"""

import math
from collections import defaultdict
from typing import Any

from ledger.record import gap
from marathon import markup
from marathon.charts import Interval, axis, bar, dot_plot
from marathon.markup import language_name, missing, note, text
from marathon.numerals import count, fixed, moment, percent, short
from marathon.runfiles import Record, RunFiles, number

_Z = 1.96
"""Standard errors on either side of an accuracy for an interval of 95 %."""
_TOLD = {
    "frozen": "Settings frozen, config {config_hash:.12}",
    "changed": "Settings changed: {settings}",
    "corpus": "Corpus ready: {documents} documents, {tokens} tokens",
    "mixture": "Mixture planned, {rule}",
    "mixture_phase": "Mixture changes at step {step}",
    "start": "Stage {stage} starts; the run has come to {reached}",
    "train_start": "Training starts at step {step} on {cluster}, world size {world_size}, ZeRO-{zero_stage}",
    "self_test": "Gradients compared with one process in fp32: {error}",
    "step_left_out": "Step {step} left out, its gradient is {grad_norm}",
    "rewind": "Loss {loss} at step {step}: back to {checkpoint}, without the samples before it",
    "checkpoint_failed": "Checkpoint of step {step} not written: {error}",
    "checkpoint_damaged": "Checkpoint not used: {complaint}",
    "moved": "Moved to {to}, {checkpoint}",
    "arrived": "Arrived at {at}",
    "ledger_short": "Ledger incomplete, {lost}",
    "train_end": "Training ended after {steps} steps and {tokens} tokens",
    "train_stop": "Training stopped after {steps} steps by {reason}",
    "refused": "Stage {stage} refused after {starts} starts that came no further than {reached}",
    "stage": "Stage {stage} done",
    "release": "Released {checkpoint}",
}
"""Ledger events as sentences; checkpoints and evaluations have tables of their own."""


def mixture(run: RunFiles) -> list[str]:
    """Tokens of each language: seen, planned, and how often all there are."""
    plan, seen = run.planned, run.valid[-1]["consumed"] if run.valid else {}
    if not plan and not seen:
        return [missing("neither a planned mixture in the ledger nor consumed tokens in metrics.jsonl")]
    total = sum(seen.values())
    shares = {code: tokens / total for code, tokens in seen.items() if total}
    largest = max([*shares.values(), *(row["share"] for row in plan.values())], default=1.0)
    rows = []
    for code in sorted(plan.keys() | seen.keys()):
        planned = plan.get(code, {})
        share, available = number(planned, "share"), number(planned, "available_tokens")
        epochs = seen[code] / available if code in seen and available else None
        cells = [percent(shares.get(code)), percent(share), count(seen.get(code)), fixed(epochs)]
        cells += [f"{fixed(number(planned, 'epochs'))} {planned.get('cap', '')}".rstrip(), count(available)]
        rows.append([text(language_name(code)), bar(shares.get(code), share, largest), *map(text, cells)])
    head = ["Language", "", "Share", "Planned", "Tokens seen", "Epochs", "Planned", "Tokens there are"]
    key = '<span class="key"></span> seen, <span class="key stroke"></span> planned.'
    where = f"Counted up to step {count(run.valid[-1]['step'])}." if run.valid else gap("no tokens counted yet")
    return [f'<p class="note">{key} {text(where)}</p>', markup.table(head, rows, n_words=2)]


def evaluations(run: RunFiles) -> list[str]:
    """Bits per byte and tasks of the newest evaluated checkpoint with intervals, then all checkpoints in a table."""
    if not run.evaluations:
        return [missing("no checkpoint has been evaluated: eval/ holds no result")]
    newest = run.evaluations[-1]
    plots = [_bpb_plot(newest), *(_family_plot(newest, family) for family in newest["families"])]
    families = sorted({family for record in run.evaluations for family in record["families"]})
    rows = [
        [
            text(record["checkpoint"]),
            text(count(record["step"])),
            text(count(record["tokens"])),
            text(fixed(number(record, "bpb_mean"), 3)),
            *(text(_family_mean(record, family)) for family in families),
        ]
        for record in run.evaluations
    ]
    return [
        note(
            f"Newest evaluated checkpoint: {newest['checkpoint']}. Lines are 95 % intervals: of bits per byte by a "
            f"bootstrap over documents, of accuracy {_Z} standard errors to either side. The upright stroke is chance. "
            "agreement asks which form of a unit follows a number, each pair in both directions: a model that does not "
            "look at the number scores one half. countries asks for a country's name in the language, out of four."
        ),
        f'<div class="pair">{"".join(plots)}</div>',
        "<h3>By checkpoint</h3>",
        markup.table(["Checkpoint", "Step", "Tokens", "Bits per byte, mean", *families], rows),
        note("Accuracies are unweighted means over languages, with their standard error if languages are independent."),
    ]


def checkpoints(run: RunFiles) -> list[str]:
    """A row for each checkpoint with its hashes."""
    newest = {record["name"]: record for record in run.events("checkpoint")}
    if not newest:
        return [missing("the ledger records no checkpoint")]
    rows = [
        [
            text(name),
            text(count(record["step"])),
            text(count(record["tokens"])),
            markup.hash_digits(record["sha256"]),
            markup.hash_digits(record["order_hash"]) if record["order_hash"] else "no sample yet",
            text(moment(record["time"])),
        ]
        for name, record in newest.items()
    ]
    return [
        note(
            "sha256 is of the manifest, which holds the hash of every file; the order hash is of all samples consumed "
            "so far, with their positions."
        ),
        markup.table(["Name", "Step", "Tokens", "sha256", "Order hash", "Written"], rows),
    ]


def history(run: RunFiles) -> list[str]:
    """What happened, in order, as the ledger has it."""
    rows = [
        f"<li><time>{text(moment(record['time']))}</time><span>{text(_sentence(record))}</span></li>\n"
        for record in run.ledger
        if record["event"] in _TOLD
    ]
    return [f'<ol class="history">{"".join(rows)}</ol>' if rows else missing("ledger.jsonl is missing or empty")]


def software(run: RunFiles) -> list[str]:
    """Versions, container and machine, and the full hashes that name this run."""
    settled = run.last("frozen") | run.last("changed") | run.last("train_start")
    rows: list[tuple[str, Any]] = [
        *settled.get("software", {"Software": None}).items(),
        *settled.get("hardware", {"Hardware": gap("training has not started")}).items(),
        *((name.capitalize(), settled.get(name)) for name in ("device", "container", "commit")),
        ("Config hash", settled.get("config_hash")),
        ("Corpus hash", run.last("corpus").get("corpus_hash")),
    ]
    return [markup.facts(rows)]


def _bpb_plot(record: Record) -> str:
    rows = [
        Interval(language_name(code), found["bpb"], found["low"], found["high"], fixed(found["bpb"]))
        for code, found in sorted(record["bpb"].items(), key=lambda item: item[1]["bpb"])
    ]
    x = axis([v for row in rows for v in (row.low, row.high)], 4, from_zero=False)
    return dot_plot("Bits per byte, lower is better", rows, x)


def _family_plot(record: Record, family: str) -> str:
    rows = []
    for code, result in _of_family(record, family).items():
        accuracy, error = result["acc"], _Z * result["acc_stderr"]
        low, high = max(accuracy - error, 0.0), min(accuracy + error, 1.0)
        words = f"{fixed(accuracy)}, n {count(result['items'])}"
        rows.append(Interval(language_name(code), accuracy, low, high, words, result["chance"]))
    return dot_plot(f"{family}: accuracy, n questions", rows, axis([0.0, 1.0]))


def _family_mean(record: Record, family: str) -> str:
    if not (mean := record["families"].get(family)):
        return gap("not evaluated")
    errors = [result["acc_stderr"] for result in _of_family(record, family).values()]
    return f"{fixed(mean['acc'], 3)} ± {fixed(math.hypot(*errors) / len(errors), 3)} (chance {short(mean['chance'])})"


def _of_family(record: Record, family: str) -> dict[str, Record]:
    """Results by language: a task is named FAMILY_LANGUAGE."""
    return {
        task.removeprefix(f"{family}_"): result
        for task, result in record["tasks"].items()
        if task.startswith(f"{family}_")
    }


def _sentence(record: Record) -> str:
    facts = {key: count(value) if isinstance(value, int | float) else value for key, value in record.items()}
    pairs = record.get("settings", {}).items()
    if isinstance(record.get("error"), float):
        facts["error"] = f"{record['error']:.1e}"
    facts["settings"] = ", ".join(f"{key} from {old} to {new}" for key, (old, new) in pairs)
    return _TOLD[record["event"]].format_map(defaultdict(lambda: gap("not recorded"), facts))
