"""Sources of text → documents, file by file.

Every record becomes a `Document`: with text that is valid Unicode and not blank, a language and an id; or with its
place and a `problem`, and then it is none. To add a format, add a reader to `READERS`.
"""

import os
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data import files, readers, warc
from data.files import InputFile, find_files
from data.readers import Record

SPACE_MARK = "\u2581"  # how sentencepiece writes a space inside; text that holds it would come back as a space


@dataclass(slots=True)
class Document:
    """One text with what is known of it; cleaning changes the text and what it finds out about it."""

    id: str
    lang: str
    text: str
    source: str
    location: str  # file within the source, and line or row
    fields: dict[str, Any]  # the record that it came from, without the text
    licence: str = ""
    url: str = ""
    lang_score: float = 1.0  # how sure its language is; 1 where it was declared and not checked
    lang_second: str = ""  # the language that it would be else
    quality: float = 1.0  # what the scorer gave
    problem: str = ""  # why the record is no document; its text is the beginning of what was read, then


def units(source: SourceConfig) -> list[InputFile]:
    """What is read for itself, in order: files of a source, or the split of a hub source, which is one."""
    if source.format is SourceFormat.hub:
        return [InputFile(Path(source.path), f"{source.hub_config or 'default'}/{source.hub_split}")]
    return find_files(source.path, READERS[source.format][1])


def source_files(source: SourceConfig) -> list[InputFile]:
    """Every file that units read, to tell whether one has changed; none for a hub id, which its revision stands for."""
    if source.format is SourceFormat.hub:
        return find_files(source.path, ("",)) if _is_local(source.path) else []
    found = units(source)
    if source.format is SourceFormat.megatron:
        found += [InputFile(path.with_suffix(".idx"), name.removesuffix(".bin") + ".idx") for path, name in found]
    return found


def read_file(name: str, source: SourceConfig, file: InputFile, online: bool = False) -> Iterator[Document]:
    """Documents of one unit in its order, and what is none: its `problem` is set, and its text is what there is of it.

    `online` says whether a hub may be asked. Raises `UserError` where it may not, and where the file is missing,
    damaged or unreadable.
    """
    if source.format is SourceFormat.hub and not _is_local(source.path) and not online:
        found = f"corpus source {source.path} is asked of the hub with cluster.online = false"
        fetch = f"hf download --repo-type dataset {source.path} --revision {source.hub_revision} --local-dir DIR"
        repair = f"on a login node: {fetch}; then path=DIR. Or prepare the corpus there with cluster.online=true"
        raise UserError(found, "compute nodes are taken to have no network: data is staged before", repair)
    read, _ = READERS[source.format]
    for location, value, problem in read(source, file):
        if problem := problem or _problem(value, source):
            text = value.get(source.text_field) if isinstance(value, dict) else value
            shown = text if isinstance(text, str) else _SHORT.repr(value)
            yield Document(location, "", shown, name, location, {}, problem=problem)
        else:
            text, given_id = value.pop(source.text_field), value.get(source.id_field)
            yield Document(
                id=location if given_id is None or given_id == "" else str(given_id),
                lang=source.lang or value[source.lang_field],
                text=text,
                source=name,
                location=location,
                fields=value,
                licence=(source.licence_field and value.get(source.licence_field)) or source.licence,
                url=value.get(source.url_field) or "",
            )


def _problem(value: Any, source: SourceConfig) -> str:
    """Why a record cannot become a document; empty where it can."""
    if not isinstance(value, dict):
        return "not_an_object"
    text, lang = value.get(source.text_field), source.lang or value.get(source.lang_field)
    if not isinstance(text, str):
        return "text_missing" if text is None else "text_not_a_string"
    if not text or text.isspace():
        return "text_empty"
    if len(text) > files.MAX_RECORD_BYTES:
        return "text_too_long"
    if SPACE_MARK in text:
        return "contains_u2581"
    if not lang:
        return "language_missing"
    if not isinstance(lang, str) or not _is_language(lang):
        return "language_malformed"
    if type(value.get(source.id_field)) not in (str, NoneType, int):  # bool is an int and no id
        return "id_malformed"
    for what, field in (("url", source.url_field), ("licence", source.licence_field)):
        if field and not isinstance(value.get(field), str | None):
            return f"{what}_malformed"
    return ""


def _is_local(path: str) -> bool:
    return path.startswith("/") or os.path.isdir(path)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
# BCP-47 in outline, or FLORES codes such as deu_Latn. It becomes part of a file name, so nothing else may pass.
_is_language = lru_cache(re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*").fullmatch)

READERS: dict[SourceFormat, tuple[Callable[[SourceConfig, InputFile], Iterator[Record]], tuple[str, ...]]] = {
    SourceFormat.jsonl: (readers.read_jsonl, files.JSONL),
    SourceFormat.parquet: (readers.read_parquet, (".parquet",)),
    SourceFormat.text: (readers.read_text, (".txt",)),
    SourceFormat.warc: (warc.read_warc, warc.SUFFIXES),
    SourceFormat.megatron: (readers.read_megatron, (".bin",)),
    SourceFormat.hub: (readers.read_hub, ("",)),
}
"""By format its reader, and how names of its files end in a folder."""
