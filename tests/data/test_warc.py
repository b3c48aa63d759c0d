import gzip
import io
import random
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.files import InputFile
from data.sources import Document, read_file, units
from data.warc import read_robots

PAGE = """<!doctype html><html><head><title>Titel</title><script>var x = "kein Text"</script></head><body>
<nav><ul><li><a href="/">Menü</a></ul></nav><main><h1>Überschrift</h1><p>Erster <b>Absatz</b> &amp; mehr, der lang
genug ist.<p>Zweiter Absatz über Zażółć gęślą jaźń.</main><footer>Impressum</footer></body></html>"""


def read(path: Path, **settings: str) -> tuple[list[Document], list[Document]]:
    """Documents, and what is none."""
    named = {"licence": "CC0-1.0", "origin": "here", "lang": "und"} | settings
    cfg = SourceConfig(format=SourceFormat.warc, path=str(path), **named)  # type: ignore[arg-type]
    found = [document for file in units(cfg) for document in read_file("crawl", cfg, file)]
    return [d for d in found if not d.problem], [d for d in found if d.problem]


def record(kind: str, body: bytes, url: str = "https://www.example.org/p", **headers: str) -> bytes:
    """A WARC record, written without a library, so that it can be wrong."""
    content_type = "application/http; msgtype=response" if kind == "response" else "text/plain"
    named = {"WARC-Type": kind, "WARC-Target-URI": url, "WARC-Record-ID": "<urn:uuid:1>", "Content-Type": content_type}
    lines = named | {"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}
    return b"WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n" + body + b"\r\n\r\n"


def answer(body: bytes, *headers: str, status: str = "200 OK", kind: str = "text/html; charset=utf-8") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers, "", ""]).encode() + body


def archive(path: Path, *records: bytes) -> Path:
    path.write_bytes(b"".join(records))
    return path


