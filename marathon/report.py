"""RUN/report.html: one page that shows a run to others, offline, from the files in its folder.

Every number is a rendering of config.yaml, ledger.jsonl, metrics.jsonl or eval/*.json; a fact that they do
not hold is shown as `GAP: reason`. The page has no script and fetches nothing: style and drawings stand in it,
and its own policy forbids the browser any request.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from ledger.record import gap
from marathon import markup
from marathon.charts import Axis, Line, Point, axis, line_chart, panel
from marathon.evidence import checkpoints, evaluations, history, mixture, software
from marathon.markup import language_name, missing, note, section, text
from marathon.numerals import change, count, fixed, moment, percent, plural, short
from marathon.runfiles import Record, RunFiles, number, read_run

_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path; `UserError` where RUN is no folder."""
    run = read_run(run_dir)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=text(_name(run)), body=_body(run))
    path = run_dir / "report.html"
    beside = path.with_suffix(".tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def _body(run: RunFiles) -> str:
    sections = {
        "languages": ("Bits per byte", _languages),
        "loss": ("Loss", _loss),
        "mixture": ("Languages seen", mixture),
        "throughput": ("Throughput", _throughput),
        "evaluations": ("Evaluations", evaluations),
        "checkpoints": ("Checkpoints", checkpoints),
        "history": ("History", history),
        "software": ("Software and machine", software),
    }
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, (title, _) in sections.items())
    parts = [section(anchor, title, draw(run)) for anchor, (title, draw) in sections.items()]
    foot = "<footer>Made by Marathon from the files of the run. GAP marks a fact that they do not hold.</footer>"
    return "\n".join([_header(run), f"<nav>{links}</nav>", *parts, foot])


def _header(run: RunFiles) -> str:
    parameters, tokens = text(count(run.fact("parameters"))), text(count(_last(run.train, "tokens")))
    return "\n".join(
        [
            f'<header><p class="above">Marathon · a run, {text(_state(run))}</p><h1>{text(_name(run))}</h1>',
            f'<p class="lede">{parameters} parameters, {tokens} tokens, {len(run.languages)} languages.</p>',
            markup.tiles(_tiles(run)),
            markup.facts(_settings(run)),
            "</header>",
        ]
    )


def _name(run: RunFiles) -> str:
    return run.config.name if run.config else run.run_dir.resolve().name


def _state(run: RunFiles) -> str:
    steps, planned = _last(run.train, "step"), run.config.train.steps if run.config else None
    if steps is None:
        return gap("no training step recorded yet")
    if run.events("train_end") and steps >= (planned or 0):
        return "finished"
    return f"at step {count(steps)}" + (f" of {count(planned)}" if planned else "")


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    devices = plural(number(run.last("train_start"), "world_size"), "device")
    return [
        ("Bits per byte, mean", fixed(_last(run.valid, "bpb_mean")), f"{_since_start(run, _bpb_mean)} since step 0"),
        ("Training loss", fixed(_last(run.train, "loss")), "nats per token, last line"),
        ("Tokens seen", count(_last(run.train, "tokens")), plural(_last(run.train, "step"), "step")),
        ("Tokens per second", count(_median(run, "tokens_per_s")), f"median, {devices}"),
        ("MFU", percent(_median(run, "mfu")), "median; formula below"),
        ("Energy", _measured(run, "energy_kwh", "kWh"), _measured(run, "device_hours", "device-hours")),
    ]


def _settings(run: RunFiles) -> list[tuple[str, Any]]:
    corpus, begun = run.last("corpus"), run.events("train_start")
    return [
        ("Parameters", count(run.fact("parameters"))),
        *_configured(run),
        ("World size", count(number(run.last("train_start"), "world_size"))),
        ("Documents", count(number(corpus, "documents"))),
        ("Bytes of text", count(number(corpus, "bytes"))),
        ("Licences of the text", ", ".join(corpus.get("licences", []))),
        ("Started", moment(begun[0]["time"]) if begun else gap("training has not started")),
        ("Last record", moment(run.ledger[-1]["time"]) if run.ledger else gap("no ledger")),
    ]


