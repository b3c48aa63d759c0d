"""RUN/report.html: one page that shows a run to others, offline, from the files in its folder.

Every number is a rendering of config.yaml, ledger.jsonl, metrics.jsonl or eval/*.json; a fact that they do
not hold is shown as `GAP: reason`. The page fetches nothing: style, drawings and the few lines of script that
show values under a pointer stand in it, and its own policy forbids the browser any request.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from ledger.record import gap
from marathon import markup
from marathon.charts import Axis, Line, Point, axis, line_chart, panel
from marathon.evidence import checkpoints, evaluations, history, mixture, software
from marathon.markup import language_name, missing, note, section, text
from marathon.numerals import as_number, change, count, fixed, moment, percent, plural, power
from marathon.runfiles import Record, RunFiles, mapping, number, read_run

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
    parts = [section(anchor, title, *draw(run)) for anchor, (title, draw) in sections.items()]
    foot = "<footer>Made by Marathon from the files of the run. GAP marks a fact that they do not hold.</footer>"
    return "\n".join([_header(run), f"<nav>{links}</nav>", *parts, foot])


def _header(run: RunFiles) -> str:
    return "\n".join(
        [
            f'<header><p class="above">Marathon · a run, {text(_state(run))}</p><h1>{text(_name(run))}</h1>',
            f'<p class="lede">{_summary(run)}</p>',
            markup.tiles(_tiles(run)),
            markup.facts(_settings(run)),
            "</header>",
        ]
    )


def _name(run: RunFiles) -> str:
    return run.config.name if run.config else run.run_dir.resolve().name


def _state(run: RunFiles) -> str:
    ends, done = run.events("train_end"), _last_number(run.train, "step")
    planned = run.config.train.steps if run.config else None
    if ends and (planned is None or (number(ends[-1], "steps") or 0) >= planned):
        return "finished"
    if done is None:
        return gap("no training step recorded yet")
    return f"at step {count(done)} of {count(planned)}" if planned else f"at step {count(done)}"


def _summary(run: RunFiles) -> str:
    start, end = _at_start(run, "bpb_mean"), _last_number(run.valid, "bpb_mean")
    words = [
        f"{text(_parameters(run))} parameters, {text(count(_last_number(run.train, 'tokens')))} tokens, "
        f"{len(run.languages) or text(gap('no language named'))} languages."
    ]
    if len(run.valid) > 1 and start is not None and end is not None:
        words.append(
            f"Bits per byte of held-out text, the mean of all languages, went from {text(fixed(start))} "
            f"to {text(fixed(end))}."
        )
    return " ".join(words)


def _tiles(run: RunFiles) -> list[tuple[str, Any, str]]:
    start, end = _at_start(run, "bpb_mean"), _last_number(run.valid, "bpb_mean")
    changed = f"{change(start, end)} since step 0" if len(run.valid) > 1 else gap("one validation only")
    world = number(run.last("train_start"), "world_size")
    energy = _ended(run, "energy_kwh")
    hours = _ended(run, "device_hours")
    return [
        ("Bits per byte, mean", fixed(end), changed),
        ("Training loss", fixed(_last_number(run.train, "loss")), "nats per token, last line"),
        ("Tokens seen", count(_last_number(run.train, "tokens")), plural(_last_number(run.train, "step"), "step")),
        ("Tokens per second", count(_median(run, "tokens_per_s")), f"median, {plural(world, 'device')}"),
        ("MFU", percent(_median(run, "mfu")), "median; formula below"),
        ("Energy", _with_unit(energy, "kWh", 2), f"{_with_unit(hours, 'device-hours', 2)}"),
    ]


def _settings(run: RunFiles) -> list[tuple[str, Any]]:
    start, corpus = run.last("train_start"), run.last("corpus")
    starts = run.events("train_start")
    rows: list[tuple[str, Any]] = [
        ("Parameters", _parameters(run)),
        *_configured(run),
        ("World size", count(number(start, "world_size"))),
        ("Documents", count(number(corpus, "documents"))),
        ("Bytes of text", count(number(corpus, "bytes"))),
        ("Licences of the text", _licences(corpus)),
        ("Corpus hash", _shortened(corpus.get("corpus_hash"))),
        ("Config hash", _shortened(run.fact("config_hash", "frozen", "changed"))),
        ("Commit", _shortened(run.fact("commit", "frozen", "changed", "train_start"))),
        ("Started", moment(number(starts[0], "time")) if starts else gap("training has not started")),
        ("Last record", moment(number(run.ledger[-1], "time")) if run.ledger else gap("no ledger")),
    ]
    return rows


def _configured(run: RunFiles) -> list[tuple[str, Any]]:
    if run.config is None:
        return [("Settings", run.config_gap)]
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
    curves = {code: _curve(run, code) for code in run.languages}
    mean = _points(run.valid, lambda r: number(r, "bpb_mean"))
    x = _tokens_axis(run)
    y = axis([v for points in [*curves.values(), mean] for _, v in points], from_zero=True)
    first, last = run.valid[0], run.valid[-1]
    overview = line_chart(
        "Bits per byte of held-out text, over tokens seen",
        [
            *(Line(code, points, "thin") for code, points in curves.items()),
            Line("mean", mean, "main", "mean"),
            *_extremes(curves),
        ],
        x,
        y,
        hover=_readings(mean, lambda v: f"mean {fixed(v, 3)}"),
        marks=_restarts(run),
        height_px=280,
    )
    panels = "".join(_language_panel(run, code, points, mean, x, y) for code, points in curves.items())
    return [
        note(
            "How many bits the model needs for one byte of text that it was not trained on: lower is better. It can be "
            "compared between tokenizers and, with care, between languages: Greek and Cyrillic letters take two bytes "
            "each, so the same text costs fewer bits a byte there."
        ),
        overview,
        note(
            f"Each pale line is a language, the strong one their unweighted mean. {_marks_note(run)}"
            f"{plural(len(run.valid), 'validation')}, from step {count(number(first, 'step'))} "
            f"to step {count(number(last, 'step'))}."
        ),
        "<h3>Each language</h3>",
        note(
            f"All panels share their axes, {count(x.low)} to {count(x.high)} tokens across and {fixed(y.low, 0)} to "
            f"{fixed(y.high)} bits per byte up; the pale line is the mean of all languages. Beneath: value at step 0 → "
            "value at the last validation, change, and the 95 % bootstrap interval over documents "
            "from the evaluation."
        ),
        f'<ul class="panels">{panels}</ul>',
    ]


def _curve(run: RunFiles, code: str) -> list[Point]:
    return _points(run.valid, lambda record: number(mapping(record, "bpb"), code))


def _extremes(curves: dict[str, list[Point]]) -> list[Line]:
    ends = {code: points[-1][1] for code, points in curves.items() if points and math.isfinite(points[-1][1])}
    if len(ends) < 2:
        return []
    chosen = (max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__))
    return [Line(code, curves[code], "pale", language_name(code)[:12]) for code in chosen]


def _language_panel(run: RunFiles, code: str, points: list[Point], mean: list[Point], x: Axis, y: Axis) -> str:
    start, end = (number(mapping(record, "bpb"), code) for record in (run.valid[0], run.valid[-1]))
    at_start = fixed(start) if number(run.valid[0], "step") == 0 else gap("no validation at step 0")
    changed = (
        change(start, end) if len(run.valid) > 1 and not at_start.startswith("GAP") else gap("one validation only")
    )
    name = language_name(code)
    drawing = panel(
        Line(f"Bits per byte, {name}", points),
        Line("mean", mean, "pale"),
        x,
        y,
        hover=_readings(points, lambda v: fixed(v, 3)),
    )
    return (
        f"<li><b>{text(name)}</b><span>{text(code)}</span>{drawing}"
        f"<p><span>{text(at_start)} → {text(fixed(end))}</span>"
        f'<span class="change">{text(changed)}</span></p><p class="note">{text(_interval(run, code))}</p>'
        "<output></output></li>\n"
    )


def _interval(run: RunFiles, code: str) -> str:
    """The interval of the newest evaluation, with its step where that is not the last validation's."""
    for record in reversed(run.evaluations):
        found = mapping(mapping(record, "bpb"), code)
        if found:
            ends = f"{fixed(number(found, 'low'))} to {fixed(number(found, 'high'))}"
            step = number(record, "step")
            return ends if step == number(run.valid[-1], "step") else f"{ends} at step {count(step)}"
    return gap("no interval: not evaluated")


