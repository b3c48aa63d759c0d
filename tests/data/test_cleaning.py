import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import CleanConfig, CorpusConfig, IdentifyConfig, OptOutConfig, TokenizerConfig
from data import cleaning as module
from data.audit import Audit
from data.cleaning import Cleaning, clean_unit, cleaning
from data.documents import Documents
from data.files import sha256
from data.manifest import Manifest
from data.pipeline import prepare
from data.sources import Document

GERMAN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen, heute wie morgen und an jedem anderen Tag des Jahres."
)


def document(number: int, lang: str, text: str, problem: str = "") -> Document:
    return Document(f"id/{number}", lang, text, "small", f"file:{number}", {}, "CC0-1.0", problem=problem)


def rejected_in(unit: Path) -> list[dict[str, Any]]:
    with zstandard.open(unit / "rejected.jsonl.zst", "rt") as file:
        return [json.loads(line) for line in file]


def rows_in(unit: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(unit.glob("*.parquet"))}


def clean(folder: Path, documents: list[Document], steps: list[Cleaning], cfg: CorpusConfig) -> Audit:
    folder.mkdir(parents=True)
    clean_unit(documents, steps, folder, dataclasses.replace(cfg, max_bad_share=1.0), None)
    return Audit.load(folder / "audit.json")


def require_conserved(audit: Audit, rejected: list[dict[str, Any]], n_rows: int) -> None:
    """Every step: what came is what left and what was rejected, and what left is what comes to the next."""
    sums = list(audit.sums().items())
    for step, counts in sums:
        assert counts["came"][0] == counts["left"][0] + sum(n for n, _ in counts["rejected"].values()), step
        for reason, (n, _) in counts["rejected"].items():
            assert n == sum((line["step"], line["reason"]) == (step, reason) for line in rejected)
    for (_, before), (step, after) in pairwise(sums):
        assert after["came"] == before["left"], step
    assert len(rejected) == sum(n for _, counts in sums for n, _ in counts["rejected"].values())
    assert sums == [] or sums[-1][1]["left"][0] == n_rows


def _shorten(d: Document) -> str:
    d.text = d.text.replace("x", "")
    return "" if d.text else "nothing_left"


def _relabel(d: Document) -> str:
    d.lang = "mt" if "m" in d.text else d.lang
    return "too_long" if len(d.text) > 6 else ""