def _configured(run: RunFiles) -> list[tuple[str, Any]]:
    if run.config is None:
        return [("Settings", gap(run.config_gap))]
    cfg = run.config
    return [
        ("Blocks × width", f"{cfg.model.n_layer} × {cfg.model.d_model}"),
        ("Tokens planned", count(cfg.train.tokens)),
        ("Steps planned", count(cfg.train.steps)),
        ("Tokens per step", count(cfg.train.tokens_per_step)),
        ("Sequence length", count(cfg.train.seq_len)),
        ("Vocabulary", count(cfg.tokenizer.vocab_size)),
        ("Learning rate, schedule", f"{cfg.optim.lr:g}, {cfg.schedule.name.value}"),
        ("Precision", f"{cfg.engine.precision.value}, gradients travel in {cfg.engine.comm_precision.value}"),
        ("ZeRO stage", cfg.engine.zero_stage),
        ("Mixture", cfg.mixture.rule.value),
        ("Seed", cfg.seed),
        ("Cluster", cfg.cluster.name),
    ]


def _languages(run: RunFiles) -> list[str]:
    if not run.valid:
        return [missing("metrics.jsonl holds no validation yet")]
    curves = {code: _points(run.valid, _bpb(code)) for code in run.languages}
    mean = _points(run.valid, _bpb_mean)
    x, y = _tokens_axis(run), axis([v for points in curves.values() for _, v in points])
    panels = "".join(
        _language_panel(run, code, panel(f"Bits per byte, {code}", [Line(mean, "pale"), Line(points)], x, y))
        for code, points in curves.items()
    )
    return [
        note(
            "How many bits the model needs for one byte of text that it was not trained on: lower is better. It can be "
            "compared between tokenizers and, with care, between languages: Greek and Cyrillic letters take two bytes "
            "each, so the same text costs fewer bits a byte there."
        ),
        line_chart(
            "Bits per byte of held-out text, over tokens seen",
            [*(Line(points, "thin") for points in curves.values()), Line(mean)],
            x,
            y,
        ),
        note("Each pale line is a language, the strong one their unweighted mean."),
        "<h3>Each language</h3>",
        note(
            f"All panels share their axes, {count(x.low)} to {count(x.high)} tokens across and {fixed(y.low, 0)} to "
            f"{fixed(y.high)} bits per byte up; the pale line is the mean of all languages. Beneath: value at step 0 → "
            "value at the last validation, change, and the 95 % bootstrap interval over documents "
            "from the evaluation."
        ),
        f'<ul class="panels">{panels}</ul>',
    ]


def _language_panel(run: RunFiles, code: str, drawing: str) -> str:
    bpb = _bpb(code)
    start = fixed(_at_start(run, bpb)) if run.valid[0]["step"] == 0 else gap("no validation at step 0")
    return (
        f"<li><b>{text(language_name(code))}</b><span>{text(code)}</span>{drawing}"
        f"<p><span>{text(start)} → {text(fixed(bpb(run.valid[-1])))}</span>"
        f'<span class="change">{text(_since_start(run, bpb))}</span></p>'
        f'<p class="note">{text(_interval(run, code))}</p></li>\n'
    )


def _interval(run: RunFiles, code: str) -> str:
    """The interval of the newest evaluation, with its step where that is not the last validation's."""
    newest = run.evaluations[-1] if run.evaluations else {"bpb": {}}
    if code not in newest["bpb"]:
        return gap("no interval: not evaluated")
    ends = f"{fixed(newest['bpb'][code]['low'])} to {fixed(newest['bpb'][code]['high'])}"
    return ends if newest["step"] == run.valid[-1]["step"] else f"{ends} at step {count(newest['step'])}"


