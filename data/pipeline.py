"""Sources → cleaned documents → tokenizer → shards: steps that may run anywhere, in any number of tasks.

Two folders under SCRATCH/corpora, each complete or absent and named by all that decides its content: the cleaned
documents, and the corpus with tokenizer and shards that is made from them. So another tokenizer cleans nothing anew,
and what a killed process has finished stays done.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

from configs.enums import Packing, Runner
from configs.errors import UserError
from configs.schema import RunConfig
from data import balance, tokenizer
from data.audit import Audit
from data.documents import Documents, finish_folder, key_of
from data.engine import Step, run_here, whole
from data.fertility import report_table, tokenizer_report
from data.files import sha256, write_whole
from data.manifest import MANIFEST, TRAIN, VALID, Manifest, ShardEntry, TokenizerEntry
from data.packing import build_packing, packing_path, packing_record, record_packing
from data.privacy import TOKENS, replace_personal_data
from data.shards import SUFFIXES, ShardWriter
from data.store import COMPLETE
from data.tokenizer import Encoder

FORMAT = 2  # part of the key: raise it when the same documents would give other shards
VERIFIED_ONE_IN = 1000
"""Ids are compared with those of sentencepiece for the first document of each batch, and one in so many."""
ENCODED_BYTES = 8_000_000
"""Text that is encoded at once: gigatoken remembers words within a call, at about 15 bytes for each of the text. More
is not faster (4 to 32 MB were tried), and takes memory."""
PLAN, REPORT = "plan.json", "report.txt"


def prepare(cfg: RunConfig) -> Path | None:
    """Folder of the prepared corpus, built if it is not there; None where Slurm has been asked to build it.

    Raises `UserError` for missing or damaged sources, too many bad records, and languages without text.
    """
    corpus = Corpus(cfg)
    if not corpus.is_complete:
        if cfg.tasks.runner is Runner.slurm and "SLURM_JOB_ID" not in os.environ:
            corpus.submit()
        else:
            with _alone(corpus.folder):
                run_here(corpus.steps(), cfg.tasks)
        if not corpus.is_complete:
            return None
        head, *rows = (corpus.folder / "tokenizer" / REPORT).read_text(encoding="utf-8").splitlines()
        print("\n".join([head, *dropwhile(lambda row: not row.startswith("mean"), rows)]), flush=True)
    corpus.clear_leftovers()
    if (audit := corpus.documents.store.folder / "audit.html").exists():
        corpus.documents.refuse_bad_share(Audit.load(audit.with_suffix(".json")))  # the limit may be another by now
        print(f"what became of every document: {audit}", flush=True)
    print(f"corpus {corpus.folder}\n{language_table(Manifest.load(corpus.folder))}", flush=True)
    return corpus.folder


def changed_inputs(cfg: RunConfig, manifest: Manifest) -> list[str]:
    """Files of sources, and lists and models, that hold something else than when a corpus was made of them."""
    documents = Documents(cfg)
    before = {f"{name}/{file}": h for name, source in manifest.sources.items() for file, h in source["files"].items()}
    now = {f"{name}/{file}": known for name, files in documents.inputs.items() for file, known in files.items()}
    before |= {entry["file"]: entry["sha256"] for entry in manifest.lists}
    now |= {Path(path).name: known for path, known in documents.lists.items()}
    return sorted(file for file in before | now if before.get(file) != now.get(file))


def corpus_dir(cfg: RunConfig) -> Path:
    """Where `prepare` puts the corpus of this config, whether it is there yet or not.

    Its name is 16 hexadecimal digits of the hash over the corpus and tokenizer sections and the content of all inputs.
    Cheap after the first time: hashes of inputs are remembered by path, size and time of change.
    """
    return Corpus(cfg).folder


def language_table(manifest: Manifest) -> str:
    """Training documents, tokens and bytes per token by language, as text."""
    facts = manifest.facts()
    lines = [f"{'language':<10}{'train docs':>12}{'held out':>10}{'tokens':>18}{'bytes/token':>13}"]
    for lang in manifest.languages(TRAIN):
        counts, n_held_out = facts["languages"][lang], sum(s.n_docs for s in manifest.shards_of(lang, VALID))
        columns = f"{counts['documents']:>12,}{n_held_out:>10,}{counts['tokens']:>18,}"
        lines.append(f"{lang:<10}{columns}{counts['bytes'] / counts['tokens']:>13.2f}")
    for step, counts in manifest.steps.items():
        if counts["rejected"]:
            reasons = ", ".join(f"{reason} {n:,}" for reason, (n, _) in sorted(counts["rejected"].items()))
            lines.append(f"left out by {step}: {reasons}")
    return "\n".join(lines)


class Corpus:
    """A corpus: where its parts stand, and the steps that make it. Picklable, for tasks elsewhere."""

    def __init__(self, cfg: RunConfig) -> None:
        self.documents = Documents(cfg)
        replace_personal_data(cfg.corpus.clean.privacy)  # refuses kinds that there are not
        # What stands for personal data is a token of its own, whether the tokenizer's settings name it or not.
        tokens = dict.fromkeys([*cfg.tokenizer.special_tokens, *(TOKENS[kind] for kind in cfg.corpus.clean.privacy)])
        self._tokenizer = dataclasses.replace(cfg.tokenizer, special_tokens=list(tokens))
        self._shard_bytes = cfg.corpus.shard_bytes
        self._packed_seq_len = cfg.train.seq_len if cfg.mixture.packing is Packing.best_fit else 0
        self._tasks, self._max_valid_docs = cfg.tasks, cfg.corpus.holdout.max_docs_per_language
        corpora = Path(cfg.cluster.scratch) / "corpora"
        model = tokenizer.read_model(cfg.tokenizer.path) if cfg.tokenizer.path else None
        token = hashlib.sha256(model).hexdigest() if model else dataclasses.asdict(self._tokenizer)
        key = key_of(FORMAT, self.documents.key, token, self._shard_bytes, self._max_valid_docs)
        self.folder, self._work = corpora / key, corpora / f".{key}"
        self.logs = corpora / "logs" / key

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return self._is_whole() and self._is_packed()

    def steps(self) -> list[Step]:
        """What makes it from the sources, in order."""
        documents = [] if self.documents.store.is_complete else self.documents.steps()
        report = Step("report", whole, partial(self._has, f"tokenizer/{REPORT}"), self._report)
        shards = [
            Step("words", self.documents.store.languages, partial(self._has, "words/{}.json"), self._count),
            Step("tokenizer", whole, partial(self._has, PLAN), self._train_and_plan),
            Step("shards", self._stems, partial(self._has, "entries/{}.json"), self._write, beside=report),
            Step("manifest", whole, self._is_whole, self._finish),
        ]
        if self._is_whole():
            shards = []
        elif self._tokenizer.path:
            export = Step("export", whole, partial(self._has, f"tokenizer/{tokenizer.FAST_CONFIG}"), self._export)
            first = [dataclasses.replace(step, beside=export) for step in documents[:1]] or [export]
            documents, shards = [*first, *documents[1:]], shards[1:]
        packing = [
            Step("packing", self._training_stems, self._is_stem_packed, self._pack),
            Step("packed", whole, self._is_packed, self._record_packing),
        ]
        return [*documents, *shards, *([] if self._is_packed() else packing)]

    def clear_leftovers(self) -> None:
        """Removes what a slower process has begun anew beside folders that are complete."""
        shutil.rmtree(self._work, ignore_errors=True)
        if self.documents.store.is_complete:
            shutil.rmtree(self.documents.store.work, ignore_errors=True)

    def submit(self) -> None:
        """Asks Slurm to do the steps that lack, unless it is at them."""
        from data import arrays  # datatrove takes half a second to import

        name, then = f"marathon-{self.folder.name}", f"logs: {self.logs}\nthe same line goes on when they have ended"
        if n := arrays.queued(name):
            print(f"{n} jobs {name}-* are queued or running; {then}", flush=True)
        elif steps := list(dropwhile(Step.is_complete, self.steps())):
            if mistake := arrays.last_mistake(self.logs / steps[0].name):
                print(f"before, a task of the step {steps[0].name} could not go on:\n{mistake}", flush=True)
            last = arrays.submit(steps, self._tasks, self.logs, name)
            names = ", ".join(step.name for step in steps)
            print(f"submitted arrays {name}-*: {names}; the last is job {last}; {then}", flush=True)

    def _has(self, name: str, unit: str) -> bool:
        return (self._work / name.replace("{}", unit)).exists()

    def _count(self, language: str) -> None:
        counts: Counter[str] = Counter()
        for text in self.documents.store.texts(language, TRAIN, self._tokenizer.max_train_bytes_per_language):
            tokenizer.count_words(text, counts)
        write_whole(self._work / "words" / f"{language}.json", json.dumps(counts, ensure_ascii=False))

    def _export(self, _: str) -> None:
        model = tokenizer.read_model(self._tokenizer.path)
        tokenizer.export(model, self._work / "tokenizer", self._tokenizer.special_tokens)

    def _train_and_plan(self, _: str) -> None:
        """Trains the tokenizer, where none is given, and decides which documents make which shard."""
        weights: dict[str, float] = {}
        if not self._tokenizer.path:
            files = {lang: self._work / f"words/{lang}.json" for lang in self.documents.store.languages()}
            words = {lang: Counter(json.loads(file.read_text(encoding="utf-8"))) for lang, file in files.items()}
            print(f"tokenizer: training {self._tokenizer.vocab_size} entries", flush=True)
            model, weights = balance.train(words, self._tokenizer)
            tokenizer.export(model, self._work / "tokenizer", self._tokenizer.special_tokens)
        plan = {"weights": weights, "shards": self.documents.store.plan(self._shard_bytes)}
        write_whole(self._work / PLAN, json.dumps(plan, indent=1))

    def _plan(self) -> Any:
        return json.loads((self._work / PLAN).read_text(encoding="utf-8"))

    def _report(self, _: str) -> None:
        """Measures the tokenizer, where its text to measure on has the languages of this corpus."""
        folder = self._work / "tokenizer"
        trained_on = [known for hashes in self.documents.inputs.values() for known in hashes.values()]
        try:
            report = tokenizer_report(folder, self._tokenizer, self.documents.store.languages(), trained_on)
        except UserError as error:
            told = f"tokenizer: not measured: {error.found}"
        else:
            told, report["weights"] = report_table(report), self._plan()["weights"]
            write_whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / REPORT, told + "\n")

    def _stems(self) -> list[str]:
        shards = self._plan()["shards"]
        return sorted(shards, key=lambda stem: (-len(shards[stem]), stem))  # the longest first

    def _write(self, stem: str) -> None:
        encoder = _encoder(self._work / "tokenizer")
        (self._work / "shards").mkdir(exist_ok=True)
        writer = ShardWriter(self._work / "shards" / stem, encoder.vocab_size, encoder.bos_id, encoder.eos_id)
        licences: set[str] = set()
        for rows in self.documents.store.read(self._plan()["shards"][stem], ENCODED_BYTES):
            texts = rows["text"].combine_chunks()
            offsets, ids = encoder.encode(texts)
            sample = range(0, rows.num_rows, VERIFIED_ONE_IN)
            encoder.verify([texts[i].as_py() for i in sample], [ids[offsets[i] : offsets[i + 1]] for i in sample])
            licences |= set(rows["licence"].unique().to_pylist())
            writer.add(rows.drop_columns(["text"]), offsets[1:], ids)
        writer.close()
        lang, source, split, _ = stem.rsplit(".", 3)
        hashes = {suffix: sha256(writer.stem.with_name(stem + suffix)) for suffix in SUFFIXES}
        counts = writer.n_docs, writer.n_tokens, writer.n_bytes
        entry = ShardEntry(f"shards/{stem}", source, lang, split, sorted(licences), *counts, hashes)
        write_whole(self._work / "entries" / f"{stem}.json", json.dumps(dataclasses.asdict(entry)))

    def _is_whole(self, _: str = "all") -> bool:
        return (self.folder / MANIFEST).exists()

    def _finish(self, _: str) -> None:
        entries = [json.loads((self._work / f"entries/{stem}.json").read_text()) for stem in sorted(self._stems())]
        facts = json.loads((self.documents.store.folder / COMPLETE).read_text(encoding="utf-8"))
        encoder, names = _encoder(self._work / "tokenizer"), (tokenizer.MODEL, tokenizer.FAST, tokenizer.FAST_CONFIG)
        hashes = {name: sha256(self._work / "tokenizer" / name) for name in names}
        manifest = Manifest(
            shards=[ShardEntry(**entry) for entry in entries],
            tokenizer=TokenizerEntry(encoder.vocab_size, encoder.bos_id, encoder.eos_id, encoder.pad_id, hashes),
            documents=self.documents.store.folder.name,
            **facts,  # sources, steps and lists
            removed=[],
            max_valid_docs_per_language=self._max_valid_docs,
            versions={name: importlib.metadata.version(name) for name in ("sentencepiece", "gigatoken", "numpy")},
        )
        for cut_off in (self._work / "shards").glob(".*"):
            cut_off.unlink()  # of a process that was killed
        manifest.save(self._work)
        finish_folder(self._work, self.folder)
        for leftover in ("words", "entries"):
            shutil.rmtree(self.folder / leftover, ignore_errors=True)
        (self.folder / PLAN).unlink(missing_ok=True)

    def _training_stems(self) -> list[str]:
        return [shard.stem for shard in Manifest.load(self.folder).shards if shard.split == TRAIN]

    def _is_stem_packed(self, stem: str) -> bool:
        index_hash = sha256(self.folder / f"{stem}.idx")
        return Path(packing_path(f"{self.folder}/{stem}", self._packed_seq_len, index_hash)).exists()

    def _pack(self, stem: str) -> None:
        build_packing(self.folder / stem, self._packed_seq_len)

    def _is_packed(self, _: str = "all") -> bool:
        return not self._packed_seq_len or packing_record(self.folder, self._packed_seq_len).exists()

    def _record_packing(self, _: str) -> None:
        record_packing(self.folder, self._packed_seq_len)


_encoder = cache(Encoder)  # shards of one process share it: loading takes longer than encoding a small one


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine from doing the same work.

    The kernel gives the lock back when its holder dies. Where the file system has no locks, or keeps them to one node,
    units may be done twice, with the same outcome: a waste, no harm.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"no file locks under {folder.parent}: {error}", flush=True)
        yield
