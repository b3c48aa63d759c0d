import dataclasses
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from configs.errors import UserError
from configs.schema import RunConfig
from data.audit import Audit
from data.manifest import TRAIN, Manifest
from data.pipeline import corpus_dir, prepare
from data.shards import read_sidecar
from tests.data.prepared import (
    documents,
    documents_dir,
    ids_of,
    prepared,
    visible,
)


def test_the_documents_stand_beside_the_corpus_with_what_became_of_them(corpus: Path, smoke_config: RunConfig) -> None:
    folder = documents_dir(smoke_config)
    assert folder == corpus.parent / Manifest.load(corpus).documents
    assert visible(folder) == ["audit.html", "audit.json", "documents.json", "dropped", "repeated", "units"]
    unit = folder / "units" / "udhr" / "00000"
    assert len(list(unit.glob("*.parquet"))) == 48 and {"audit.json", "rejected.jsonl.zst"} <= set(visible(unit))
    n_rows = sum(pq.read_metadata(path).num_rows for path in unit.glob("*.parquet"))
    assert n_rows == 24 * 31 == Audit.load(folder / "audit.json").sums()["dedup"]["left"][0]
    assert not list(corpus.parent.glob(".*/")), "nothing half-done is left"


def test_bad_records_are_counted_in_the_manifest_and_told(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_config([*documents(50), b"{", {"lang": "de", "text": ""}, {"lang": "de", "text": "a\u2581b"}])
    cfg.corpus.max_bad_share = 0.1
    folder = prepare(cfg)
    assert folder is not None
    assert Manifest.load(folder).sources["small"]["records"] == {
        "read": 53, "contains_u2581": 1, "not_json": 1, "text_empty": 1,
    }  # fmt: skip
    with zstandard.open(documents_dir(cfg) / "units" / "small" / "00000" / "rejected.jsonl.zst", "rt") as file:
        aside = [json.loads(line) for line in file]
    assert [a["location"] for a in aside] == [f"source.jsonl:{n}" for n in (51, 52, 53)]
    assert "left out by read: contains_u2581 1, not_json 1, text_empty 1" in capsys.readouterr().out
    cfg.corpus.max_bad_share = 0.01
    with pytest.raises(UserError, match="3 of 53 records are bad") as told:
        prepare(cfg)
    assert f"{documents_dir(cfg)}/units/small/*/rejected.jsonl.zst" in told.value.repair
    assert corpus_dir(cfg) == folder, "a limit decides about no document"


@pytest.mark.parametrize(
    ("lines", "languages", "said"),
    [
        ([], [], "0 records in small; documents for training .* none at all"),
        (documents(40), ["de", "fr"], r"40 records .* fr 0 \+ 0; in other languages: none"),
        (documents(40), ["fr"], r"fr 0 \+ 0; in other languages: de 40"),
        (documents(1), [], r"1 records .* de [01] \+ [01]; "),
    ],
)
def test_a_language_without_documents_stops_the_stage(
    make_config: Callable[..., RunConfig], lines: list[object], languages: list[str], said: str
) -> None:
    cfg = make_config(lines)
    cfg.corpus.languages = languages
    with pytest.raises(UserError, match=said):
        prepare(cfg)
    assert visible(Path(cfg.cluster.scratch) / "corpora") == ["inputs.json"]


def test_a_damaged_source_leaves_no_corpus(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    cfg = make_config(documents(40))
    whole = subprocess.run(["gzip", "-c", str(tmp_path / "source.jsonl")], capture_output=True, check=True).stdout
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    cfg.corpus.sources["small"].path = str(tmp_path / "cut.jsonl.gz")
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: the compressed file is cut off"):
        prepare(cfg)
    assert visible(Path(cfg.cluster.scratch) / "corpora") == ["inputs.json"]


def second_source(cfg: RunConfig, folder: Path, lines: Sequence[object], **changes: object) -> None:
    """Adds a source `other` to a config."""
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"path": str(folder / "other.jsonl"), **changes}
    cfg.corpus.sources["other"] = dataclasses.replace(cfg.corpus.sources["small"], **settings)  # type: ignore[arg-type]


def test_sources_keep_their_licence_and_shards_their_source(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cfg = make_config([*documents(30), *documents(30, "fr")])
    others = [{"lang": "de", "text": f"Ein anderes, Nummer {i}"} for i in range(30)]
    second_source(cfg, tmp_path, others, licence="CC-BY-4.0", origin="there", licence_field="rights")
    manifest = prepared(cfg)
    assert {(s.source, s.language, *s.licences) for s in manifest.shards} == {
        ("small", "de", "CC0-1.0"), ("small", "fr", "CC0-1.0"), ("other", "de", "CC-BY-4.0"),
    }  # fmt: skip
    assert {name: source["origin"] for name, source in manifest.sources.items()} == {"small": "here", "other": "there"}
    assert [s.source for s in manifest.shards_of("de", TRAIN)] == ["other", "small"]
    assert {name: source["licence"] for name, source in manifest.sources.items()} == {
        "small": "CC0-1.0", "other": "CC-BY-4.0",
    }  # fmt: skip
    assert {name: source.get("licence_field") for name, source in manifest.sources.items()} == {
        "small": None, "other": "rights",
    }  # fmt: skip
    assert manifest.facts()["sources"]["other"]["licences"] == ["CC-BY-4.0"]


@pytest.mark.parametrize(("better", "worse"), [("small", "other"), ("other", "small")])
def test_of_copies_in_two_sources_the_one_of_the_better_licence_stays(
    make_config: Callable[..., RunConfig], tmp_path: Path, better: str, worse: str
) -> None:
    cfg = make_config(documents(40))
    copies = [{"id": f"copy/{i}", "lang": "de", "text": f"DOKUMENT nummer {i}  über Äpfel!"} for i in range(10, 50)]
    second_source(cfg, tmp_path, copies, licence="CC-BY-4.0")
    licences = {"small": "CC0-1.0", "other": "CC-BY-4.0"}
    cfg.corpus.dedup.licence_order = [licences[better], licences[worse]]
    folder = prepare(cfg)
    assert folder is not None
    manifest = Manifest.load(folder)
    assert {name: len(ids_of(folder, name)) for name in licences} == {better: 40, worse: 10}
    assert manifest.steps["dedup"]["rejected"]["exact_duplicate"][0] == 30
    stems = [folder / shard.stem for shard in manifest.shards]
    alike = [row for stem in stems for row in read_sidecar(stem, "licence", "n_alike")]
    assert sorted(alike).count((licences[better], 2)) == 30 and len(alike) == 50


def test_ids_that_come_again_in_a_source_are_left_out_and_counted(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    again = [{"id": f"de/{i}", "lang": "de", "text": f"Ein neuer Text {i} unter einer alten Nummer"} for i in range(7)]
    cfg = make_config([*documents(40), *again])
    second_source(cfg, tmp_path, again)  # another source may use the same ids for its own
    cfg.corpus.dedup.exact = False
    folder = prepare(cfg)
    assert folder is not None
    assert ids_of(folder, "small") == sorted(d["id"] for d in documents(40))  # type: ignore[index]
    assert len(ids_of(folder, "other")) == 7
    assert Manifest.load(folder).steps["dedup"]["rejected"] == {
        "id_repeated": [7, sum(len(d["text"].encode()) for d in again)]
    }


def test_a_source_name_that_cannot_be_a_file_name_is_refused(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config(documents(3))
    cfg.corpus.sources["../up"] = cfg.corpus.sources.pop("small")
    with pytest.raises(UserError, match=r"corpus\.sources\.\.\./up"):
        corpus_dir(cfg)


@pytest.mark.parametrize("remove", [False, True])
def test_text_of_evaluations_is_marked_or_left_out(
    make_config: Callable[..., RunConfig], tmp_path: Path, remove: bool
) -> None:
    question = "Wie viele Bären leben heute noch in den Wäldern der hohen Karpaten und wer zählt sie"
    asked = [{"id": f"q{i}", "lang": "de", "text": f"{question}, fragt Heft {i}."} for i in range(2)]
    cfg = make_config([*documents(40), *asked])
    (tmp_path / "questions.txt").write_text(question)
    cfg.corpus.decontaminate.against, cfg.corpus.decontaminate.remove = [str(tmp_path / "questions.txt")], remove
    folder = prepared(cfg)
    ids = {row[0] for s in folder.shards for row in read_sidecar(corpus_dir(cfg) / s.stem, "id")}
    assert ({"q0", "q1"} & ids == set()) is remove and len(ids) == (40 if remove else 42)
    assert folder.steps["questions"]["rejected"].keys() == {"evaluation_text" if remove else "evaluation_text_kept"}


@pytest.mark.parametrize("given", ["example.com", "example.com/blog", "lists", "*.txt"])
def test_a_list_of_opt_outs_that_is_no_file_is_told_as_one(
    make_config: Callable[..., RunConfig], tmp_path: Path, given: str
) -> None:
    (tmp_path / "lists").mkdir()
    for name in ("lists/a", "lists/b", "a.txt", "b.txt"):
        (tmp_path / name).touch()
    cfg = make_config(documents(3))
    cfg.corpus.clean.opt_out.domains = [f"{tmp_path}/{given}" if given in ("lists", "*.txt") else given]
    with pytest.raises(UserError, match="lists and models are files") as told:
        corpus_dir(cfg)
    assert given in told.value.found and "docs/corpus.md" in told.value.repair


def test_a_list_that_is_named_without_a_folder_decides_by_what_it_holds(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, keys = make_config(documents(3)), set()
    for content in ("a\n", "bc\n"):
        Path("ids.txt").write_text(content)
        cfg.corpus.clean.opt_out.ids = ["ids.txt"]
        keys.add(corpus_dir(cfg))
    assert len(keys) == 2
