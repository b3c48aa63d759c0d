"""Personal data in text: each item becomes a token that says what stood there, such as `<email>`.

An item has to prove itself: by its checksum, and by a form that nothing else has or a word that says what it is, on its
line or the one before (`privacy.yaml`). So that a text costs little, one search for anything that could begin an item
goes first, and only lines where it hits are looked at.
"""

import importlib
import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import stdnum.iban
import stdnum.luhn
import yaml

from configs.errors import UserError
from data.sources import Document

Spans = Iterator[tuple[int, int]]  # where items begin and end in a text

_TABLE: dict[str, Any] = yaml.CSafeLoader(Path(__file__).with_suffix(".yaml").read_bytes()).get_single_data()
_PATTERNS = {name: re.compile(pattern) for name, pattern in _TABLE["patterns"].items()}


def replace_personal_data(kinds: list[str]) -> Callable[[Document], str]:
    """Step that replaces items of these kinds in the text and rejects nothing; raises `UserError` for other kinds."""
    if unknown := set(kinds) - set(_FINDERS):
        found = f"corpus.clean.privacy: {', '.join(sorted(unknown))}"
        raise UserError(found, f"kinds of personal data are {', '.join(_FINDERS)}", "leave out what is none of them")

    def step(document: Document) -> str:
        if items := find_items(document.text, kinds):
            parts, done = [""], 0
            for start, end, kind in items:
                parts += document.text[done:start], TOKENS[kind]
                done = end
            document.text = "".join([*parts, document.text[done:]])
        return ""

    return step


def find_items(text: str, kinds: Collection[str]) -> list[tuple[int, int, str]]:
    """Begin, end and kind of each item of these kinds, in order; no two overlap."""
    found = []
    for first, last in _lines(text):
        lines, taken = text[first:last], bytearray(last - first)
        for kind in (kind for kind in _FINDERS if kind in kinds):
            for start, end in _FINDERS[kind](lines):
                if not any(taken[start:end]):
                    taken[start:end] = b"\1" * (end - start)
                    found.append((first + start, first + end, kind))
    return sorted(found)


def _lines(text: str) -> Spans:
    """Lines with a hit, each with the line before it; those that touch together."""
    start = end = 0
    while gate := _PATTERNS["gate"].search(text, end):
        before = text.rfind("\n", 0, gate.start())
        first = text.rfind("\n", 0, max(before, 0)) + 1
        if first > end:
            yield start, end
            start = first
        end = text.find("\n", gate.end())
        end = len(text) if end < 0 else end
    yield start, end


def _emails(text: str) -> Spans:
    for domain in _PATTERNS["at_domain"].finditer(text):
        if local := _PATTERNS["local"].search(text, max(domain.start() - 64, 0), domain.start()):
            yield local.start(), domain.end()


def _ibans(text: str) -> Spans:
    for match in _PATTERNS["iban"].finditer(text):
        # The pattern takes what follows along, but each country has one length.
        places = [i for i in range(*match.span()) if text[i].isalnum()][: _TABLE["iban"].get(match[0][:2], 0)]
        end = places[-1] + 1 if places else match.start()
        number = "".join(text[i] for i in places)
        if not text[end : end + 1].isalnum() and stdnum.iban.is_valid(number, check_country=False):
            yield match.start(), end


def _cards(text: str) -> Spans:
    for match in _PATTERNS["card"].finditer(text):
        digits = re.sub(r"\D", "", match[0])
        is_told = _PATTERNS["card_groups"].fullmatch(match[0]) or _WORDS["card"].search(_beside(text, match))
        if is_told and _PATTERNS["card_numbers"].fullmatch(digits) and stdnum.luhn.is_valid(digits):
            yield match.span()


def _national_ids(text: str) -> Spans:
    for shape, identifiers in _identifiers() if _PATTERNS["long"].search(text) else []:
        for match in shape.finditer(text):
            beside = _beside(text, match)
            for is_valid, words in identifiers:
                # Separators are part of a sure form; where they are free, each module knows other ones.
                number = re.sub(r"\W", "", match[0]) if words.pattern else match[0]
                if (beside or not words.pattern) and is_valid(number) and words.search(beside):
                    yield match.span()
                    break