def _loss(run: RunFiles) -> list[str]:
    points = _points(run.train, lambda r: number(r, "loss"))
    if not points:
        return [missing("metrics.jsonl holds no training line yet")]
    bad = [number(r, "step") for r in run.train if not math.isfinite(number(r, "loss") or 0.0)]
    return [
        _chart(run, "Training loss in nats per token, over tokens seen", "loss", lambda v: fixed(v, 3), height_px=280),
        note(
            f"As logged, not smoothed: {plural(len(run.train), 'line')}. {_marks_note(run)}"
            + (f"Not finite at step {', '.join(count(s) for s in bad[:8])}: the line breaks there." if bad else "")
        ),
        '<div class="small-charts">',
        _chart(run, "Learning rate", "lr", lambda v: f"{v:.3g}", from_zero=True, height_px=110),
        _chart(run, "Norm of the gradient before clipping", "grad_norm", fixed, from_zero=True, height_px=110),
        "</div>",
    ]


def _throughput(run: RunFiles) -> list[str]:
    per_token = as_number(run.fact("flops_per_token", "train_start"))
    flops = _ended(run, "flops")
    return [
        '<div class="small-charts">',
        _chart(run, "Tokens per second, all devices", "tokens_per_s", count, from_zero=True, height_px=140),
        _chart(run, "MFU in percent", "mfu", lambda v: fixed(v, 1), from_zero=True, height_px=140, scale=100),
        _chart(run, "Memory of the fullest device in GiB", "memory_gib", fixed, from_zero=True, height_px=140),
        "</div>",
        note(
            "MFU, model FLOPs utilisation = tokens per second × FLOPs per token ÷ (devices × peak of one device). "
            "FLOPs per token = 6 × parameters that multiply + 6 × blocks × heads × head width × sequence length: "
            "forward and backward with causal attention; recomputation is not counted."
        ),
        markup.facts(
            [
                ("Peak of one device", _with_unit(run.fact("peak_tflops", "train_start"), "TFLOP/s", 2)),
                ("Source of the peak", run.fact("peak_source", "train_start")),
                ("FLOPs per token", power(per_token)),
                ("FLOPs in all", flops if as_number(flops) is None else power(as_number(flops))),
            ]
        ),
    ]


