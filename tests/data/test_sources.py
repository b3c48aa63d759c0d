import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import SourceConfig
from data.pipeline import documents
from data.quarantine import EARLY_STOP_RECORDS, Quarantine
from data.sources import Document

GOOD = {"id": "x", "lang": "de", "text": "gut"}


def read(cfg: RunConfig, tmp_path: Path, max_bad_share: float = 1.0) -> tuple[list[Document], list[dict[str, Any]]]:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_bad_share)
    found = list(documents(cfg, quarantine))
    quarantine.close()
    return found, [json.loads(line) for line in quarantine.path.read_text().splitlines()]


def bad(**fields: object) -> dict[str, object]:
    return {k: v for k, v in (GOOD | {"id": "y"} | fields).items() if v is not None}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"id": "y", "lang": "de", "text": "\xff"}', "invalid_utf8"),
        (["text"], "not_an_object"),
        (bad(text=None), "text_missing"),
        (bad(text=7), "text_not_a_string"),
        (bad(text=" \n\t\u00a0"), "text_empty"),
        (bad(text="a \ud83d b"), "lone_surrogate"),
        (bad(text="a \u2581 b"), "contains_u2581"),
        (bad(lang=None), "language_missing"),
        (bad(lang="../../etc"), "language_malformed"),
        (bad(lang=["de"]), "language_malformed"),
        (bad(id=[1]), "id_malformed"),
        (bad(id="\udc00"), "id_malformed"),
        (bad(id="x"), "id_repeated"),
    ],
)
def test_a_bad_record_is_set_aside_with_reason_and_place(
    make_config: Callable[..., RunConfig], tmp_path: Path, line: object, reason: str
) -> None:
    found, aside = read(make_config([GOOD, line, b"", bad(id="z")]), tmp_path)
    assert [d.id for d in found] == ["x", "z"]
    assert [(a["source"], a["location"], a["reason"]) for a in aside] == [("small", "source.jsonl:2", reason)]