def _phones(text: str) -> Spans:
    for match in _PATTERNS["international"].finditer(text):
        groups = re.findall(r"\d+", match[0].replace("(0)", ""))
        n_digits = len("".join(groups).removeprefix("00"))
        is_amount = n_digits < 11 and {len(group) for group in groups[1:]} <= {3}  # +20 000 000
        is_short = n_digits < (11 if groups[0] in ("1", "7", "001", "007") else 9)
        if not (is_amount or is_short):
            yield match.span()
    end = -9
    for match in _PATTERNS["national"].finditer(text):
        start = match.start()
        is_next = start - end < 5 and not any(map(str.isalnum, text[end:start]))
        before = text[max(start - 45, 0) : start]
        is_told = is_next or (_PATTERNS["letter"].search(before) and _PHONE_MARK.search(before))
        if is_told and not _PATTERNS["no_phone"].match(match[0]):
            end = match.end()
            yield start, end


def _ips(text: str) -> Spans:
    for match in _PATTERNS["ipv4"].finditer(text):
        before = text[max(match.start() - 30, 0) : match.start()]
        # Versions, sections and object identifiers look so, and of all public addresses 0.3 %.
        first, second, *_ = numbers = [int(number) for number in match[0].split(".")]
        is_version = max(numbers) < 32 or (first < 5 and second < 40) or _WORDS["version"].search(before)
        if _is_somebodys(match) and (not is_version or _WORDS["ip"].search(before)):
            yield match.span()
    for match in _PATTERNS["ipv6"].finditer(text):
        if _is_somebodys(match):
            yield match.span()


def _is_somebodys(match: re.Match[str]) -> bool:
    """Whether it is a public address, and not a multicast group or a whole network such as 193.0.0.0/21."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    is_network = match[0].endswith((".0", "::")) and match.string.startswith("/", match.end())
    return address.is_global and not address.is_multicast and not is_network


def _beside(text: str, match: re.Match[str]) -> str:
    """What stands before and after a match; nothing in a column of numbers, which has shapes enough and no words."""
    start, end = match.span()
    beside = f"{text[max(start - 60, 0) : start]}\n{text[end : end + 30]}"
    return beside if _PATTERNS["letter"].search(beside) else ""


def _words(words: list[str]) -> str:
    spelled = (re.escape(word).replace(r"\*", r"\w*") for word in words)
    return r"(?<!\w)(?:" + "|".join(f"(?i:{w})" if w == w.lower() else w for w in spelled) + r")(?!\w)"


@cache
def _identifiers() -> list[tuple[re.Pattern[str], list[tuple[Callable[[str], bool], re.Pattern[str]]]]]:
    """By shape: whether one that looks so is valid, and words that say what it is, empty where it needs none."""
    shapes: dict[str, list[Any]] = defaultdict(list)
    for entry in _TABLE["national_id"]:
        is_valid = importlib.import_module(f"stdnum.{entry['module']}").is_valid
        for shape in entry.get("strong", []):
            shapes[_shape(shape, "")].append((is_valid, re.compile("")))
        for shape in entry.get("shapes", []):
            shapes[_shape(shape, "[ \u00a0\u202f./-]?")].append((is_valid, re.compile(_words(entry["words"]))))
    return [(re.compile(shape), identifiers) for shape, identifiers in shapes.items()]


def _shape(shape: str, separator: str) -> str:
    kinds = {"9": "[0-9]", "A": "[A-Z]", "X": "[0-9A-Z]", " ": "[ \u00a0\u202f]"}
    first, *others = (kinds.get(character) or re.escape(character) for character in shape)
    return separator.join([rf"{first}(?<!\w{first})", *others]) + r"(?!\w)"


_WORDS = {name: re.compile(_words(_TABLE[name])) for name in ("card", "ip", "version")}
_PHONE_MARK = re.compile(_words(_TABLE["phone"]) + r"[^\w\n]{0,6}\n?(?:[^\W\d]{1,12}[^\w\n]{1,4}){0,2}\Z")

_FINDERS: dict[str, Callable[[str], Spans]] = {
    # Where two would overlap, the first of this order stands.
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "national_id": _national_ids,
    "phone": _phones,
    "ip": _ips,
}
TOKENS = {kind: f"<{kind}>" for kind in _FINDERS}  # what stands in the text in place of each kind
