import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from configs.errors import UserError
from configs.text import OptOutConfig
from data.rights import list_facts, opt_out, split_address
from data.sources import Document

DENY_ALL = "User-agent: *\nDisallow: /\n"
DENY_GPT = (
    "# robots\nUser-agent: GPTBot\nDisallow: /\n\nUser-agent: *\nDisallow: /private\nSitemap: https://x.org/s.xml\n"
)


def reason(step: Callable[[Document], str], url: str, doc_id: str = "a") -> str:
    return step(Document(doc_id, "de", "text", "source", "file:1", {}, url=url))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("url", "host", "rest"),
    [
        ("https://WWW.Example.ORG:8443/Path?q#f", "example.org", "/Path?q#f"),
        ("example.org./x", "example.org", "/x"),
        ("example.org:80", "example.org", ""),
        ("//user:pw@example.org/a@b", "example.org", "/a@b"),
        ("http://münchen.de/ä", "xn--mnchen-3ya.de", "/ä"),
        ("http://[2001:db8::1]:80/x", "[2001:db8::1]", "/x"),
        ("http://example.org?q=http://other.org", "example.org", "?q=http://other.org"),
        ("", "", ""),
    ],
)
def test_hosts_are_compared_in_one_form(url: str, host: str, rest: str) -> None:
    assert split_address(url) == (host, rest)


@given(st.one_of(st.text(), st.from_regex(r"https?://[^ ]{0,9}[\[\]@:%?#/.]{0,9}")))
def test_no_address_is_too_odd_to_be_split(url: str) -> None:
    host, rest = split_address(url)
    assert url.endswith(rest) and not host.endswith(".")


def test_domains_mean_their_subdomains_and_addresses_what_begins_so(tmp_path: Path) -> None:
    path = write(
        tmp_path / "domains.txt",
        "# publishers, 2025-01-31\nexample.org\nhttps://www.zeitung.de/\nblog.net/anna/  # hers\n*.wild.eu\nbücher.at\n",
    )
    step = opt_out(OptOutConfig(domains=[path]))
    for url in ("http://example.org", "https://a.b.EXAMPLE.org:8080/x", "zeitung.de/1", "https://blog.net/anna/2",
                "http://wild.eu", "http://xn--bcher-kva.at/"):  # fmt: skip
        assert reason(step, url) == "opted_out_domain", url
    for url in ("http://notexample.org", "http://example.org.uk", "http://org", "https://blog.net/annabel",
                "http://a.blog.net/anna/", "", "http://", "urn:isbn:1"):  # fmt: skip
        assert reason(step, url) == "", url


def test_ids_are_opted_out_whatever_their_address(tmp_path: Path) -> None:
    step = opt_out(OptOutConfig(ids=[write(tmp_path / "ids", "# mine\n<urn:uuid:1>\n\nb 2\nx.org/#c\n")]))
    assert [reason(step, "", i) for i in ("<urn:uuid:1>", "b 2", "x.org/#c")] == ["opted_out_id"] * 3
    assert [reason(step, "", i) for i in ("b", "", "x.org/", "# mine")] == [""] * 4


