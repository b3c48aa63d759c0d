"""Sources of text → documents.

A document that leaves this module has text that is valid Unicode and not blank, a language and an id.
Everything else went to the quarantine with a reason. To add a format, add a reader to `READERS`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.files import InputFile, find_files, read_lines, readable
from data.quarantine import Quarantine

LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*")
"""BCP-47 in outline, or FLORES codes such as deu_Latn. It becomes part of a file name, so nothing else may pass."""

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space inside; text that holds it would come back as a space."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with what is known of it; `fields` is the record that it came from, without the text."""

    id: str
    lang: str
    text: str
    source: str
    location: str
    fields: dict[str, Any]


class Record(NamedTuple):
    """What a reader found at a place: the decoded value, or the raw content and why it could not be decoded."""

    location: str
    value: Any
    problem: str = ""


def read_documents(name: str, source: SourceConfig, quarantine: Quarantine, online: bool) -> Iterator[Document]:
    """Documents of one source, in the order of its files.

    `online` says whether a hub may be asked. Raises `UserError` where files are missing, damaged or unreadable.
    """
    for record in READERS[source.format](source, online):
        quarantine.n_read[name] += 1
        problem, excerpt = record.problem or _problem(record.value, source), record.value
        if problem:
            quarantine.put(name, record.location, problem, excerpt)
            continue
        fields = dict(record.value)
        text = fields.pop(source.text_field)
        given_id = fields.get(source.id_field)
        yield Document(
            id=record.location if given_id is None else str(given_id),
            lang=source.lang or fields[source.lang_field],
            text=text,
            source=name,
            location=record.location,
            fields=fields,
        )


def source_files(source: SourceConfig) -> list[InputFile]:
    """Files of a source; none for a hub id, which its revision stands for."""
    if source.format is SourceFormat.hub:
        return find_files(source.path, ("",)) if _is_local(source.path) else []
    return find_files(source.path, _SUFFIXES[source.format])


def _problem(value: Any, source: SourceConfig) -> str:
    """Why a record cannot become a document; empty where it can."""
    if not isinstance(value, dict):
        return "not_an_object"
    text, lang = value.get(source.text_field), source.lang or value.get(source.lang_field)
    given_id = value.get(source.id_field)
    if not isinstance(text, str):
        return "text_missing" if text is None else "text_not_a_string"
    if not text.strip():
        return "text_empty"
    if not _is_unicode(text):
        return "lone_surrogate"
    if SPACE_MARK in text:
        return "contains_u2581"
    if not lang:
        return "language_missing"
    if not isinstance(lang, str) or not LANGUAGE.fullmatch(lang):
        return "language_malformed"
    is_id = given_id is None or (isinstance(given_id, int | str) and not isinstance(given_id, bool))
    return "" if is_id and _is_unicode(str(given_id)) else "id_malformed"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return False
    return True


def _read_jsonl(source: SourceConfig, online: bool) -> Iterator[Record]:
    for path, name in find_files(source.path, _SUFFIXES[SourceFormat.jsonl]):
        for number, line in enumerate(read_lines(path), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _decode_line(f"{name}:{number}", line)


def _decode_line(location: str, line: bytes) -> Record:
    try:
        return Record(location, json.loads(line.decode()))
    except UnicodeDecodeError:
        return Record(location, line[:1000].decode(errors="backslashreplace"), "invalid_utf8")
    except (ValueError, RecursionError):
        return Record(location, line[:1000].decode(errors="backslashreplace"), "not_json")


def _read_text(source: SourceConfig, online: bool) -> Iterator[Record]:
    for path, name in find_files(source.path, _SUFFIXES[SourceFormat.text]):
        with readable(str(path)):
            content = path.read_bytes()
        try:
            yield Record(name, {source.text_field: content.decode("utf-8-sig")})
        except UnicodeDecodeError:
            yield Record(name, content[:1000].decode(errors="backslashreplace"), "invalid_utf8")


def _read_parquet(source: SourceConfig, online: bool) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path, name in find_files(source.path, _SUFFIXES[SourceFormat.parquet]):
        with readable(str(path)):
            handle = path.open("rb")
        row, group = 0, 0
        try:
            with handle, pq.ParquetFile(handle) as file:
                _require_columns(path, file.schema_arrow.names, source)
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(batch_size=1000, row_groups=[group]):
                        for record in _rows(batch):
                            row += 1
                            yield record._replace(location=f"{name}:{row}")
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path}: {error} (row group {group}, after {row} rows)",
                "a source is read whole or not at all",
                "fetch or write the file again, or correct the format of the source",
            ) from None


def _rows(batch: Any) -> Iterator[Record]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # one bad string spoils the conversion of all: go through them one by one
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1)) if batch.num_rows > 1 else [Record("", "…", "invalid_utf8")]
        return
    for value in rows:
        yield Record("", value)


def _require_columns(path: Path, columns: list[str], source: SourceConfig) -> None:
    wanted = [source.text_field] if source.lang else [source.text_field, source.lang_field]
    if missing := [c for c in wanted if c not in columns]:
        raise UserError(
            f"{path}: no column {' and '.join(missing)}; there are {', '.join(columns)}",
            "text_field, and lang_field unless the source has a lang, name columns of the file",
            "correct text_field and lang_field, or give lang",
        )


def _read_hub(source: SourceConfig, online: bool) -> Iterator[Record]:
    """Records of a local folder (either layout of `datasets`), or streamed from the hub at a fixed commit."""
    is_local = _is_local(source.path)
    if not is_local and not online:
        raise UserError(
            f"corpus source {source.path} is asked of the hub with cluster.online = false",
            "compute nodes are taken to have no network: data is staged before",
            f"on a login node: hf download --repo-type dataset {source.path} --revision {source.hub_revision} "
            "--local-dir DIR; then path=DIR. Or prepare the corpus there with cluster.online=true",
        )
    import datasets

    try:
        rows = _open_dataset(datasets, source, is_local)
        for number, value in enumerate(rows, 1):
            yield Record(f"{source.hub_config or 'default'}/{source.hub_split}:{number}", value)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source.path}: {error}",
            "a hub source is a dataset that `datasets` can open, with the config and split named",
            "correct path, hub_config, hub_split or hub_revision",
        ) from None


def _open_dataset(datasets: Any, source: SourceConfig, is_local: bool) -> Any:
    saved = is_local and any((Path(source.path) / f).exists() for f in ("dataset_dict.json", "state.json"))
    if saved:
        found = datasets.load_from_disk(source.path)
        return found[source.hub_split] if isinstance(found, dict) else found
    revision = None if is_local else source.hub_revision
    # Streaming reads the files where they are; otherwise a copy of the corpus would land in a cache.
    return datasets.load_dataset(
        source.path, source.hub_config or None, split=source.hub_split, revision=revision, streaming=True
    )


def _is_local(path: str) -> bool:
    return path.startswith("/") or os.path.isdir(path)


_SUFFIXES = {
    SourceFormat.jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    SourceFormat.parquet: (".parquet",),
    SourceFormat.text: (".txt",),
}

READERS: dict[SourceFormat, Callable[[SourceConfig, bool], Iterator[Record]]] = {
    SourceFormat.jsonl: _read_jsonl,
    SourceFormat.parquet: _read_parquet,
    SourceFormat.text: _read_text,
    SourceFormat.hub: _read_hub,
}
