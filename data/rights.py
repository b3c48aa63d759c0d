"""Whose text is left out: opt-outs by domain or address, by document id, and by robots.txt, also after the crawl.

Hosts are compared without case, port, `www.` and trailing dot, in their ASCII form. A host without robots.txt permits
everything, as does one whose robots.txt is none; of several for one host the newest counts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import orjson
from protego import Protego

from configs.errors import UserError
from configs.text import OptOutConfig
from data.files import find_list, read_lines
from data.sources import Document
from data.warc import Robots, read_robots

_ADDRESS = re.compile(r"\s*(?:(?:[a-z][a-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?(\[[^]]*\]|[^/?#:]*)(?::\d*)?(.*)", re.I | re.S)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
# Protego forgives some misspellings of "disallow". What has none of them permits everything: half of all files.
_DISALLOWS = re.compile(r"dis+al|diasl", re.IGNORECASE)
_parse = lru_cache(maxsize=4096)(Protego.parse)
_SITEMAP_OR_COMMENT = re.compile(r"^[ \t]*(?:#|sitemap).*\n?", re.IGNORECASE | re.MULTILINE)


def opt_out(cfg: OptOutConfig) -> Callable[[Document], str]:
    """Step that rejects with `opted_out_id`, `opted_out_domain` or `opted_out_robots`; `UserError` for a bad list."""
    ids = {entry for path in cfg.ids for entry in _lines(path)}
    addresses = {_address(path, entry) for path in cfg.domains for entry in _lines(path)}
    domains = {host for host, rest in addresses if rest in ("", "/")}
    beginnings: dict[str, list[str]] = {}
    for host, rest in addresses:
        beginnings.setdefault(host, []).append(rest or "/")
    rules = _rules(cfg.robots)

    def step(document: Document) -> str:
        if document.id in ids:
            return "opted_out_id"
        host, rest = split_address(document.url)
        if _is_within(host, domains) or any(map(rest.startswith, beginnings.get(host, ()))):
            return "opted_out_domain"
        if host in rules:
            with suppress(ValueError):  # of an address that is none
                if not all(_parse(rules[host]).can_fetch(f"http://{host}{rest}", agent) for agent in cfg.agents):
                    return "opted_out_robots"
        return ""

    return step


def list_facts(cfg: OptOutConfig) -> dict[str, dict[str, Any]]:
    """Of each list by its path: newest date, in a comment or of a robots.txt, entries, and how many are unreadable."""
    facts = {}
    for path in [*cfg.domains, *cfg.ids]:
        facts[path] = _facts(_lines(path, comments=True), sum(1 for _ in _lines(path)), 0)
    for path in cfg.robots:
        dates = [robots and robots.date for robots in _robots(path)]
        facts[path] = _facts(filter(None, dates), len(dates) - dates.count(None), dates.count(None))
    return facts


def split_address(url: str) -> tuple[str, str]:
    """Host in the form that hosts are compared in, and what follows it; of an address with or without a scheme."""
    host, rest = _ADDRESS.match(url).groups()  # type: ignore[union-attr]  # every part of the pattern may be empty
    host = host.lower().rstrip(".").removeprefix("www.")
    try:
        return host if host.isascii() else host.encode("idna").decode(), rest
    except UnicodeError:  # no name that could be looked up
        return host, rest


def _lines(path: str, comments: bool = False) -> Iterator[str]:
    """Entries of a list, or its comments."""
    for line in read_lines(find_list(path)):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{path}: {line[:100]!r}", "a list is text in UTF-8", "write it so") from None
        if text and text.startswith("#") == comments:
            yield text


def _facts(dated: Iterable[str], n_entries: int, n_unreadable: int) -> dict[str, Any]:
    date = max((date for text in dated for date in _DATE.findall(text)), default="GAP: no date in it")
    return {"date": date, "n_entries": n_entries, "n_unreadable": n_unreadable}


def _address(path: str, entry: str) -> tuple[str, str]:
    host, rest = split_address(entry.partition("#")[0].rstrip().removeprefix("*."))
    if not host or " " in host:
        rule = "a list of opt-outs has a domain or the beginning of an address in each line"
        raise UserError(f"{path}: {entry!r}", rule, "example.org, or https://example.org/blog/")
    return host, rest


def _is_within(host: str, domains: set[str]) -> bool:
    while host and host not in domains:
        host = host.partition(".")[2]
    return bool(host)


def _rules(paths: Iterable[str]) -> dict[str, str]:
    """The newest robots.txt of each host, those that permit everything left out; equal ones are kept once."""
    newest: dict[str, tuple[str, str]] = {}
    shared: dict[str, str] = {}
    for robots in filter(None, (robots for path in paths for robots in _robots(path))):
        text = robots.text.removeprefix("\ufeff")
        rules = _SITEMAP_OR_COMMENT.sub("", text) if _DISALLOWS.search(text) else ""
        host, dated = split_address(robots.url)[0], (robots.date, shared.setdefault(rules, rules))
        newest[host] = max(newest.get(host, dated), dated)
    return {host: rules for host, (_, rules) in newest.items() if rules}


def _robots(path: str) -> Iterator[Robots | None]:
    """What a file tells of robots.txt; None for an entry that is none."""
    file = find_list(path)
    is_archive = re.search(r"\.warc(\.gz|\.zst)?$", file.name)
    found = read_robots(file) if is_archive else map(_decode, filter(bytes.strip, read_lines(file)))
    for robots in found:
        # Many servers answer with a page for whatever is asked.
        yield None if robots and robots.text.lstrip().startswith("<") else robots


def _decode(line: bytes) -> Robots | None:
    try:
        record = orjson.loads(line)
        robots = Robots(record["host"], record.get("date") or "", record["robots"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return robots if all(isinstance(value, str) for value in robots) else None
