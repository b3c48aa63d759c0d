"""The report: whole and offline whatever a run's folder holds, true to it, and marked where it is silent."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.compose import compose, freeze
from configs.errors import UserError
from ledger.pages import environment
from marathon import report
from marathon.cli import main
from marathon.report import Frame, RunFiles, axis, write_report

CHARTS: Any = environment(Path(report.__file__).parent).get_template("charts.svg.j2").module
VOID = {"meta", "link", "br", "hr", "img", "input"}
EU46 = re.findall(
    r"\S+",
    "bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv ca eu gl cy is nb nn sq mk sr bs uk "
    "be ru tr ka hy lb rm fo se sr-Latn",
)


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    facts = {"loss": 8.0 - step / 10, "lr": 0.002, "grad_norm": 1.0, "tokens_per_s": 9100.0, "mfu": 0.4137}
    return {"kind": "train", "step": step, "tokens": step * 100, **facts, "memory_gib": 0.8, "time": 1.0} | changes


def valid_line(step: int, bpb: dict[str, Any]) -> dict[str, Any]:
    consumed = dict.fromkeys(bpb, step * 10)
    finite = [v for v in bpb.values() if isinstance(v, float) and math.isfinite(v)]
    mean = sum(finite) / len(finite) if finite else None
    return {
        "kind": "valid",
        "step": step,
        "tokens": step * 100,
        "bpb": bpb,
        "bpb_mean": mean,
        "consumed": consumed,
        "time": 1.0,
    }


def evaluation(step: int, codes: list[str]) -> dict[str, Any]:
    entry = {"bpb": 2.25, "low": 2.11, "high": 2.39, "documents": 6, "bytes": 2000, "tokens": 800}
    task = {"acc": 0.5625, "acc_stderr": 0.124, "chance": 0.5, "items": 16}
    return {
        "checkpoint": f"step-{step}",
        "step": step,
        "tokens": step * 100,
        "bpb": dict.fromkeys(codes, entry),
        "bpb_mean": 2.25,
        "tasks": {f"agreement_{code}": task for code in codes},
        "families": {"agreement": {"acc": 0.5625, "chance": 0.5, "languages": len(codes)}},
    }


def write_run(
    folder: Path, metrics: list[Any] = (), ledger: list[Any] = (), evaluations: list[Any] = (), tail: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + tail)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    (folder / "eval").mkdir(exist_ok=True)
    for n, record in enumerate(evaluations):
        (folder / "eval" / f"{n}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    codes = ["de", "fr", "mt"]
    ledger = [
        {"event": "frozen", "time": 0.0, "config_hash": "c0ffee" * 10, "software": {"torch": "2.13.0"}, "commit": "ab" * 20},
        {"event": "corpus", "time": 1.0, "corpus_hash": "de" * 32, "documents": 720, "tokens": 5000, "bytes": 15000, "licences": ["CC0-1.0"]},
        {"event": "mixture", "time": 2.0, "rows": [{"language": c, "available_tokens": 400, "share": 1 / 3, "tokens": 800, "epochs": 2.0, "cap": "capped" if c == "mt" else ""} for c in codes]},
        {"event": "train_start", "time": 3.0, "step": 0, "tokens": 0, "world_size": 2, "parameters": 1314944, "hardware": {"processor": "EPYC"}, "software": {"torch": "2.13.0"}, "commit": "ab" * 20, "peak_tflops": 0.11, "peak_source": "measured", "flops_per_token": 9.56e6, "container": "GAP: no container announced itself"},
        {"event": "checkpoint", "time": 4.0, "name": "step-20", "step": 20, "tokens": 2000, "sha256": "12" * 32, "order_hash": "34" * 32},
        {"event": "changed", "time": 5.0, "settings": {"cluster.devices_per_node": ["2", "1"]}},
        {"event": "train_start", "time": 6.0, "step": 20, "tokens": 2000, "cluster": "leonardo", "layout": "ZeRO-2, recompute=none", "world_size": 1, "parameters": 1314944, "hardware": {"processor": "EPYC"}, "software": {"torch": "2.13.0"}, "commit": "ab" * 20, "container": "GAP: no container announced itself"},
        {"event": "train_end", "time": 7.0, "steps": 40, "tokens": 4000, "flops": 9.4e12, "device_hours": 0.06, "energy": {"devices": {"kwh": 0.42, "joules_per_token": 378.0, "meter": "NVML, boards", "metered_share": 1.0}, "nodes": {"kwh": "GAP: no meter"}, "facility": {"kwh": "GAP: no meter"}}},
    ]  # fmt: skip
    metrics = [valid_line(0, {"de": 4.81, "fr": 5.12, "mt": 6.03})]
    metrics += [train_line(s) for s in range(10, 41, 10)]
    metrics += [valid_line(40, {"de": 1.62, "fr": 1.71, "mt": 2.45})]
    return write_run(tmp_path / "run", metrics, ledger, [evaluation(20, codes), evaluation(40, codes)])


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def drawings(html: str) -> list[str]:
    """Every outermost <svg> of a page."""
    found, depth, start = [], 0, 0
    for tag in re.finditer(r"<svg|</svg>", html):
        if depth == 0:
            start = tag.start()
        depth += 1 if tag[0] == "<svg" else -1
        if depth == 0:
            found.append(html[start : tag.end()])
    return found


def read_page(run_dir: Path) -> Page:
    """Writes the report and holds it to what every report keeps: well-formed, without requests, no bare NaN."""
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    for drawing in drawings(html):
        ET.fromstring(drawing)
    assert all(a.startswith(("#", "data:", "../../corpora/")) for a in page.addresses), page.addresses
    assert not re.search(r"https?:|url\(|@import", html) and "<script" not in html
    assert "default-src 'none'" in html
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html), "a drawing holds a number that is none"
    assert not re.search(r">\s*(nan|inf|None)\s*<", html)
    assert not list(run_dir.glob(".report*"))
    return page


def test_full_run_shows_its_facts(full_run: Path) -> None:
    text = read_page(full_run).text
    for fact in (
        "1,314,944",
        "4.81 → 1.62", "5.12 → 1.71", "6.03 → 2.45", "−66.3 %", "−66.6 %", "−59.4 %",
        "2.11 to 2.39", "German", "Maltese",
        "41.4 %", "0.11 TFLOP/s", "9.56M", "9.4T", "0.06 device-hours",
        "12" * 32, "34" * 32, "ab" * 20, "c0ffee" * 10, "de" * 32,
        "CC0-1.0", "33.3 %", "2.00 capped",
        "0.562 ± 0.072 (chance 0.5)",
        "Training starts at step 20 on leonardo, world size 1, ZeRO-2, recompute=none", "cluster.devices_per_node from 2 to 1",
        "GAP: no meter", "GAP: no container announced itself", "torch", "EPYC",
    ):  # fmt: skip
        assert fact in text, fact


def test_no_path_of_the_machine_is_shown(full_run: Path) -> None:
    with (full_run / "ledger.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "release", "time": 9.0, "checkpoint": "step-40", "path": str(full_run / "release")})
            + "\n"
        )
    assert "Released step-40" in read_page(full_run).text
    assert str(full_run) not in write_report(full_run).read_text()


def test_state_is_read_from_the_ledger(full_run: Path) -> None:
    assert "a run, finished" in read_page(full_run).text
    lines = (full_run / "ledger.jsonl").read_text().splitlines()
    (full_run / "ledger.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    page = read_page(full_run).text
    assert "a run, at step 40" in page and "GAP: not recorded yet" in page


def test_config_gives_name_and_settings(full_run: Path) -> None:
    cfg = compose(["experiment=smoke", "name=my-run"])
    freeze(cfg, full_run / "config.yaml")
    text = read_page(full_run).text
    for fact in ("my-run", f"{cfg.train.tokens:,}", "0.004, wsd", "unimax", "fp32, gradients travel in fp32"):
        assert fact in text, fact
    assert "Slovenian" in text, "a configured language without a value still has its panel"


def test_config_of_another_version_is_a_gap(full_run: Path) -> None:
    (full_run / "config.yaml").write_text("nmae: typo\n")
    assert "GAP: config.yaml does not fit this version: " in read_page(full_run).text


def test_missing_files_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = read_page(tmp_path / "empty").text
    for reason in (
        "no validation yet", "no training line yet", "no checkpoint has been evaluated", "records no checkpoint",
        "ledger.jsonl is missing", "neither a planned mixture", "config.yaml", "training has not started",
    ):  # fmt: skip
        assert re.search(f"GAP: [^<]*{reason}", text), reason


def test_after_the_text_alone_the_page_shows_what_was_made_of_it(tmp_path: Path) -> None:
    counts = {"documents": 700, "tokens": 5000, "bytes": 15000}
    step = {"came": [720, 16000], "left": [711, 15500], "changed": 4, "rejected": {"too_short": [9, 500]}}
    corpus = {"event": "corpus", "time": 1.0, "documents_folder": "documents-k", **counts, "held_out_documents": 11}
    corpus |= {"licences": ["CC0-1.0"], "removed_documents": 0, "steps": {"quality": step}}
    corpus |= {"sources": {"udhr": counts}, "languages": {"mt": counts}}
    run_dir = write_run(
        tmp_path / "runs" / "small", ledger=[{"event": "frozen", "time": 0.0, "config_hash": "c0ffee"}, corpus]
    )
    freeze(compose(["experiment=smoke"]), run_dir / "config.yaml")
    assert "GAP: no audit" in read_page(run_dir).text
    (tmp_path / "corpora" / "documents-k").mkdir(parents=True)
    (tmp_path / "corpora" / "documents-k" / "audit.html").touch()
    page = read_page(run_dir)
    assert "../../corpora/documents-k/audit.html" in page.addresses
    for fact in (
        "text prepared, training has not started", "700 documents, 5,000 tokens, 1 language", "Maltese", "udhr",
        "CC0-1.0", "quality 720 711 98.8 % 15,500 4 too_short 9", "Documents held out 11",
    ):  # fmt: skip
        assert fact in page.text, fact
    told = page.text.partition("Software and machine")[0]
    assert told.count("GAP") == told.count("GAP: training has not started") == 1, "one is enough"


def test_no_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    write_run(tmp_path / "somewhere")
    (tmp_path / "somewhere" / "config.yaml").touch()
    with pytest.raises(UserError, match="nowhere is no folder; runs there: somewhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("given", ["my-run", "{scratch}/runs/my-run", "experiment=smoke name=my-run"])
def test_a_run_is_given_by_name_folder_or_arguments(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARATHON_SCRATCH", str(tmp_path))
    run_dir = write_run(tmp_path / "runs" / "my-run", [valid_line(0, {"de": 4.0})])
    assert main(["report", *given.format(scratch=tmp_path).split()]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").exists()


def test_later_lines_win_after_a_restart(tmp_path: Path) -> None:
    metrics = [train_line(10), train_line(20, loss=7.77), valid_line(20, {"de": 9.0}), train_line(30, loss=6.66)]
    metrics += [train_line(20, loss=5.55), valid_line(20, {"de": 3.0})]
    run = RunFiles(write_run(tmp_path, metrics, tail='{"kind": "train", "step": 30, "lo'))
    assert [(r["step"], r["loss"]) for r in run.train] == [(10, 7.0), (20, 5.55)], (
        "step 30 belongs to a course given up"
    )
    assert [r["bpb"]["de"] for r in run.valid] == [3.0]


def test_validation_and_training_line_of_one_step_live_together(tmp_path: Path) -> None:
    for order in ([train_line(10), valid_line(10, {"de": 3.0})], [valid_line(10, {"de": 3.0}), train_line(10)]):
        run = RunFiles(write_run(tmp_path, order))
        assert len(run.train) == len(run.valid) == 1


def test_what_is_not_finite_is_told(tmp_path: Path) -> None:
    metrics = [
        valid_line(0, {"de": 4.0, "fr": 4.0}),
        train_line(10),
        train_line(20, loss=None),
        train_line(30, loss=math.inf),
    ]
    metrics += [train_line(40), valid_line(40, {"de": math.nan, "fr": 2.0})]
    text = read_page(write_run(tmp_path, metrics)).text
    assert "Not finite, and not drawn, at step 20, 30" in text
    assert "4.00 → GAP: not a finite number" in text and "4.00 → 2.00" in text


def test_one_validation_claims_no_change(tmp_path: Path) -> None:
    text = read_page(write_run(tmp_path, [valid_line(0, {"de": 4.0})])).text
    assert "4.00 → 4.00" in text and "GAP: needs a start and an end" in text and "0.0 %" not in text


def test_a_start_that_was_not_measured_is_a_gap(tmp_path: Path) -> None:
    text = read_page(write_run(tmp_path, [valid_line(40, {"de": 2.0}), valid_line(80, {"de": 1.0})])).text
    assert "GAP: no validation at step 0 → 1.00" in text and "−50" not in text


def test_an_interval_of_another_step_says_so(tmp_path: Path) -> None:
    metrics = [valid_line(0, {"de": 4.0}), valid_line(40, {"de": 2.0})]
    text = read_page(write_run(tmp_path, metrics, evaluations=[evaluation(20, ["de"])])).text
    assert "2.11 to 2.39 at step 20" in text


def test_46_languages_each_have_start_end_and_interval(tmp_path: Path) -> None:
    starts = {code: 5.0 + n / 100 for n, code in enumerate(EU46)}
    ends = {code: 1.0 + n / 100 for n, code in enumerate(EU46)}
    metrics = [valid_line(0, starts), valid_line(100, ends)]
    text = read_page(write_run(tmp_path, metrics, evaluations=[evaluation(100, EU46)])).text
    assert len(EU46) == 46
    for code in EU46:
        assert f"{starts[code]:.2f} → {ends[code]:.2f}" in text and f" {code} " in text


def test_text_from_files_cannot_become_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'&"
    ledger = [
        {"event": "frozen", "commit": bad, "config_hash": bad},
        {
            "event": "train_start",
            "step": 5,
            "hardware": {bad: bad},
            "software": {bad: bad},
            "container": bad,
            "peak_source": bad,
        },
        {"event": "checkpoint", "name": bad, "sha256": bad, "order_hash": bad, "step": 5, "tokens": 1},
        {"event": "mixture", "rows": [{"language": bad, "share": 1.0}]},
        {"event": "changed", "settings": {bad: [bad, bad]}},
        {"event": "train_stop", "reason": bad},
    ]
    metrics = [valid_line(0, {bad: 3.0, "de": 3.0}), valid_line(9, {bad: 2.0, "de": 2.0})]
    run = write_run(tmp_path, metrics, [{"time": 1.0, **record} for record in ledger], [evaluation(9, [bad])])
    page = read_page(run)
    assert "<script>alert" not in write_report(run).read_text() and bad in page.text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.tuples(st.floats(0, 1), st.floats(0, 1)), is_evaluated=st.booleans())
def test_files_cut_anywhere_give_a_whole_page(full_run: Path, kept: tuple[float, float], is_evaluated: bool) -> None:
    beside = full_run.with_name("cut")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(full_run, beside, ignore=None if is_evaluated else shutil.ignore_patterns("eval"))
    for name, share in zip(("metrics.jsonl", "ledger.jsonl"), kept, strict=True):
        whole = (full_run / name).read_bytes()
        (beside / name).write_bytes(whole[: round(len(whole) * share)])
    read_page(beside)


@given(st.lists(st.floats(width=32), max_size=6), st.booleans())
def test_an_axis_holds_its_values(values: list[float], from_zero: bool) -> None:
    found = axis(values, from_zero=from_zero)
    for value in (*filter(math.isfinite, values), *found.ticks):
        assert -0.001 <= found.down(value, 1) <= 1.001
    assert len(found.ticks) <= 14


def test_axes_have_round_numbers() -> None:
    assert axis([0, 983_040]).ticks == (0, 200_000, 400_000, 600_000, 800_000)
    assert axis([2.8, 8.1], from_zero=False).ticks == (3, 4, 5, 6, 7, 8)
    assert axis([0.0, 0.0]).ticks[-1] == 1
    assert axis([]).ticks[0] == 0


def test_a_long_line_is_thinned_and_keeps_its_spike_and_its_end() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[7_321], points[500] = (7_321.0, 5.0), (500.0, math.nan)
    drawing = CHARTS.line_chart("loss", [(points, "main")], Frame(axis([0, 10_000]), axis([0, 5]), 280))
    path = re.search(r' d="M([^"]+)"', drawing)
    assert path
    places = [tuple(map(float, place.split())) for place in path[1].split("L")]
    assert len(places) < 700 and places == sorted(places) and places[-1][0] == 999.9
    assert (732.1, 0.0) in places and "nan" not in drawing


def test_rows_and_bars_survive_gaps() -> None:
    drawing = CHARTS.dot_row(0, axis([0, 1]), "de", math.nan, math.nan, math.nan, "GAP")
    drawing += CHARTS.dot_row(1, axis([0, 1]), "fr", 0.5, 0.4, 0.6, "0.5", 0.25)
    assert drawing.count("<circle") == drawing.count('class="interval"') == drawing.count('class="plan"') == 1
    assert "<rect" not in CHARTS.bar(None, None, 0.0) and 'width="50.00%"' in CHARTS.bar(0.2, None, 0.4)


def test_a_curve_without_a_finite_value_is_not_drawn() -> None:
    drawing = CHARTS.panel("loss", [([(0.0, math.nan)], "main")], Frame(axis([0, 1]), axis([]), 58))
    assert "<path" not in drawing and "<circle" not in drawing