def _chart(
    run: RunFiles,
    title: str,
    key: str,
    form: Callable[[float], str],
    from_zero: bool = False,
    height_px: int = 240,
    scale: float = 1,
) -> str:
    points = [(at, v * scale) for at, v in _points(run.train, lambda r: number(r, key))]
    if not points:
        return f"<figure><figcaption>{text(title)}</figcaption>{missing(f'no {key} in metrics.jsonl')}</figure>"
    return line_chart(
        title,
        [Line(key, points)],
        _tokens_axis(run),
        axis([v for _, v in points], 5 if height_px > 200 else 3, from_zero, rounded=True),
        hover=_readings(points[:: -(-len(points) // 300)], form),
        marks=_restarts(run),
        height_px=height_px,
    )


def _readings(points: Sequence[Point], form: Callable[[float], str]) -> list[tuple[float, str]]:
    """What is shown where a pointer comes near a point."""
    return [(at, f"{count(at)} tokens: {form(v)}") for at, v in points if math.isfinite(v)]


def _points(records: Sequence[Record], value: Callable[[Record], float | None]) -> list[Point]:
    found = [(number(record, "tokens"), value(record)) for record in records]
    return [(at, v) for at, v in found if at is not None and v is not None and math.isfinite(at)]


def _tokens_axis(run: RunFiles) -> Axis:
    """Across, all charts show the same tokens, so that they can be read one above the other."""
    return axis([t for r in (*run.train, *run.valid) if (t := number(r, "tokens")) is not None], from_zero=True)


def _restarts(run: RunFiles) -> list[float]:
    return [t for r in run.events("train_start") if (number(r, "step") or 0) > 0 and (t := number(r, "tokens"))]


def _marks_note(run: RunFiles) -> str:
    return "Dashed verticals are restarts from a checkpoint. " if _restarts(run) else ""


def _at_start(run: RunFiles, key: str) -> float | None:
    return number(run.valid[0], key) if run.valid and number(run.valid[0], "step") == 0 else None


def _last_number(records: Sequence[Record], key: str) -> float | None:
    return number(records[-1], key) if records else None


def _median(run: RunFiles, key: str) -> float | None:
    found = [v for r in run.train if (v := number(r, key)) is not None and math.isfinite(v)]
    return median(found) if found else None


def _parameters(run: RunFiles) -> str:
    recorded = as_number(run.fact("parameters", "train_start"))
    return gap("recorded when training starts") if recorded is None else count(recorded)


def _ended(run: RunFiles, key: str) -> Any:
    value = run.fact(key, "train_end", "train_stop")
    return gap("recorded when training ends") if value is None else value


def _with_unit(value: Any, unit: str, digits: int) -> Any:
    found = as_number(value)
    return value if found is None else f"{fixed(found, digits)} {unit}"


def _licences(corpus: Record) -> str:
    """Of the corpus as a whole, or of its sources one by one."""
    stated = corpus.get("licences")
    found = (
        stated
        if isinstance(stated, list)
        else [s.get("licence") for s in mapping(corpus, "sources").values() if isinstance(s, dict)]
    )
    return ", ".join(sorted({str(licence) for licence in found if licence}))


def _shortened(value: Any) -> Any:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 and not value.startswith("GAP:") else value
