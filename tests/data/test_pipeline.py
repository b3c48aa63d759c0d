import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.enums import Packing
from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import HoldoutConfig, TokenizerConfig
from data.loader import Samples
from data.manifest import TRAIN, VALID, Manifest, marks, verify
from data.order import CYCLE, Phase
from data.pipeline import PLAN, corpus_dir, language_table, prepare
from data.shards import Shard, read_sidecar
from data.tokenizer import Encoder
from tests.data.corpora import write_files
from tests.data.prepared import (
    count_files,
    documents,
    documents_dir,
    elsewhere,
    hashes,
    ids_of,
    marks_of,
    outcome,
    prepared,
    start,
    visible,
)


def test_the_smoke_corpus_is_what_its_manifest_says(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    assert visible(corpus) == ["manifest.json", "shards", "tokenizer"]
    assert len(manifest.shards) == 48 and manifest.languages(TRAIN) == manifest.languages(VALID)
    assert manifest.sources["udhr"]["records"] == {"read": 1426}
    assert manifest.steps["wanted"]["rejected"]["language_not_wanted"][0] == 22 * 31
    assert manifest.tokenizer.vocab_size == 4096
    facts = manifest.facts()
    assert facts["documents"] == 24 * 25 and facts["held_out_documents"] == 24 * 6
    assert facts["sources"]["udhr"]["tokens"] == sum(manifest.tokens_by_part(TRAIN).values()) == facts["tokens"]
    assert facts["licences"] == ["LicenseRef-UDHR"]
    for shard in manifest.shards:
        rows = list(read_sidecar(corpus / shard.stem, "n_bytes", "n_tokens"))
        assert (len(rows), sum(b for b, _ in rows), sum(t for _, t in rows)) == (
            shard.n_docs, shard.n_bytes, shard.n_tokens,
        )  # fmt: skip
    assert Encoder(corpus / "tokenizer").bos_id == manifest.tokenizer.bos_id
    verify(corpus)
    table = language_table(manifest)
    assert len(table.splitlines()) == 26 and "left out by wanted: language_not_wanted 682" in table


def test_a_complete_corpus_is_returned_at_once(corpus: Path, smoke_config: RunConfig) -> None:
    before = (corpus / "manifest.json").stat().st_mtime_ns
    start = time.perf_counter()
    assert prepare(smoke_config) == corpus == corpus_dir(smoke_config)
    assert time.perf_counter() - start < 0.1
    assert (corpus / "manifest.json").stat().st_mtime_ns == before


def test_what_a_killed_process_did_stays_and_nothing_half_written_counts(
    corpus: Path, smoke_config: RunConfig, tmp_path: Path
) -> None:
    smoke_config = elsewhere(smoke_config, tmp_path / "scratch")
    smoke_config.tasks.workers = 1
    corpora = tmp_path / "scratch" / "corpora"
    documents = documents_dir(smoke_config).name
    phases = {
        f".{documents}/units/udhr/.00000.*/*": [],
        f".{documents}/dropped/*": [f".{documents}/units/udhr/00000"],
        ".*/tokenizer/tokenizer.json": [documents],
        ".*/entries/*": [documents, f".{corpus.name}/{PLAN}"],
    }
    for phase, done in phases.items():
        process = start(smoke_config)
        while process.poll() is None and not list(corpora.glob(phase)):
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "killed in the middle"
        assert all((corpora / name).exists() for name in done), phase
        assert set(visible(corpora)) <= {"inputs.json", "logs", documents} - ({documents} - set(done))
    marks_before = marks_of(corpora / documents)
    again = prepare(smoke_config)
    assert again is not None and marks_of(corpora / documents) == marks_before, "nothing is cleaned again"
    assert visible(corpora) == sorted([again.name, documents, "inputs.json"]) and again.name == corpus.name
    assert not list(corpora.glob(".*/")), "leftovers are gone"
    assert Manifest.load(again) == Manifest.load(corpus)
    verify(again)
    assert hashes(corpora / documents) == hashes(documents_dir(smoke_config)) == hashes(corpus.parent / documents)


def test_the_pipeline_starts_without_torch(make_config: Callable[..., RunConfig]) -> None:
    assert start(make_config(documents(40))).wait() == 0


def test_two_processes_at_once_do_not_harm_each_other(corpus: Path, smoke_config: RunConfig, tmp_path: Path) -> None:
    smoke_config = elsewhere(smoke_config, tmp_path / "scratch")
    smoke_config.tasks.workers = 1
    both = [start(smoke_config) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert Manifest.load(corpus_dir(smoke_config)) == Manifest.load(corpus)
    verify(corpus_dir(smoke_config))
    assert "".join(told).count("tokenizer: training") == 1, "the second waited for the first"
    assert not list((tmp_path / "scratch" / "corpora").glob(".*/"))


def test_a_machine_without_file_locks_is_no_harm(corpus: Path, smoke_config: RunConfig, tmp_path: Path) -> None:
    smoke_config = elsewhere(smoke_config, tmp_path / "scratch")
    smoke_config.tasks.workers = 1
    both = [start(smoke_config, "without locks") for _ in range(2)]
    for process in both:
        process.communicate()
    assert 0 in [process.returncode for process in both], "one goes on where the other finds its work taken away"
    again = prepare(smoke_config)
    assert again is not None and Manifest.load(again) == Manifest.load(corpus)
    verify(again)
    assert not list((tmp_path / "scratch" / "corpora").glob(".*/"))


def test_a_corpus_is_named_by_content_and_not_by_place(
    make_config: Callable[..., RunConfig], tmp_path: Path, corpus: Path
) -> None:
    cfg = make_config(documents(40))
    key, first = corpus_dir(cfg).name, prepared(cfg)
    source = Path(cfg.corpus.sources["small"].path)
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    shutil.copy(source, moved)
    cfg.corpus.sources["small"].path = str(moved)
    cfg.tokenizer.path = str(shutil.copy(cfg.tokenizer.path, tmp_path / "copy.model"))
    cfg.cluster.scratch = str(tmp_path / "other")
    assert corpus_dir(cfg).name == key and prepared(cfg) == first
    assert str(tmp_path) not in (corpus_dir(cfg) / "manifest.json").read_text()
    moved.write_bytes(moved.read_bytes().replace(b"39", b"93"))
    changed = prepared(cfg)
    assert corpus_dir(cfg).name != key and changed.corpus_hash != first.corpus_hash


CHANGES: dict[str, Callable[[RunConfig], object]] = {
    "licence": lambda cfg: setattr(cfg.corpus.sources["small"], "licence", "CC-BY-4.0"),
    "share": lambda cfg: setattr(cfg.corpus.holdout, "share", 0.2),
    "languages": lambda cfg: setattr(cfg.corpus, "languages", ["de"]),
    "cleaning": lambda cfg: setattr(cfg.corpus.clean, "repair_unicode", True),
    "copies": lambda cfg: setattr(cfg.corpus.dedup, "near", True),
    "vocabulary": lambda cfg: setattr(cfg.tokenizer, "path", ""),
    "shards": lambda cfg: setattr(cfg.corpus, "shard_bytes", 1 << 20),
}


OF_THE_SHARDS = {"vocabulary", "shards"}


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_that_decides_about_documents_is_part_of_the_key(
    make_config: Callable[..., RunConfig], change: str
) -> None:
    cfg = make_config(documents(3))
    key, cleaned = corpus_dir(cfg).name, documents_dir(cfg)
    CHANGES[change](cfg)
    assert corpus_dir(cfg).name != key
    assert (documents_dir(cfg) == cleaned) == (change in OF_THE_SHARDS)


def test_who_prepares_a_corpus_and_how_it_is_read_are_no_part_of_its_key(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config(documents(3))
    key = corpus_dir(cfg).name
    cfg.tasks.workers, cfg.train.seq_len, cfg.mixture.packing = 7, 128, Packing.best_fit
    assert corpus_dir(cfg).name == key


def test_the_tokenizer_learns_from_training_documents_alone(make_config: Callable[..., RunConfig]) -> None:
    def tokenizer_hash(words: list[str]) -> str:
        cfg = make_config([{"lang": "de", "text": f"{word} " * 50, "part": i} for i, word in enumerate(words)])
        cfg.corpus.holdout = HoldoutConfig(by_field="part", by_values=[1])
        cfg.tokenizer = TokenizerConfig(vocab_size=301, character_coverage=1.0)
        return prepared(cfg).tokenizer.sha256["tokenizer.model"]

    learned = "Donaudampfschifffahrtsgesellschaftskapitän Kraftfahrzeughaftpflichtversicherung"
    first = tokenizer_hash([learned, "Eichhörnchen"])
    assert first == tokenizer_hash([learned, "Streichholzschächtelchen"])
    assert first != tokenizer_hash([learned + " Eichhörnchen", "Streichholzschächtelchen"])


@pytest.fixture
def many_files(make_config: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    """A config over 12 files of three languages, with copies and repeated ids between the files."""
    cfg = make_config(path=str(write_files(tmp_path / "files", 12)))
    cfg.corpus.dedup.near = True
    return cfg


def test_any_number_of_workers_makes_the_same_corpus_bit_for_bit(many_files: RunConfig, tmp_path: Path) -> None:
    found = []
    for workers in (1, 3, 8):
        cfg = elsewhere(many_files, tmp_path / f"scratch-{workers}")
        cfg.tasks.workers = workers
        prepare(cfg)
        found.append(outcome(cfg))
    assert found[0] == found[1] == found[2]
    rejected = Manifest.load(corpus_dir(elsewhere(many_files, tmp_path / "scratch-1"))).steps["dedup"]["rejected"]
    assert rejected.keys() == {"id_repeated", "exact_duplicate", "near_duplicate"}


def test_kills_of_all_processes_at_any_moment_change_nothing(many_files: RunConfig, tmp_path: Path) -> None:
    expected = elsewhere(many_files, tmp_path / "undisturbed")
    prepare(expected)
    cfg = elsewhere(many_files, tmp_path / "killed")
    cfg.tasks.workers = 3
    corpora, draw, n_kills = tmp_path / "killed" / "corpora", random.Random(7), 0
    while n_kills < 6:
        process, n_files = start(cfg), count_files(corpora) + draw.randint(1, 60)
        while process.poll() is None and count_files(corpora) < n_files:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        n_kills += 1
    assert n_kills >= 3
    prepare(cfg)
    assert outcome(cfg) == outcome(expected)
    assert not list(corpora.glob(".*/")), "leftovers are gone"


def test_another_tokenizer_cleans_nothing_anew(many_files: RunConfig) -> None:
    first = prepare(many_files)
    cleaned = documents_dir(many_files)
    before = marks_of(cleaned)
    many_files.tokenizer = TokenizerConfig(vocab_size=400, character_coverage=1.0)
    second = prepare(many_files)
    assert first != second and first is not None and second is not None
    assert documents_dir(many_files) == cleaned and marks_of(cleaned) == before
    assert ids_of(first) == ids_of(second)
    assert Manifest.load(second).tokenizer.vocab_size == 400


def test_shards_have_a_size_and_together_the_content_of_one(many_files: RunConfig, tmp_path: Path) -> None:
    whole = prepare(many_files)
    many_files.corpus.shard_bytes = 3_000
    several = prepare(many_files)
    assert (
        whole is not None and several is not None and documents_dir(many_files).name == Manifest.load(whole).documents
    )

    def contents(folder: Path) -> dict[tuple[str, str], list[object]]:
        found: dict[tuple[str, str], list[object]] = {}
        for entry in Manifest.load(folder).shards:
            shard = Shard(folder / entry.stem)
            rows = read_sidecar(folder / entry.stem, "id", "licence", "n_bytes", "n_alike")
            tokens = [shard.document(row).tolist() for row in range(shard.n_docs)]
            found.setdefault((entry.language, entry.split), []).extend(zip(tokens, rows, strict=True))
        return found

    assert contents(several) == contents(whole)
    stems = [shard.stem for shard in Manifest.load(several).shards]
    assert {f"shards/de.small.train.{k:05d}" for k in range(3)} <= set(stems) and stems == sorted(stems)
    sizes = [s.n_bytes for s in Manifest.load(several).shards if f"{s.stem[:-5]}{int(s.stem[-5:]) + 1:05d}" in stems]
    assert all(1_000 < size < 6_000 for size in sizes), sizes
    assert {s.stem[-6:] for s in Manifest.load(whole).shards} == {".00000"}


def test_best_fit_is_packed_by_prepare_and_made_up_for_an_older_corpus(many_files: RunConfig) -> None:
    folder = prepare(many_files)
    assert folder is not None
    before, phases = marks(folder), [Phase(0, {"de/small": CYCLE})]
    many_files.mixture.packing = Packing.best_fit
    with pytest.raises(UserError):
        Samples(folder, phases, many_files.train.seq_len, 1, Packing.best_fit)
    assert prepare(many_files) == folder and marks(folder) == before
    samples = Samples(folder, phases, many_files.train.seq_len, 1, Packing.best_fit)
    assert np.any(samples[0]["tokens"].numpy() == Manifest.load(folder).tokenizer.eos_id)
    packed = marks_of(folder)
    assert prepare(many_files) == folder and marks_of(folder) == packed
    many_files.train.seq_len = 64
    prepare(many_files)
    assert (folder / "fit-64.json").exists() and (folder / "fit-256.json").exists()
