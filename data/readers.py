"""Formats of sources → records: one function for each format, which reads one file.

A record that cannot be decoded comes with the reason and is never fatal; no record takes more memory than
`MAX_RECORD_BYTES` allows. A file that is damaged, cut off or of another kind raises `UserError`.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from configs.errors import UserError
from configs.text import SourceConfig
from data import files
from data.files import InputFile, damaged, read_lines, readable
from data.shards import mapped, read_index

PROBLEMS: dict[type[Exception], str] = {
    UnicodeDecodeError: "invalid_utf8",
    UnicodeEncodeError: "lone_surrogate",
    OverflowError: "text_too_long",
}
"""What an error says about a record."""


class Record(NamedTuple):
    """What a reader found at a place: the decoded value, or what can be shown of it and why it could not be decoded."""

    location: str
    value: Any
    problem: str = ""


def read_jsonl(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """One record a line; blank lines are none."""
    for number, line in enumerate(read_lines(file.path), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield _decode_line(f"{file.name}:{number}", line)


def read_text(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """The file is one record."""
    with readable(str(file.path)), file.path.open("rb") as handle:
        content = handle.read(files.MAX_RECORD_BYTES + 1)
    try:
        if len(content) > files.MAX_RECORD_BYTES:
            raise OverflowError
        yield Record(file.name, {source.text_field: content.decode("utf-8-sig")})
    except (UnicodeDecodeError, OverflowError) as error:
        yield Record(file.name, show(content), PROBLEMS[type(error)])


def read_parquet(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """One record a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, group = 0, 0
    with readable(str(file.path)):
        handle = file.path.open("rb")
    try:
        with handle, pq.ParquetFile(handle) as table:
            _require_columns(file.path, table.schema_arrow.names, source)
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                bytes_per_row = facts.total_byte_size // max(facts.num_rows, 1) + 1
                n_together = min(max(files.MAX_RECORD_BYTES // bytes_per_row, 1), 128)  # fewer where rows are long
                for batch in table.iter_batches(n_together, [group]):
                    for value, problem in _rows(batch):
                        row += 1
                        yield Record(f"{file.name}:{row}", value, problem)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        repair = "fetch or write the file again, or correct the format of the source"
        raise damaged(f"{file.path}: {error} (row group {group}, after {row} rows)", repair) from None


def read_megatron(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """One record a document of a `.bin` with its `.idx`, of whole-number tokens, in one sequence or several."""
    pieces = _load_tokenizer(source.tokenizer)
    control = [i for i in range(len(pieces)) if pieces.is_control(i)]
    try:
        for row, tokens in enumerate(_token_documents(file.path), 1):
            value: Any = str(tokens[:50].tolist())
            if len(tokens) > files.MAX_RECORD_BYTES:
                problem = "text_too_long"
            elif len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(pieces):
                problem = "token_not_in_vocabulary"
            elif pieces.unk_id() in tokens:
                problem = "token_unknown"  # whatever stood there is lost
            else:
                problem, value = "", {source.text_field: pieces.decode(tokens[~np.isin(tokens, control)].tolist())}
            yield Record(f"{file.name}:{row}", value, problem)
    except (OSError, ValueError, struct.error) as error:
        repair = "fetch or write both files again; the format megatron stands for tokens with an index of version 1"
        raise damaged(f"{file.path} with its .idx: {error}", repair) from None


def read_hub(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """Records of a local folder (either layout of `datasets`), or streamed from the hub at a fixed commit."""
    import datasets

    try:
        if any((file.path / name).exists() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(source.path)
            found = found[source.hub_split] if isinstance(found, dict) else found
        else:
            revision = None if file.path.is_dir() else source.hub_revision
            # Streaming reads the files where they are; otherwise a copy of the corpus would land in a cache.
            found = datasets.load_dataset(
                source.path, source.hub_config or None, split=source.hub_split, revision=revision, streaming=True
            )
        for number, value in enumerate(found, 1):
            yield Record(f"{file.name}:{number}", value)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        rule = "a hub source is a dataset that `datasets` can open, with the config and split named"
        repair = "correct path, hub_config, hub_split or hub_revision"
        raise UserError(f"{source.path}: {error}", rule, repair) from None


def show(content: bytes) -> str:
    """The beginning of raw content, fit to be printed."""
    return content[:1000].decode(errors="backslashreplace")


def _decode_line(location: str, line: bytes) -> Record:
    if len(line) > files.MAX_RECORD_BYTES:
        return Record(location, show(line), "line_too_long")
    try:
        return Record(location, orjson.loads(line))
    except orjson.JSONDecodeError:
        # Python's own parser takes what orjson refuses: NaN, infinity, and halves of surrogate pairs.
        try:
            value = json.loads(line.decode())
            json.dumps(value, ensure_ascii=False).encode()
            return Record(location, value)
        except (ValueError, RecursionError) as error:
            return Record(location, show(line), PROBLEMS.get(type(error), "not_json"))


def _require_columns(path: Path, columns: list[str], source: SourceConfig) -> None:
    wanted = [source.text_field] if source.lang else [source.text_field, source.lang_field]
    if missing := [c for c in wanted if c not in columns]:
        found = f"{path}: no column {' and '.join(missing)}; there are {', '.join(columns)}"
        rule = "text_field, and lang_field unless the source has a lang, name columns of the file"
        raise UserError(found, rule, "correct text_field and lang_field, or give lang")


def _rows(batch: Any) -> Iterable[tuple[Any, str]]:
    """Each row, or what there is of it and why it cannot be read."""
    try:
        return [(row, "") for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [(str(error), "invalid_utf8" if isinstance(error, UnicodeDecodeError) else "value_unreadable")]
        # One bad value spoils the conversion of all.
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _token_documents(path: Path) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """Tokens of each document, through the page cache. Raises `ValueError` where the index is not one of the tokens."""
    (dtype, lengths, offsets, ends), content = read_index(mapped(path.with_suffix(".idx"))), mapped(path)
    for first, end in pairwise(map(int, ends)):
        parts = [np.zeros(0, dtype)]
        if not 0 <= first <= end <= len(lengths):
            raise ValueError(f"a document from sequence {first} to {end}, of {len(lengths)}")
        for start, n_tokens in zip(offsets[first:end].tolist(), lengths[first:end].tolist(), strict=True):
            if min(start, n_tokens) < 0 or start + n_tokens * dtype.itemsize > len(content):
                raise ValueError(f"{n_tokens} tokens from byte {start}, of {len(content)}")
            parts.append(content[start : start + n_tokens * dtype.itemsize].view(dtype))
        yield np.concatenate(parts)


def _load_tokenizer(path: str) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        rule = "tokens of a megatron source are decoded with the sentencepiece model that made them"
        repair = "corpus.sources.NAME.tokenizer=PATH of that tokenizer.model"
        raise UserError(f"{path}: {error}", rule, repair) from None