def write_with_warcio(path: Path, gzipped: bool) -> None:
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=gzipped)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        for url, status, kind, body in [
            ("https://a.org/1", "200 OK", "text/html; charset=utf-8", PAGE),
            ("https://a.org/robots.txt", "200 OK", "text/html", PAGE),
            ("https://a.org/2", "404 Not Found", "text/html", PAGE),
            ("https://a.org/3", "200 OK", "image/png", "PNG"),
            ("https://a.org/4", "200 OK", "application/xhtml+xml", PAGE),
        ]:
            headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
            payload = io.BytesIO(body.encode())
            response = writer.create_warc_record(url, "response", payload=payload, http_headers=headers)
            writer.write_record(response)
            writer.write_record(writer.create_warc_record(url, "metadata", payload=io.BytesIO(b"a: b")))
        wet = {"Content-Type": "text/plain", "WARC-Identified-Content-Language": "deu"}
        text = io.BytesIO(b"Ein Text,\nzwei Zeilen.")
        writer.write_record(
            writer.create_warc_record("https://b.org/", "conversion", payload=text, warc_headers_dict=wet)
        )


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz", ".warc.wet.gz", ".warc.zst"])
def test_text_comes_from_pages_and_conversions_and_from_nothing_else(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / "plain"
    write_with_warcio(plain, suffix.endswith(".gz"))
    path = tmp_path / f"crawl{suffix}"
    content = plain.read_bytes()
    path.write_bytes(zstandard.ZstdCompressor().compress(content) if suffix.endswith(".zst") else content)
    plain.unlink()
    (first, second, third), aside = read(tmp_path)
    assert not aside
    assert first.text == second.text
    assert "Überschrift" in first.text and "Erster Absatz & mehr" in first.text and "gęślą" in first.text
    assert not any(word in first.text for word in ("kein Text", "Menü", "Impressum", "Titel", "<"))
    assert [d.url for d in (first, second, third)] == ["https://a.org/1", "https://a.org/4", "https://b.org/"]
    assert third.text == "Ein Text,\nzwei Zeilen." and third.fields["WARC-Identified-Content-Language"] == "deu"
    with path.open("rb") as file:
        stream = file if not suffix.endswith(".zst") else io.BytesIO(content)
        ids = {
            r.rec_headers["WARC-Target-URI"]: r.rec_headers["WARC-Record-ID"]
            for r in ArchiveIterator(stream)
            if r.rec_type in ("response", "conversion")
        }
    assert {d.url: d.id for d in (first, second, third)}.items() <= ids.items()
    whole = gzip.decompress(content) if suffix.endswith(".gz") else content
    for document in (first, second, third):
        name, _, place = document.location.rpartition(":")
        assert name == path.name and document.id.encode() in whole[int(place) :][:400]
        assert whole[int(place) :].startswith(b"WARC/1.")


@pytest.mark.parametrize(
    ("body", "headers", "kind"),
    [
        (PAGE.encode("iso-8859-2", "xmlcharrefreplace"), [], "text/html; charset=ISO-8859-2"),
        (PAGE.replace("<head>", '<head><meta charset="iso-8859-2">').encode("iso-8859-2"), [], "text/html"),
        (PAGE.encode("utf-16"), [], "text/html; charset=utf-16"),
        (PAGE.encode(), [], "text/html; charset=bogus"),
        (PAGE.encode(), [], "TEXT/HTML"),
        (gzip.compress(PAGE.encode()), ["Content-Encoding: gzip"], "text/html; charset=utf-8"),
        (b"%x\r\n%b\r\n0\r\n\r\n" % (len(PAGE.encode()), PAGE.encode()), ["Transfer-Encoding: chunked"], "text/html; charset=utf-8"),
        (PAGE.encode(), ["Transfer-Encoding: chunked"], "text/html; charset=utf-8"),
        (PAGE.encode(), ["Content-Encoding: gzip", "Transfer-Encoding: chunked"], "text/html; charset=utf-8"),
    ],
)  # fmt: skip
def test_pages_are_decoded_as_browsers_do(tmp_path: Path, body: bytes, headers: list[str], kind: str) -> None:
    (found,), aside = read(archive(tmp_path / "a.warc", record("response", answer(body, *headers, kind=kind))))
    assert "Zażółć gęślą jaźń" in found.text and "Überschrift" in found.text and not aside


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"garbage\r\n\r\ngarbage\r\n", "not_a_record"),
        (b"\0" * 100_000 + b"\r\n", "not_a_record"),
        (b"WARC/1.0\r\n" + b"X" * 100_000 + b"\r\n", "record_malformed"),
        (record("conversion", b"text", Content_Length="-4"), "record_malformed"),
        (record("conversion", b"text").replace(b"Content-Length", b"Content-Len"), "record_malformed"),
        (record("conversion", b"text", Content_Length="3"), "length_wrong"),
        (record("conversion", b"text", Content_Length="40"), "length_wrong"),
        (record("conversion", b"text", Content_Length="999999"), "length_wrong"),
        (record("conversion", b"text", Content_Length="9" * 15), "text_too_long"),
        (record("conversion", b"x" * 2_000_000), "text_too_long"),
        (record("conversion", b"\xff\xfe"), "invalid_utf8"),
        (record("conversion", b" \n"), "text_empty"),
        (record("response", answer(gzip.compress(b"<p>" + b" " * 3_000_000), "Content-Encoding: gzip")), "text_too_long"),
        (record("response", answer(gzip.compress(PAGE.encode())[:-20][::-1], "Content-Encoding: gzip")), "record_malformed"),
        (record("response", answer(b"\x0b\x02\x80", "Content-Encoding: unknown")), "record_malformed"),
        (record("response", answer(b"<html><script>x</script>")), "text_empty"),
        (record("response", answer("<p>\u2581 text".encode())), "contains_u2581"),
    ],
)  # fmt: skip
def test_what_is_wrong_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bytes, reason: str
) -> None:
    monkeypatch.setattr("data.files.MAX_RECORD_BYTES", 1 << 20)
    good = [record("conversion", f"gut {i}".encode()) for i in range(2)]
    found, aside = read(archive(tmp_path / "a.warc", good[0], broken, good[1]))
    assert [d.text for d in found] == ["gut 0", "gut 1"]
    assert [(d.location, d.problem) for d in aside] == [(f"a.warc:{len(good[0])}", reason)]
    assert len(aside[0].text) <= 4000


TAGS = ["<div>", "</div>", "<p>", "<table>", "<tr><td>", "<a", "href='", "'>", "<script>", "</script>", "<!--", "-->", "<svg>", "<math>", "<template>", "<select>", "&#x110000;", "&#0;", "<plaintext>", "<frameset>", "<title>", "<![CDATA[", "]]>", "<pre>", "<textarea>", "<meta", "charset=x>", "▁", "text", "�", "\x00"]  # fmt: skip