def _loss(run: RunFiles) -> list[str]:
    if not run.train:
        return [missing("metrics.jsonl holds no training line yet")]
    bad = [count(r["step"]) for r in run.train if not math.isfinite(number(r, "loss") or 0.0)]
    loss = _points(run.train, lambda record: number(record, "loss"))
    return [
        _chart(run, "Training loss in nats per token, over tokens seen", "loss", 280, from_zero=False),
        note(
            f"As logged, not smoothed: {plural(len(loss), 'value')}."
            + (f" Not finite, and not drawn, at step {', '.join(bad[:8])}." if bad else "")
        ),
        '<div class="small-charts">',
        _chart(run, "Learning rate", "lr"),
        _chart(run, "Norm of the gradient before clipping", "grad_norm"),
        "</div>",
    ]


def _throughput(run: RunFiles) -> list[str]:
    return [
        '<div class="small-charts">',
        _chart(run, "Tokens per second, all devices", "tokens_per_s"),
        _chart(run, "MFU in percent", "mfu", scale=100),
        _chart(run, "Memory of the fullest device in GiB", "memory_gib"),
        "</div>",
        note(
            "MFU, model FLOPs utilisation = tokens per second × FLOPs per token ÷ (devices × peak of one device). "
            "FLOPs per token = 6 × parameters that multiply + 6 × blocks × heads × head width × sequence length: "
            "forward and backward with causal attention; recomputation is not counted."
        ),
        markup.facts(
            [
                ("Peak of one device", _measured(run, "peak_tflops", "TFLOP/s")),
                ("Source of the peak", run.fact("peak_source")),
                ("FLOPs per token", short(run.fact("flops_per_token"))),
                ("FLOPs in all", short(run.fact("flops"))),
            ]
        ),
    ]


def _chart(run: RunFiles, title: str, key: str, height_px: int = 120, from_zero: bool = True, scale: float = 1) -> str:
    points = [(at, v * scale) for at, v in _points(run.train, lambda record: number(record, key))]
    if not points:
        return f"<figure><figcaption>{text(title)}</figcaption>{missing(f'no {key} in metrics.jsonl')}</figure>"
    y = axis([v for _, v in points], 5 if height_px > 200 else 3, from_zero)
    return line_chart(title, [Line(points)], _tokens_axis(run), y, height_px)


def _points(records: list[Record], value: Callable[[Record], float | None]) -> list[Point]:
    return [(record["tokens"], v) for record in records if (v := value(record)) is not None]


def _tokens_axis(run: RunFiles) -> Axis:
    """Across, all charts show the same tokens, so that they can be read one above the other."""
    return axis([record["tokens"] for record in (*run.train, *run.valid)])


def _bpb(code: str) -> Callable[[Record], float | None]:
    return lambda record: number(record["bpb"], code)


def _bpb_mean(record: Record) -> float | None:
    return number(record, "bpb_mean")


def _at_start(run: RunFiles, value: Callable[[Record], float | None]) -> float | None:
    return value(run.valid[0]) if run.valid and run.valid[0]["step"] == 0 else None


def _since_start(run: RunFiles, value: Callable[[Record], float | None]) -> str:
    """The change of a validated value; one validation is no change."""
    return change(_at_start(run, value), value(run.valid[-1]) if len(run.valid) > 1 else None)


def _last(records: list[Record], key: str) -> float | None:
    return number(records[-1], key) if records else None


def _median(run: RunFiles, key: str) -> float | None:
    found = [v for record in run.train if (v := number(record, key)) is not None and math.isfinite(v)]
    return median(found) if found else None


def _measured(run: RunFiles, key: str, unit: str) -> str:
    """A number with its unit, or the reason that the ledger gives for having none."""
    value = run.fact(key)
    return f"{short(value)} {unit}" if isinstance(value, int | float) else value or gap("not recorded yet")
