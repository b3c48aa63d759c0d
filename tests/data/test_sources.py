import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.sources import SPACE_MARK, Document, read_file, source_files, units

GOOD = {"id": "x", "lang": "de", "text": "gut"}
N_HOSTILE = 10_000


def source(path: Path, format_: SourceFormat = SourceFormat.jsonl, **settings: Any) -> SourceConfig:
    return SourceConfig(format=format_, path=str(path), licence="CC0-1.0", origin="here", **settings)


def read(cfg: SourceConfig) -> tuple[list[Document], list[Document]]:
    """Documents, and what is none."""
    found = [document for file in units(cfg) for document in read_file("small", cfg, file)]
    for d in found:
        d.text.encode("utf-8", "surrogatepass" if d.problem else "strict")
        assert d.problem or (d.text.strip() and d.id and d.lang and SPACE_MARK not in d.text)
        assert (d.source, d.problem == "") == ("small", d.lang != "")
    return [d for d in found if not d.problem], [d for d in found if d.problem]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def bad(**fields: object) -> dict[str, object]:
    return {k: v for k, v in (GOOD | {"id": "y"} | fields).items() if v is not None}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not_json"),
        (b"\0" * 50, "not_json"),
        (b'{"id": "y", "lang": "de", "text": "\xff"}', "invalid_utf8"),
        (b'{"id": "y", "lang": "de", "text": "\xed\xa0\x80"}', "invalid_utf8"),
        (["text"], "not_an_object"),
        (bad(text=None), "text_missing"),
        (bad(text=7), "text_not_a_string"),
        (bad(text=" \n\t\u00a0"), "text_empty"),
        (bad(text=""), "text_empty"),
        (bad(text="a \ud83d b"), "lone_surrogate"),
        (bad(title="\udc00"), "lone_surrogate"),
        (bad(text="a \u2581 b"), "contains_u2581"),
        (bad(lang=None), "language_missing"),
        (bad(lang="../../etc"), "language_malformed"),
        (bad(lang=["de"]), "language_malformed"),
        (bad(id=[1]), "id_malformed"),
        (bad(id=True), "id_malformed"),
        (bad(id=10**40), "id_malformed"),
        (bad(url=["http://x.org"]), "url_malformed"),
        (b" " * 9 + b'"' + b"x" * (1 << 20) + b'"', "line_too_long"),
    ],
)
def test_a_bad_record_is_told_with_reason_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: object, reason: str
) -> None:
    monkeypatch.setattr("data.files.MAX_RECORD_BYTES", 1 << 20)
    path = write_lines(tmp_path / "source.jsonl", [GOOD, line, b"", b" \r", bad(id="z")])
    found, aside = read(source(path))
    assert [d.id for d in found] == ["x", "z"]
    assert [(d.source, d.location, d.problem) for d in aside] == [("small", "source.jsonl:2", reason)]
    assert len(aside[0].text) <= 1000


def test_a_bad_text_is_told_whole_so_that_its_bytes_can_be_counted(tmp_path: Path) -> None:
    text = "lang " * 500
    _, (aside,) = read(source(write_lines(tmp_path / "a.jsonl", [{"text": text}])))
    assert (aside.problem, aside.text) == ("language_missing", text)


def test_control_characters_and_any_script_are_good(tmp_path: Path) -> None:
    texts = ["a\0b", "\t\x7f\u200f\u0085", "שלום \U0001f469\u200d\U0001f4bb", "\r\n x", "\ufeffa"]
    found, aside = read(source(write_lines(tmp_path / "a.jsonl", [{"lang": "mul", "text": t} for t in texts])))
    assert [d.text for d in found] == texts and not aside
    assert [d.id for d in found] == [f"a.jsonl:{n}" for n in (1, 2, 3, 4, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5), st.booleans(), st.booleans())
def test_json_means_what_pythons_own_parser_takes_it_for(
    folder: Path, fields: dict[str, Any], ascii_: bool, twice: bool
) -> None:
    line = json.dumps(fields | {"text": "gut", "id": "1", "lang": "de", "url": "http://x.org"}, ensure_ascii=ascii_)
    if twice:  # of two keys that are the same the last counts
        line = '{"text": 7, "more": 1,' + line[1:-1] + ', "more": [2]}'
    path = folder / "any.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogatepass").replace(b"\n", b" "))
    (found,), aside = read(source(path))
    expected = json.loads(line)
    assert repr(found.fields | {"text": found.text}) == repr(
        {k: v for k, v in expected.items() if k != "text"} | {"text": "gut"}
    )
    assert not aside


