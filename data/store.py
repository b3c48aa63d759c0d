"""What stands in a folder of cleaned documents, and which of it counts.

Layout: `units/SOURCE/00000/` as `data/cleaning.py` leaves it. Beside a file, where it has such rows: `.repeated.npy`
those whose id an earlier one has, `.dropped.npy` those and the copies, `.alike.npy` rows that stay for others and how
many documents each stands for, `.questions.npy` those that hold what evaluations ask.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from data.cleaning import SCHEMA
from data.columns import numbers, to_numpy
from data.dedup import write_columns
from data.heldout import rank_of

COMPLETE, SEARCHED = "documents.json", "questions.json"
REPEATED, DROPPED, ALIKE, QUESTIONS = ".repeated.npy", ".dropped.npy", ".alike.npy", ".questions.npy"
TEXT_COLUMN = SCHEMA.get_field_index("text")


class StoredFile(NamedTuple):
    """Documents of one unit in one language and split."""

    name: str  # below the folder of the documents
    source: str
    language: str
    split: str


class Store:
    """The documents of some units: in `work` while they are made, in `folder` when they are complete."""

    def __init__(self, folder: Path, work: Path, units: list[str], without_questions: bool) -> None:
        self.folder, self.work, self.units = folder, work, units
        self._without_questions = without_questions

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / COMPLETE).exists()

    @property
    def root(self) -> Path:
        """Where its parts stand now."""
        return self.folder if self.is_complete else self.work

    def has(self, name: str, unit: str) -> bool:
        """Whether there is a part of that name, in which `{}` stands for the unit."""
        return (self.root / name.replace("{}", unit)).exists()

    def languages(self) -> list[str]:
        """Languages of the documents that there are, sorted."""
        return sorted({file.language for file in self.stored()})

    def stored(self, source: str = "*", language: str = "*") -> list[StoredFile]:
        """Files of documents in an order that only the inputs decide, by source and unit."""
        units, folder = [unit for unit in self.units if source in ("*", unit.split("/")[0])], self.root / "units"
        names = [f"units/{unit}/{name}" for unit in units for name in sorted(os.listdir(folder / unit))]
        found = [stored_file(name) for name in names if name.endswith(".parquet")]
        return [file for file in found if language in ("*", file.language)]

    def plan(self, shard_bytes: int) -> dict[str, list[tuple[str, int]]]:
        """Which row groups of which files make up each shard of about `shard_bytes`, by the shard's name."""
        shards: dict[str, list[tuple[str, int]]] = {}
        filled: Counter[tuple[str, str, str]] = Counter()
        for file in self.stored():
            part = (file.language, file.source, file.split)
            metadata = pq.read_metadata(self.root / file.name)
            is_kept, start = self.is_kept(file.name, metadata.num_rows), 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group)
                share = float(np.mean(is_kept[start : start + rows.num_rows]))
                start += rows.num_rows
                if share:
                    number = int(filled[part] // shard_bytes)
                    shards.setdefault(f"{'.'.join(part)}.{number:05d}", []).append((file.name, group))
                    filled[part] += round(rows.column(TEXT_COLUMN).total_uncompressed_size * share)
        return shards

    def read(self, groups: Iterable[tuple[str, int]], table_bytes: int) -> Iterator[pa.Table]:
        """Documents that are no copies, with `n_alike`, how many each stands for; about `table_bytes` in a table."""
        tables: list[pa.Table] = []
        for rows in self._row_groups(groups):
            tables.append(rows)
            if sum(table.nbytes for table in tables) >= table_bytes:
                yield pa.concat_tables(tables)
                tables = []
        if tables:
            yield pa.concat_tables(tables)

    def _row_groups(self, groups: Iterable[tuple[str, int]]) -> Iterator[pa.Table]:
        for name, of_file in groupby(groups, key=lambda pair: pair[0]):
            with pq.ParquetFile(self.root / name) as parquet:
                n_rows = parquet.metadata.num_rows
                is_kept, n_alike = self.is_kept(name, n_rows), np.ones(n_rows, np.int32)
                alike, counts = self.rows(name, ALIKE)
                n_alike[alike] = counts
                sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                for _, group in of_file:
                    here = slice(sum(sizes[:group]), sum(sizes[: group + 1]))
                    rows = parquet.read_row_group(group, use_threads=False)
                    rows = rows.append_column("n_alike", numbers(n_alike[here]))
                    stays = is_kept[here] & (to_numpy(rows["n_bytes"]) > 0)  # one without text has been removed
                    yield rows if stays.all() else rows.filter(numbers(stays))

    def texts(self, language: str, split: str, max_bytes: int) -> Iterator[str]:
        """Texts of one language and split, all or a share of about `max_bytes` by the hash of their id."""
        files = [file for file in self.stored(language=language) if file.split == split]
        groups = [(f.name, g) for f in files for g in range(pq.read_metadata(self.root / f.name).num_row_groups)]
        sizes = (pq.read_table(self.root / f.name, columns=["n_bytes"])["n_bytes"] for f in files)
        n_bytes = sum(int(to_numpy(of_file).sum()) for of_file in sizes)
        for rows in self._row_groups(groups):
            for doc_id, text in zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True):
                if n_bytes <= max_bytes or rank_of(doc_id) * n_bytes < max_bytes * 2**64:
                    yield text

    def is_kept(self, name: str, n_rows: int) -> NDArray[np.bool_]:
        """Which of the rows of a file are neither copies nor, where these are left out, text of evaluations."""
        is_kept = np.ones(n_rows, bool)
        is_kept[self.rows(name, DROPPED)[0]] = False
        if self._without_questions and (self.root / SEARCHED).exists():
            is_kept[self.rows(name, QUESTIONS)[0]] = False
        return is_kept

    def rows(self, name: str, kind: str) -> NDArray[np.int64]:
        """int64[2, n]: rows that stand beside a file under that suffix, and what is told of each; n may be 0."""
        path = (self.root / name).with_suffix(kind)
        try:
            found = np.load(path, allow_pickle=False) if path.exists() else np.zeros((2, 0))
            return np.asarray(found, np.int64).reshape(2, -1)
        except (ValueError, TypeError) as error:
            repair = f"delete {self.root}; it is made again"
            raise UserError(f"{path} is no array of rows", str(error), repair) from error

    def save_rows(self, name: str, kind: str, rows: NDArray[Any], told: NDArray[Any] | None = None) -> None:
        """Puts rows beside a file, if there are any, with what is told of each."""
        if len(rows):
            columns = np.stack([rows, rows if told is None else told]).astype(np.int64)
            write_columns((self.root / name).with_suffix(kind), [columns])


def stored_file(name: str) -> StoredFile:
    """The file of that name: units/SOURCE/NUMBER/LANGUAGE.SPLIT.parquet."""
    _, source, _, file = name.split("/")
    return StoredFile(name, source, *file.split(".")[:2])
