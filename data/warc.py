"""Web archives (WARC, WET): their text as records of a source, and the robots.txt in them.

Text comes from `conversion` records as it stands, and from HTML that was answered with status 200; all else (requests,
images, redirects, robots.txt) is no text and is passed over. HTML becomes text through resiliparse: it decodes as
browsers do and leaves out menus, which with Python's own parser would have to be written here. What is no record, or
not as long as it says, is set aside, and reading goes on at the next line that begins a record.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastwarc.warc import WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

from configs.text import SourceConfig
from data import files
from data.files import InputFile, read_blocks
from data.readers import PROBLEMS, Record, show

SUFFIXES = tuple(f".{kind}{packing}" for kind in ("warc", "wet") for packing in ("", ".gz", ".zst"))
MAX_HEADER_BYTES = 1 << 15
MAX_ROBOTS_BYTES = 500 << 10  # crawlers need not read more of a robots.txt (RFC 9309)

_START = b"WARC/1."
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
# Finding the main content takes time that grows with the square of the depth: a minute for 50,000 open <div>.
_DEEP = ">".join("*" * 256)


class Robots(NamedTuple):
    """A robots.txt as it was found."""

    url: str
    date: str
    text: str


def read_warc(source: SourceConfig, file: InputFile) -> Iterator[Record]:
    """One record a text, with the headers of its WARC record as fields; its place counts decompressed bytes."""
    for place, content, problem in _records(file.path):
        value = None
        try:
            value = None if problem else _value(content, source)
        except (OSError, ValueError, OverflowError) as error:  # what fastwarc raises is an OSError
            problem = PROBLEMS.get(type(error), "record_malformed")
        if problem or value is not None:
            yield Record(f"{file.name}:{place}", show(content) if problem else value, problem)


def read_robots(path: Path) -> Iterator[Robots | None]:
    """Every robots.txt of an archive that was answered with status 200; None for a record that cannot be read."""
    for _, content, problem in _records(path):
        try:
            if problem:
                raise ValueError(problem)
            record = WarcRecord.from_bytes(content)
            url, date = record.headers.get("WARC-Target-URI") or "", record.headers.get("WARC-Date") or ""
            if record.record_type == WarcRecordType.response and record.is_http and _is_robots(url):
                answer, body = _answer(content)
                if answer.http_headers.status_code == 200:
                    yield Robots(url, date, body[:MAX_ROBOTS_BYTES].decode(errors="replace"))
        except (OSError, ValueError, OverflowError):
            yield None


def _records(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Place and content of each record; of what is none its beginning, and why."""
    blocks, buffer, place = read_blocks(path), bytearray(), 0

    def fill(n_bytes: int) -> int:  # as far as the file goes
        while len(buffer) < n_bytes and (block := next(blocks, b"")):
            buffer.extend(block)
        return len(buffer)

    def drop(n_bytes: int) -> None:
        nonlocal place
        place += n_bytes
        del buffer[:n_bytes]

    while fill(MAX_HEADER_BYTES):
        head = bytes(buffer[:MAX_HEADER_BYTES])
        if n_blank := len(head) - len(head.lstrip()):
            drop(n_blank)
            continue
        n_bytes, problem = _length(head)
        if not problem:
            is_whole = fill(n_bytes + 4) >= n_bytes
            end = bytes(buffer[n_bytes : n_bytes + 4]).replace(b"\r", b"")
            if not is_whole or not (end.startswith(b"\n\n") or end in (b"", b"\n")):
                problem = "length_wrong"
        yield place, bytes(buffer[: 1000 if problem else n_bytes]), problem
        while problem and (n_bytes := buffer.find(b"\n" + _START) + 1) == 0:
            n_bytes = len(buffer)
            if not (block := next(blocks, b"")):
                break
            drop(n_bytes - len(_START))  # the rest may be the beginning of what is looked for
            buffer.extend(block)
        drop(n_bytes)


def _length(head: bytes) -> tuple[int, str]:
    """Bytes of the record that begins so, its headers included; or what is wrong with it."""
    if not head.startswith(_START):
        return 0, "not_a_record"
    end = _HEADER_END.search(head)
    length = _LENGTH.search(head, 0, end.end()) if end else None
    if not end or not length:
        return 0, "record_malformed"
    n_bytes = end.end() + int(length[1])
    return n_bytes, "" if n_bytes <= files.MAX_RECORD_BYTES else "text_too_long"


def _value(content: bytes, source: SourceConfig) -> dict[str, str | None] | None:
    """Headers and text of a record; none where it has no text to give."""
    record = WarcRecord.from_bytes(content)
    url = record.headers.get("WARC-Target-URI")
    if record.record_type == WarcRecordType.conversion:
        if not (record.headers.get("Content-Type") or "text/plain").startswith("text/plain"):
            return None
        text = record.reader.read().decode("utf-8-sig")
    elif record.record_type == WarcRecordType.response and record.is_http and not _is_robots(url or ""):
        answer, body = _answer(content)
        if answer.http_headers.status_code != 200 or "html" not in (answer.http_content_type or "").lower():
            return None
        text = _page_text(body, answer.http_charset)
    else:
        return None
    given = {source.url_field: url, source.id_field: record.record_id, source.text_field: text}
    return record.headers.to_dict() | given


def _answer(content: bytes) -> tuple[WarcRecord, bytes]:
    """A record with its HTTP headers, and the body; crawlers often decode it and leave the headers that say how."""
    for encodings in ("all", "content", "none"):
        record = WarcRecord.from_bytes(content)
        try:
            record.parse_http(auto_decode=encodings)
            body = record.reader.read(files.MAX_RECORD_BYTES + 1)
        except OSError:
            continue
        if len(body) > files.MAX_RECORD_BYTES:
            raise OverflowError
        return record, body
    raise OSError("no HTTP headers")


def _page_text(body: bytes, charset: str | None) -> str:
    if b"<" not in body[:1000]:
        raise OSError("no HTML, or compressed in a way that is not told")
    declared = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    page = HTMLTree.parse(bytes_to_str(body, declared or detect_encoding(body, from_html_meta=True) or "utf-8"))
    is_deep = page.document is not None and page.document.query_selector(_DEEP) is not None
    return extract_plain_text(page, main_content=not is_deep)


def _is_robots(url: str) -> bool:
    address = url.partition("?")[0]
    return address.endswith("/robots.txt") and address.count("/") == 3