def test_fields_are_named_by_the_source(tmp_path: Path) -> None:
    record = {"key": 7, "body": "text", "lang": "xx", "more": [1], "rights": "MIT", "from": "https://x.org"}
    path = write_lines(
        tmp_path / "a.jsonl", ["\ufeff".encode() + json.dumps(record).encode(), {"body": "b", "key": ""}]
    )
    named = {"text_field": "body", "id_field": "key", "licence_field": "rights", "url_field": "from"}
    (first, second), _ = read(source(path, lang="mt", **named))
    assert (first.id, first.lang, first.text, first.licence, first.url) == ("7", "mt", "text", "MIT", "https://x.org")
    assert first.fields == {k: v for k, v in record.items() if k != "body"}
    assert (second.id, second.licence, second.url) == ("a.jsonl:2", "CC0-1.0", "")


def test_each_file_is_read_for_itself(tmp_path: Path) -> None:
    for name in ("b/2", "a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [GOOD])
    cfg = source(tmp_path)
    assert [f.name for f in units(cfg)] == ["a.jsonl", "b/2.jsonl"]
    assert [[d.location for d in read_file("s", cfg, f)] for f in units(cfg)] == [["a.jsonl:1"], ["b/2.jsonl:1"]]
    megatron = source(tmp_path / "x.bin", SourceFormat.megatron)
    (tmp_path / "x.bin").touch()
    assert [f.name for f in source_files(megatron)] == ["x.bin", "x.idx"] and len(units(megatron)) == 1


def test_a_text_file_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.files.MAX_RECORD_BYTES", 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("\ufeffzwei\n\nAbsätze\n")
    (tmp_path / "a.txt").write_bytes(b"latin1 \xe4")
    (tmp_path / "c.txt").write_text("x" * 101)
    (tmp_path / "d.txt").touch()
    found, aside = read(source(tmp_path, SourceFormat.text, lang="de"))
    assert [(d.id, d.text) for d in found] == [("sub/b.txt", "zwei\n\nAbsätze\n")]
    expected = [("a.txt", "invalid_utf8"), ("c.txt", "text_too_long"), ("d.txt", "text_empty")]
    assert [(d.location, d.problem) for d in aside] == expected


def hostile_line(rng: random.Random) -> bytes:
    """A record with something wrong, more or less, as one line."""
    record: Any = dict(GOOD)
    value = rng.choice(
        [None, 7, -0.0, float("nan"), True, [], {}, "", " ", "\0", SPACE_MARK, "\ud800", "\U0010ffff", "x" * 9999, 10**30,
         "de", "de_Latn", [[[]]] * 9, {"text": "x"}]
    )  # fmt: skip
    record[rng.choice(["text", "lang", "id", "url", "more", "\0", ""])] = value
    line = json.dumps(rng.choice([record, record, record, value]), ensure_ascii=rng.random() < 0.5)
    content = bytearray(line.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 0, 1, 5])):
        at = rng.randrange(len(content) + 1)
        content[at : at + rng.choice([0, 0, 1, 30])] = rng.choice(
            [b"", b"\xff", b"\0", b'"', b"\\u", b"[" * 2000, b"}", b","]
        )
    return bytes(content).replace(b"\n", b" ") or b"-"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_hostile_lines_are_all_counted_and_none_is_fatal(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    lines = [hostile_line(rng) for _ in range(N_HOSTILE)]
    lines = [b"-" if line.isspace() else line for line in lines]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b"\n".join(lines)))
    found, aside = read(source(tmp_path / f"a.jsonl{suffix}"))
    assert len(found) + len(aside) == len(lines)
    assert len(found) > 1000 and len({d.problem for d in aside}) >= 10
    places = sorted(int(d.location.rpartition(":")[2]) for d in found + aside)
    assert places == list(range(1, len(lines) + 1))


def test_hostile_text_files_are_all_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(500):
        (tmp_path / f"{i}.txt").write_bytes(hostile_line(rng)[: rng.choice([0, 1, 5, 50, 5000])])
    found, aside = read(source(tmp_path, SourceFormat.text, lang="de"))
    assert len(found) + len(aside) == 500 and len(found) > 100 and len(aside) > 20