def test_control_characters_and_any_script_are_good(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    texts = ["a\0b", "\t\x7f\u200f\u0085", "שלום \U0001f469\u200d\U0001f4bb", "\r\n x"]
    found, aside = read(make_config([{"lang": "mul", "text": t} for t in texts]), tmp_path)
    assert [d.text for d in found] == texts and not aside
    assert [d.id for d in found] == [f"source.jsonl:{n}" for n in (1, 2, 3, 4)]


def test_too_many_bad_records_stop_the_stage(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cfg = make_config([bad(id=str(i), text="" if i < 3 else "gut") for i in range(100)])
    read(cfg, tmp_path, max_bad_share=0.03)
    with pytest.raises(
        UserError, match=r"(?s)small: 3 of 100 records are bad \(text_empty 3\).*source\.jsonl:1"
    ) as error:
        read(cfg, tmp_path, max_bad_share=0.029)
    assert "max_bad_share" in str(error.value)


def test_a_source_that_is_bad_throughout_stops_early(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cfg = make_config([{"content": "wrong field"}] * (EARLY_STOP_RECORDS + 5000))
    with pytest.raises(UserError, match=rf"{EARLY_STOP_RECORDS} of {EARLY_STOP_RECORDS} records are bad"):
        read(cfg, tmp_path, max_bad_share=0.5)


def test_other_languages_are_counted_and_ids_may_repeat_between_sources(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cfg = make_config([GOOD, bad(lang="fr")])
    cfg.corpus.sources["again"] = cfg.corpus.sources["small"]
    cfg.corpus.languages = ["de"]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0)
    assert [(d.source, d.id) for d in documents(cfg, quarantine)] == [("small", "x"), ("again", "x")]
    assert quarantine.other_languages == {"small": {"fr": 1}, "again": {"fr": 1}}


def test_fields_are_named_by_the_source(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    line = "\ufeff".encode() + json.dumps({"key": 7, "body": "text", "lang": "xx", "more": [1]}).encode()
    cfg = make_config([line], text_field="body", id_field="key", lang="mt")
    (found,), _ = read(cfg, tmp_path)
    assert (found.id, found.lang, found.text) == ("7", "mt", "text")
    assert found.fields == {"key": 7, "lang": "xx", "more": [1]}


def test_a_text_file_is_a_document(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.txt").write_text("zwei\n\nAbsätze\n")
    (folder / "a.txt").write_bytes(b"latin1 \xe4")
    found, aside = read(make_config(format=SourceFormat.text, path=str(folder), lang="de"), tmp_path)
    assert [(d.id, d.text) for d in found] == [("sub/b.txt", "zwei\n\nAbsätze\n")]
    assert [(a["location"], a["reason"]) for a in aside] == [("a.txt", "invalid_utf8")]


@pytest.fixture
def parquet(make_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    texts = [f"text {i}".encode() for i in range(2500)]
    texts[1234] = b"\xff\xfe"
    column = pa.array(texts, pa.binary()).view(pa.string())
    table = pa.table({"text": column, "id": [str(i) for i in range(2500)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1100)
    return make_config(format=SourceFormat.parquet, path=str(tmp_path / "a.parquet"), lang="de")


def test_parquet_is_read_by_row_groups_and_one_bad_string_costs_one_row(parquet: RunConfig, tmp_path: Path) -> None:
    found, aside = read(parquet, tmp_path)
    assert [d.text for d in found] == [f"text {i}" for i in range(2500) if i != 1234]
    assert [(a["location"], a["reason"]) for a in aside] == [("a.parquet:1235", "invalid_utf8")]


def test_a_missing_column_is_named(parquet: RunConfig, tmp_path: Path) -> None:
    parquet.corpus.sources["small"].text_field = "body"
    with pytest.raises(UserError, match="no column body; there are text, id"):
        read(parquet, tmp_path)


@pytest.mark.parametrize("damage", ["footer", "page"])
def test_a_damaged_parquet_file_is_named(parquet: RunConfig, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    if damage == "page":
        content[4:40] = b"\xff" * 36
    path.write_bytes(content if damage == "page" else content[:-100])
    with pytest.raises(UserError, match=r"(?s)a\.parquet.*row group 0"):
        read(parquet, tmp_path)


HUB = """
import sys
from pathlib import Path
import datasets
from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.quarantine import Quarantine
from data.sources import read_documents
root = Path(sys.argv[1])
rows = datasets.Dataset.from_dict({"id": ["a", "b"], "lang": ["de", "fr"], "text": ["eins", "deux"]})
rows.save_to_disk(root / "saved")
datasets.DatasetDict({"train": rows}).save_to_disk(root / "dict")
rows.to_parquet(root / "folder" / "train.parquet")
for name in ("saved", "dict", "folder"):
    source = SourceConfig(format=SourceFormat.hub, path=str(root / name), licence="CC0-1.0", origin="here")
    found = read_documents("hub", source, Quarantine(root / "q", 0), online=False)
    assert [(d.id, d.lang, d.text) for d in found] == [("a", "de", "eins"), ("b", "fr", "deux")], name
source.hub_split = "test"
try:
    list(read_documents("hub", source, Quarantine(root / "q", 0), online=False))
except UserError as error:
    assert "hub_split" in str(error)
else:
    raise AssertionError("a split that is not there")
assert not list((root / "cache").rglob("*.arrow")), "no copy of the corpus in a cache"
"""


def test_hub_datasets_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", HUB, str(tmp_path)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_no_hub_is_asked_from_an_offline_machine(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cfg = make_config(format=SourceFormat.hub, path="some/dataset", hub_revision="0123abc")
    assert isinstance(cfg.corpus.sources["small"], SourceConfig) and not cfg.cluster.online
    with pytest.raises(UserError, match=r"hf download --repo-type dataset some/dataset --revision 0123abc"):
        read(cfg, tmp_path)