def robots_lines(path: Path, *records: object) -> str:
    return write(path, "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))


def test_robots_permit_agents_one_by_one_and_missing_ones_all(tmp_path: Path) -> None:
    path = robots_lines(tmp_path / "robots.jsonl", {"host": "WWW.a.org:443", "robots": DENY_GPT, "date": "2025-01-02"})
    step = opt_out(OptOutConfig(robots=[path], agents=["*", "GPTBot"]))
    assert reason(step, "http://a.org./page") == "opted_out_robots"
    assert reason(step, "http://b.org/page") == reason(step, "http://sub.a.org/page") == ""
    other = opt_out(OptOutConfig(robots=[path], agents=["*", "CCBot"]))
    assert [reason(other, f"https://a.org{p}") for p in ("", "/page", "/private/1")] == ["", "", "opted_out_robots"]
    assert reason(opt_out(OptOutConfig(robots=[path], agents=["GPTBot"])), "https://a.org/[x") == "opted_out_robots"


def test_the_newest_robots_of_a_host_counts_in_any_order(tmp_path: Path) -> None:
    old, new = ({"host": "a.org", "robots": r, "date": d} for r, d in ((DENY_ALL, "2024-12-31"), ("", "2025-01-01")))
    for i, records in enumerate([(old, new), (new, old)]):
        path = robots_lines(tmp_path / f"{i}.jsonl", *records)
        assert reason(opt_out(OptOutConfig(robots=[path])), "http://a.org/") == ""
        two = [robots_lines(tmp_path / f"{i}-{j}.jsonl", record) for j, record in enumerate(records)]
        assert reason(opt_out(OptOutConfig(robots=two)), "http://a.org/") == ""


def test_what_is_no_robots_file_is_counted_and_permits(tmp_path: Path) -> None:
    broken = [
        "{", "[]", "7", {"host": "a.org"}, {"host": 1, "robots": DENY_ALL}, {"host": "b.org", "robots": None},
        {"host": "c.org", "robots": " <html>Disallow: / User-agent: *"}, {"robots": DENY_ALL},
    ]  # fmt: skip
    good = {"host": "d.org", "robots": "\ufeff" + DENY_ALL}
    path = robots_lines(tmp_path / "robots.jsonl", *broken, "", good)
    cfg = OptOutConfig(robots=[path])
    step = opt_out(cfg)
    assert [reason(step, f"http://{h}.org/") for h in "abcd"] == ["", "", "", "opted_out_robots"]
    facts = {"date": "GAP: no date in it", "n_entries": 1, "n_unreadable": len(broken)}
    assert list_facts(cfg) == {path: facts}


def test_robots_are_read_from_archives(tmp_path: Path) -> None:
    path = tmp_path / "robotstxt.warc.gz"
    answers = [
        ("http://a.org/robots.txt", "200 OK", DENY_ALL, "text/plain"),
        ("http://b.org/robots.txt", "404 Not Found", DENY_ALL, "text/plain"),
        ("http://c.org/page/robots.txt", "200 OK", DENY_ALL, "text/plain"),
        ("http://d.org/robots.txt?x=/", "200 OK", DENY_ALL, "text/plain"),
        ("http://e.org/robots.txt", "200 OK", "<!doctype html>Disallow: /", "text/html"),
    ]
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        writer.write_record(writer.create_warcinfo_record("x", {"software": "robots.txt"}))
        for url, status, text, kind in answers:
            headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
            dated = {"WARC-Date": "2025-01-15T10:00:00Z"}
            record = writer.create_warc_record(
                url, "response", payload=io.BytesIO(text.encode()), http_headers=headers, warc_headers_dict=dated
            )
            writer.write_record(record)
    cfg = OptOutConfig(robots=[str(path)])
    step = opt_out(cfg)
    assert [h for h in "abcde" if reason(step, f"https://www.{h}.org/page")] == ["a", "d"]
    assert list_facts(cfg) == {str(path): {"date": "2025-01-15", "n_entries": 2, "n_unreadable": 1}}


def test_facts_tell_date_and_entries(tmp_path: Path) -> None:
    text = "# of 2024-05-01\n# corrected 2024-06-02\na.org\n\nb.org # 2030-01-01 is no date of the list\n"
    domains, ids = write(tmp_path / "domains.txt", text), tmp_path / "ids.gz"
    ids.write_bytes(gzip.compress(b"1\n2\n"))
    assert list_facts(OptOutConfig(domains=[domains], ids=[str(ids)])) == {
        domains: {"date": "2024-06-02", "n_entries": 2, "n_unreadable": 0},
        str(ids): {"date": "GAP: no date in it", "n_entries": 2, "n_unreadable": 0},
    }


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("domains", None, "no such file|No such file"),
        ("ids", None, "No such file"),
        ("robots", None, "No such file"),
        ("domains", b"example.org\nhttp:///path\n", "http:///path"),
        ("domains", b"two words.org\n", "two words"),
        ("ids", b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_list_that_is_missing_or_none_is_named(tmp_path: Path, kind: str, content: bytes | None, said: str) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"list\.txt(.|\n)*({said})"):
        opt_out(OptOutConfig(**{kind: [str(path)]}))