TOYS: list[Cleaning] = [
    ("shorten", _shorten),
    ("relabel", _relabel),
    ("last", lambda d: "ends_in_e" * d.text.endswith("é")),
]
RECORDS = st.lists(st.tuples(st.sampled_from(["de", "fr"]), st.text("amxé ", min_size=1, max_size=9), st.booleans()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.integers(1, 30))
def test_every_document_is_a_row_or_a_rejected_line(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    smoke_config: RunConfig,
    records: list[tuple[str, str, bool]],
    flush: int,
) -> None:
    monkeypatch.setattr(module, "FLUSH_CHARACTERS", flush)
    folder = tmp_path_factory.mktemp("units") / "00000"
    documents = [document(i, *record[:2], "not_json" * record[2]) for i, record in enumerate(records)]
    audit = clean(folder, documents, TOYS, smoke_config.corpus)
    rejected, rows = rejected_in(folder), rows_in(folder)
    kept = [row for of_file in rows.values() for row in of_file]
    require_conserved(audit, rejected, len(kept))
    assert sorted([row["id"] for row in kept] + [line["id"] for line in rejected]) == sorted(
        f"id/{i}" for i in range(len(records))
    )
    assert all(row["n_bytes"] == len(row["text"].encode()) for row in kept)
    if audit.steps:
        assert sum(row["n_bytes"] for row in kept) == list(audit.sums().values())[-1]["left"][1] or not kept
    for name, of_file in rows.items():
        numbers = [int(row["id"][3:]) for row in of_file]
        assert numbers == sorted(numbers), "documents keep their order"
        assert all(("m" in row["text"]) <= name.startswith("mt.") for row in of_file)
    assert audit.records.get("small", {"read": 0})["read"] == len(records)


def test_a_rejected_document_stands_aside_with_step_reason_and_place(tmp_path: Path, smoke_config: RunConfig) -> None:
    documents = [document(7, "de", "x" * 9), document(8, "de", "{" * 500, "not_json"), document(9, "de", "\ud800m" * 9)]
    clean(tmp_path / "00000", documents, TOYS, smoke_config.corpus)
    found = [tuple(line.values()) for line in rejected_in(tmp_path / "00000")]
    assert found == [
        ("shorten", "nothing_left", "small", "id/7", "file:7", ""),
        ("read", "not_json", "small", "id/8", "file:8", "{" * 200),
        ("relabel", "too_long", "small", "id/9", "file:9", "\\ud800m" * 9),
    ]


def test_a_source_that_is_bad_throughout_stops_early(
    tmp_path: Path, smoke_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EARLY_STOP_RECORDS", 10)
    n_read = 0

    def endless() -> Any:
        nonlocal n_read
        while True:
            n_read += 1
            yield document(n_read, "", "{", "not_json")

    cfg = dataclasses.replace(smoke_config.corpus, max_bad_share=0.5)
    with pytest.raises(UserError, match="10 of 10 records are bad"):
        clean_unit(endless(), [], tmp_path, cfg, None)
    assert n_read == 10


def full(folder: Path) -> CleanConfig:
    (folder / "ids.txt").write_text("id/0\n")
    return CleanConfig(
        opt_out=OptOutConfig(ids=[str(folder / "ids.txt")]),
        repair_unicode=True,
        identify=IdentifyConfig(model="langid"),
        thresholds="package:data/thresholds.yaml",
        privacy=["email"],
    )


def test_steps_run_in_the_order_of_the_config(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Each document would be rejected, or changed, by all steps from one on: the first of them has it."""
    texts = {
        "opt_out": ("de", "zu kurz"),
        "wanted": ("fr", "trop court"),
        "quality": ("de", "zu kurz"),
        "privacy": ("de", GERMAN + " Schreiben Sie an nobody@example.org, wenn Sie mögen.\x07 Danke sehr."),
    }
    lines = [{"id": f"id/{i}", "lang": lang, "text": text} for i, (lang, text) in enumerate(texts.values())]
    more = [{"id": f"more/{i}", "lang": "de", "text": f"{GERMAN} Das ist die Seite {i}."} for i in range(30)]
    cfg = make_config([*lines, *more])
    cfg.corpus.clean, cfg.corpus.languages = full(tmp_path), ["de"]
    cfg.tokenizer = TokenizerConfig(vocab_size=400, character_coverage=1.0, special_tokens=["<email>"])
    names = [name for name, _ in cleaning(Documents(cfg).cfg)]
    assert names == ["opt_out", "repair", "identify", "wanted", "quality", "privacy"]
    folder = prepare(cfg)
    assert folder is not None
    store = Documents(cfg).store
    audit, unit = Audit.load(store.folder / "audit.json"), store.folder / "units" / "small" / "00000"
    assert list(audit.steps) == ["read", *names, "dedup"]
    rejected, rows = rejected_in(unit), rows_in(unit)
    assert {line["id"]: line["step"] for line in rejected} == {"id/0": "opt_out", "id/1": "wanted", "id/2": "quality"}
    kept = {row["id"]: row["text"] for of_file in rows.values() for row in of_file}
    assert "<email>" in kept["id/3"] and "\x07" not in kept["id/3"] and "nobody" not in kept["id/3"]
    assert audit.steps["privacy"]["de"].changed == audit.steps["repair"]["de"].changed == 1
    of_units = Audit.load(unit / "audit.json")
    require_conserved(of_units, rejected, len(kept))
    assert Manifest.load(folder).steps == audit.sums()
    ids, limits = sorted(Manifest.load(folder).lists, key=lambda entry: str(entry["file"]))
    assert ids == {
        "file": "ids.txt",
        "sha256": sha256(tmp_path / "ids.txt"),
        "date": "GAP: no date in it",
        "n_entries": 1,
        "n_unreadable": 0,
    }
    assert limits.keys() == {"file", "sha256"} and limits["file"] == "thresholds.yaml"


def test_nothing_is_done_that_is_not_asked_for(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config([{"lang": "de", "text": "x"}])
    assert [name for name, _ in cleaning(cfg.corpus)] == ["wanted"]