@pytest.fixture
def parquet(tmp_path: Path) -> SourceConfig:
    texts = [f"text {i}".encode() for i in range(2500)]
    texts[1234] = b"\xff\xfe"
    column = pa.array(texts, pa.binary()).view(pa.string())
    table = pa.table({"text": column, "id": [str(i) for i in range(2500)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1100)
    return source(tmp_path / "a.parquet", SourceFormat.parquet, lang="de")


def test_parquet_is_read_by_row_groups_and_one_bad_string_costs_one_row(parquet: SourceConfig) -> None:
    found, aside = read(parquet)
    assert [d.text for d in found] == [f"text {i}" for i in range(2500) if i != 1234]
    assert [(d.location, d.problem) for d in aside] == [("a.parquet:1235", "invalid_utf8")]


def test_hostile_cells_cost_one_row_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.files.MAX_RECORD_BYTES", 5000)
    rng = random.Random(0)
    texts = [rng.choice([None, b"gut", b"", b"\xff", b"x" * 5001, b"\xed\xa0\x80", b"\0"]) for _ in range(N_HOSTILE)]
    columns = {
        "text": pa.array(texts, pa.binary()).view(pa.string()),
        "id": pa.array([rng.choice([None, i]) for i in range(N_HOSTILE)]),
        "when": pa.array(
            [rng.choice([0, None, 2**62]) if rng.random() < 0.01 else 0 for _ in texts], pa.timestamp("us")
        ),
        "deep": pa.array([[{"a": [i]}] for i in range(N_HOSTILE)]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3000)
    found, aside = read(source(tmp_path / "a.parquet", SourceFormat.parquet, lang="de"))
    assert len(found) + len(aside) == N_HOSTILE
    assert {d.problem for d in aside} == {
        "text_missing",
        "text_empty",
        "invalid_utf8",
        "text_too_long",
        "value_unreadable",
    }
    assert {d.text for d in found} == {"gut", "\0"} and found[0].fields["deep"][0]["a"]


def test_a_missing_column_is_named(parquet: SourceConfig) -> None:
    parquet.text_field = "body"
    with pytest.raises(UserError, match="no column body; there are text, id"):
        read(parquet)


@pytest.mark.parametrize("damage", ["footer", "page", "empty", "text"])
def test_a_damaged_parquet_file_is_named(parquet: SourceConfig, damage: str) -> None:
    path = Path(parquet.path)
    whole = path.read_bytes()
    broken = {
        "footer": whole[:-100],
        "page": whole[:4] + b"\xff" * 36 + whole[40:],
        "empty": b"",
        "text": b"no parquet",
    }
    path.write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"(?s)a\.parquet.*row group 0"):
        read(parquet)


HUB = """
import sys
from pathlib import Path
import datasets
from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.sources import read_file, source_files, units
root = Path(sys.argv[1])
rows = datasets.Dataset.from_dict({"id": ["a", "b", "c"], "lang": ["de", "fr", "fr"], "text": ["eins", "deux", ""]})
rows.save_to_disk(root / "saved")
datasets.DatasetDict({"train": rows}).save_to_disk(root / "dict")
rows.to_parquet(root / "folder" / "train.parquet")
def read(source):
    (unit,) = units(source)
    return [(d.id, d.lang, d.text, d.problem) for d in read_file("hub", source, unit)]
for name in ("saved", "dict", "folder"):
    source = SourceConfig(format=SourceFormat.hub, path=str(root / name), licence="CC0-1.0", origin="here")
    expected = [("a", "de", "eins", ""), ("b", "fr", "deux", ""), ("default/train:3", "", "", "text_empty")]
    assert read(source) == expected and source_files(source), name
source.hub_split = "test"
try:
    read(source)
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


def test_no_hub_is_asked_from_an_offline_machine() -> None:
    cfg = source(Path("some/dataset"), SourceFormat.hub, hub_revision="0123abc")
    assert [file.name for file in units(cfg)] == ["default/train"] and source_files(cfg) == []
    with pytest.raises(UserError, match=r"hf download --repo-type dataset some/dataset --revision 0123abc"):
        read(cfg)