def hostile_page(rng: random.Random) -> bytes:
    heads = [
        "Transfer-Encoding: chunked",
        "Content-Encoding: gzip",
        "Content-Encoding: br",
        "Content-Length: 99",
        ": :",
        "\0",
    ]
    html = ("<html>" + "".join(rng.choices(TAGS, k=rng.randint(0, 40)))).encode("utf-8", "surrogatepass")
    kind = rng.choice(["text/html", "text/html; charset=utf-16", "text/html; charset=\0"])
    body = rng.choice([html, html, gzip.compress(html)])
    return answer(body, *rng.sample(heads, rng.choice([0, 0, 1, 2])), kind=kind)


def test_hostile_pages_are_all_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    records = [record("response", hostile_page(rng)) for _ in range(5000)]
    records += [record("conversion", hostile_page(rng)) for _ in range(5000)]
    found, aside = read(archive(tmp_path / "a.warc", *records))
    assert len(found) + len(aside) == len(records)
    assert len(found) > 1000 and len({d.problem for d in aside}) >= 4


def test_damage_to_records_costs_them_and_seldom_the_next(tmp_path: Path) -> None:
    rng = random.Random(0)
    records = []
    for i in range(3000):
        broken = bytearray(record("response", hostile_page(rng)))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(broken), rng.choice([60, 200, 2000])))
            broken[at : at + rng.choice([0, 1, 20])] = rng.randbytes(rng.choice([0, 1, 9]))
        records += [bytes(broken), b"\r\n", record("conversion", f"gut {i}".encode())]
    found, aside = read(archive(tmp_path / "a.warc", *records))
    # A changed length may, once in a thousand, end where the next record has an empty line.
    assert len({d.text for d in found if d.text.startswith("gut ")}) >= 2990
    assert len(aside) > 1000


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=8), st.integers(1, 50))
def test_records_do_not_depend_on_where_blocks_end(contents: list[bytes], block_bytes: int) -> None:
    whole = b"".join(record("conversion", b"x" + content.hex().encode()) for content in contents)
    blocks = [whole[i : i + block_bytes] for i in range(0, len(whole), block_bytes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.warc.read_blocks", lambda path: iter(blocks))
        patch.setattr("data.sources.find_files", lambda path, suffixes: [InputFile(Path(path), "a.warc")])
        cfg = SourceConfig(format=SourceFormat.warc, path="a.warc", licence="x", origin="x", lang="und")
        found = list(read_file("crawl", cfg, units(cfg)[0]))
    assert [d.text for d in found] == ["x" + content.hex() for content in contents]


def test_an_archive_that_is_cut_off_or_damaged_is_named(tmp_path: Path) -> None:
    write_with_warcio(tmp_path / "a.warc.gz", gzipped=True)
    whole = (tmp_path / "a.warc.gz").read_bytes()
    for broken in (whole[:-5], whole[: len(whole) // 2], whole[:700] + b"\xff" * 9 + whole[709:], b""):
        (tmp_path / "a.warc.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.warc\.gz(.|\n)*read whole or not at all"):
            read(tmp_path)


def test_a_page_that_is_very_deep_takes_no_longer(tmp_path: Path) -> None:
    html = b"<div>" * 200_000 + b"tief" + b"</div>" * 200_000
    began = time.perf_counter()
    (found,), _ = read(archive(tmp_path / "a.warc", record("response", answer(html))))
    assert found.text == "tief" and time.perf_counter() - began < 5


def test_robots_are_found_with_their_date(tmp_path: Path) -> None:
    robots = answer(b"\xef\xbb\xbfUser-agent: *\n" + b"#" * (600 << 10), kind="text/plain")
    path = archive(
        tmp_path / "a.warc",
        record("response", robots, "http://a.org/robots.txt", WARC_Date="2025-01-02T03:04:05Z"),
        record("response", answer(b"", status="301 Moved"), "http://b.org/robots.txt"),
        record("response", robots, "http://c.org/robots.txt", Content_Length="7"),
        record("request", b"GET /robots.txt", "http://d.org/robots.txt"),
    )
    found, damaged = read_robots(path)
    assert found and damaged is None
    assert (found.url, found.date, len(found.text) < 1 << 19) == (
        "http://a.org/robots.txt",
        "2025-01-02T03:04:05Z",
        True,
    )
