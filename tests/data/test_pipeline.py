import copy
import hashlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.compose import freeze
from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import HoldoutConfig, TokenizerConfig
from data.manifest import TRAIN, VALID, Manifest, marks, verify, verify_files
from data.pipeline import corpus_dir, corpus_key, language_table, prepare
from data.shards import SUFFIXES, read_sidecar
from data.tokenizer import Encoder

PREPARE = """
import sys
from pathlib import Path
from configs.compose import load
from data.pipeline import prepare
prepare(load(Path(sys.argv[1])))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def documents(n: int, lang: str = "de") -> list[object]:
    return [{"id": f"{lang}/{i}", "lang": lang, "text": f"Dokument Nummer {i} über Äpfel."} for i in range(n)]


def elsewhere(cfg: RunConfig, scratch: Path) -> RunConfig:
    cfg = copy.deepcopy(cfg)
    cfg.cluster.scratch = str(scratch)
    return cfg


def test_the_smoke_corpus_is_what_its_manifest_says(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    assert visible(corpus) == ["manifest.json", "quarantine.jsonl", "shards", "tokenizer"]
    assert len(manifest.shards) == 48 and manifest.languages(TRAIN) == manifest.languages(VALID)
    assert manifest.n_read == {"udhr": 1426} and sum(manifest.other_languages["udhr"].values()) == 22 * 31
    assert manifest.tokenizer.vocab_size == 4096
    facts = manifest.facts()
    assert facts["documents"] == 24 * 25 and facts["held_out_documents"] == 24 * 6
    assert facts["sources"]["udhr"]["tokens"] == sum(manifest.tokens_by_language(TRAIN).values()) == facts["tokens"]
    assert facts["licences"] == ["LicenseRef-UDHR"]
    encoder = Encoder(corpus / "tokenizer")
    for shard in manifest.shards:
        rows = list(read_sidecar(corpus / shard.stem, "n_bytes", "n_tokens"))
        assert (len(rows), sum(b for b, _ in rows), sum(t for _, t in rows)) == (
            shard.n_docs, shard.n_bytes, shard.n_tokens,
        )  # fmt: skip
    assert encoder.bos_id == manifest.tokenizer.bos_id
    verify(corpus)
    table = language_table(manifest)
    assert len(table.splitlines()) == 26 and "0 records in quarantine, 682 documents in other languages" in table


@pytest.mark.parametrize("victim", ["shards/mt.udhr.train.bin", "shards/mt.udhr.valid.idx", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_is_named(corpus: Path, tmp_path: Path, victim: str) -> None:
    copied = shutil.copytree(corpus, tmp_path / "copy")
    path, known = copied / victim, marks(copied)
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    changed = [name for name, mark in marks(copied).items() if mark != known[name]]
    assert changed == [victim]
    verify_files(copied, known.keys() - {victim})
    after = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=f"{path}: its sha256 is {after}, the manifest says {before}"):
        verify_files(copied, changed)
    with pytest.raises(UserError, match=str(path)):
        verify(copied)


def test_marks_name_each_file_of_the_manifest_with_size_and_time(corpus: Path) -> None:
    found = marks(corpus)
    files = {
        p.relative_to(corpus).as_posix(): p.stat() for d in ("shards", "tokenizer") for p in (corpus / d).iterdir()
    }
    assert found == {name: [info.st_size, info.st_mtime_ns] for name, info in files.items()}
    assert len(found) > 48 * 3


def test_files_that_vanished_are_named_together(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus, tmp_path / "copy")
    n_files, gone = len(marks(corpus)), [f"shards/bg.udhr.train{suffix}" for suffix in SUFFIXES]
    for name in gone[:2]:
        (copied / name).unlink()
    with pytest.raises(UserError, match=f"2 of {n_files} files in {copied}: {gone[0]}: No such file.*; {gone[1]}: "):
        marks(copied)
    with pytest.raises(UserError, match=gone[1]):
        verify_files(copied, gone[1:])
    shutil.rmtree(copied / "tokenizer")
    (copied / gone[2]).unlink()
    with pytest.raises(UserError, match=r"; and \d more") as error:
        verify(copied)
    assert "restore the file" in error.value.repair and "marathon data" in error.value.repair


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}', '{"shards": [{"stem": "a"}]}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "manifest.json")):
        Manifest.load(tmp_path)


def test_a_complete_corpus_is_returned_at_once(corpus: Path, smoke_config: RunConfig) -> None:
    before = (corpus / "manifest.json").stat().st_mtime_ns
    start = time.perf_counter()
    assert prepare(smoke_config) == corpus == corpus_dir(smoke_config)
    assert time.perf_counter() - start < 0.1
    assert (corpus / "manifest.json").stat().st_mtime_ns == before


def test_a_killed_process_leaves_nothing_that_counts(corpus: Path, smoke_config: RunConfig, tmp_path: Path) -> None:
    smoke_config = elsewhere(smoke_config, tmp_path)
    corpora = tmp_path / "corpora"
    for phase in ("quarantine.jsonl", "tokenizer/tokenizer.json", "shards/.el.udhr.train.bin"):
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(smoke_config,))
        process.start()
        while process.is_alive() and not list(corpora.glob(f".*/{phase}")):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "killed in the middle"
        assert visible(corpora) == ["inputs.json"]
        assert len(list(corpora.glob(".*/"))) == 1, "one leftover, whatever was killed before"
    again = prepare(smoke_config)
    assert visible(corpora) == [again.name, "inputs.json"] == [corpus.name, "inputs.json"]
    assert not list(corpora.glob(".*/")), "leftovers are gone"
    assert Manifest.load(again) == Manifest.load(corpus)


def test_the_pipeline_starts_without_torch(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    freeze(make_config(documents(40)), tmp_path / "config.yaml")
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path / "config.yaml")], check=True, stdout=-3)


def test_two_processes_at_once_do_not_harm_each_other(
    corpus: Path, smoke_config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    smoke_config = elsewhere(smoke_config, tmp_path)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=prepare, args=(smoke_config,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert Manifest.load(corpus_dir(smoke_config)) == Manifest.load(corpus)
    assert capfd.readouterr().out.count("tokenizer: training") == 1, "the second waited for the first"


def test_a_machine_without_file_locks_is_no_harm(
    corpus: Path, smoke_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    smoke_config = elsewhere(smoke_config, tmp_path)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=prepare, args=(smoke_config,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert Manifest.load(corpus_dir(smoke_config)) == Manifest.load(corpus)
    assert not list((tmp_path / "corpora").glob(".*/"))


def test_a_corpus_is_named_by_content_and_not_by_place(
    make_config: Callable[..., RunConfig], tmp_path: Path, corpus: Path
) -> None:
    cfg = make_config(documents(40))
    key, first = corpus_key(cfg), Manifest.load(prepare(cfg))
    source = Path(cfg.corpus.sources["small"].path)
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    shutil.copy(source, moved)
    cfg.corpus.sources["small"].path = str(moved)
    cfg.tokenizer.path = str(shutil.copy(cfg.tokenizer.path, tmp_path / "copy.model"))
    cfg.cluster.scratch = str(tmp_path / "other")
    assert corpus_key(cfg) == key and Manifest.load(prepare(cfg)) == first
    assert str(tmp_path) not in (corpus_dir(cfg) / "manifest.json").read_text()
    moved.write_bytes(moved.read_bytes().replace(b"39", b"93"))
    changed = Manifest.load(prepare(cfg))
    assert corpus_key(cfg) != key and changed.corpus_hash != first.corpus_hash


@pytest.mark.parametrize("change", ["licence", "share", "languages", "bad_share", "vocabulary"])
def test_every_setting_of_the_corpus_is_part_of_its_key(make_config: Callable[..., RunConfig], change: str) -> None:
    cfg = make_config(documents(3))
    key = corpus_key(cfg)
    if change == "licence":
        cfg.corpus.sources["small"].licence = "CC-BY-4.0"
    elif change == "share":
        cfg.corpus.holdout.share = 0.2
    elif change == "languages":
        cfg.corpus.languages = ["de"]
    elif change == "bad_share":
        cfg.corpus.max_bad_share = 0.5
    else:
        cfg.tokenizer.path = ""
    assert corpus_key(cfg) != key


def test_bad_records_are_counted_in_the_manifest_and_told(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_config([*documents(50), b"{", {"lang": "de", "text": ""}, {"lang": "de", "text": "a\u2581b"}])
    cfg.corpus.max_bad_share = 0.1
    folder = prepare(cfg)
    assert Manifest.load(folder).quarantine == {"small": {"contains_u2581": 1, "not_json": 1, "text_empty": 1}}
    aside = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [a["location"] for a in aside] == [f"source.jsonl:{n}" for n in (51, 52, 53)]
    assert "3 records in quarantine" in capsys.readouterr().out


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


def test_sources_keep_their_licence_and_shards_their_source(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cfg = make_config([*documents(30), *documents(30, "fr")])
    other = make_config([*documents(30)], licence="CC-BY-4.0", origin="there").corpus.sources["small"]
    shutil.copy(tmp_path / "source.jsonl", tmp_path / "other.jsonl")
    other.path = str(tmp_path / "other.jsonl")
    make_config([*documents(30), *documents(30, "fr")])
    cfg.corpus.sources["other"] = other
    manifest = Manifest.load(prepare(cfg))
    assert {(s.source, s.language, s.licence, s.origin) for s in manifest.shards} == {
        ("small", "de", "CC0-1.0", "here"), ("small", "fr", "CC0-1.0", "here"), ("other", "de", "CC-BY-4.0", "there"),
    }  # fmt: skip
    assert [s.source for s in manifest.shards_of("de", TRAIN)] == ["other", "small"]


def test_the_tokenizer_learns_from_training_documents_alone(make_config: Callable[..., RunConfig]) -> None:
    def tokenizer_hash(words: list[str]) -> str:
        cfg = make_config([{"lang": "de", "text": f"{word} " * 50, "part": i} for i, word in enumerate(words)])
        cfg.corpus.holdout = HoldoutConfig(by_field="part", by_values=[1])
        cfg.tokenizer = TokenizerConfig(vocab_size=301, character_coverage=1.0)
        return Manifest.load(prepare(cfg)).tokenizer.sha256["tokenizer.model"]

    learned = "Donaudampfschifffahrtsgesellschaftskapitän Kraftfahrzeughaftpflichtversicherung"
    first = tokenizer_hash([learned, "Eichhörnchen"])
    assert first == tokenizer_hash([learned, "Streichholzschächtelchen"])
    assert first != tokenizer_hash([learned + " Eichhörnchen", "Streichholzschächtelchen"])


def test_a_source_name_that_cannot_be_a_file_name_is_refused(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config(documents(3))
    cfg.corpus.sources["../up"] = cfg.corpus.sources.pop("small")
    with pytest.raises(UserError, match=r"corpus\.sources\.\.\./up"):
        corpus_key(cfg)
