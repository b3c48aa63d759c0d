import importlib
import ipaddress
import itertools
import string
import time
from datetime import date

import pytest
import stdnum.iban
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data.files import PACKAGE_ROOT
from data.privacy import TOKENS, find_items, replace_personal_data
from data.sources import Document

KINDS = list(TOKENS)
TABLE = yaml.safe_load((PACKAGE_ROOT / "data/privacy.yaml").read_text())
WORDLESS = ("fi.hetu", "it.codicefiscale")

words = st.lists(st.text("abcdefgäßčłŁŠ,;", min_size=1, max_size=9), max_size=8).map(" ".join)


def digits(n: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=n, max_size=n)


def replaced(text: str, kinds: list[str] = KINDS) -> str:
    document = Document("id", "de", text, "source", "file:1", {})
    assert replace_personal_data(kinds)(document) == ""
    return document.text


def assert_just_this(before: str, item: str, after: str, kind: str) -> None:
    text = f"{before}{item}{after}"
    assert find_items(text, KINDS) == [(len(before), len(before) + len(item), kind)], text
    assert replaced(text) == f"{before}<{kind}>{after}"


@st.composite
def spaced(draw: st.DrawFn, number: str) -> str:
    """A number with a separator between some of its characters, or the same one after every few."""
    separator = draw(st.sampled_from(" \u00a0\u202f-"))
    if draw(st.booleans()):
        size = draw(st.integers(2, 5))
        return separator.join(number[i : i + size] for i in range(0, len(number), size))
    cuts = draw(st.sets(st.integers(1, len(number) - 1), max_size=5))
    return "".join((separator if i in cuts else "") + character for i, character in enumerate(number))


@st.composite
def ibans(draw: st.DrawFn) -> str:
    country = draw(st.sampled_from(sorted(TABLE["iban"])))
    structure = stdnum.iban._ibandb.info(country + "0000")[0][1]["bban"]
    letters = {"n": string.digits, "a": string.ascii_uppercase, "c": string.digits + string.ascii_uppercase}
    parts = [
        (int(part[:-1]), letters[part[-1]])
        for part in structure.replace("!n", "n,").replace("!a", "a,").replace("!c", "c,").split(",")
        if part
    ]
    account = "".join(draw(st.text(alphabet, min_size=n, max_size=n)) for n, alphabet in parts)
    # ISO 7064, written here once more.
    check = 98 - int("".join(str(int(c, 36)) for c in f"{account}{country}00")) % 97
    return f"{country}{check:02d}{account}"


@given(ibans(), st.data(), words, words)
def test_an_iban_of_any_country_is_found_in_any_spacing(
    iban: str, data: st.DataObject, before: str, after: str
) -> None:
    written = iban[:2] + data.draw(st.sampled_from(["", " ", "-"])) + iban[2:4] + data.draw(spaced(iban[4:]))
    assert_just_this(f"{before} ", written, f" {after}", "iban")
    broken = f"{iban[:3]}{(int(iban[3]) + data.draw(st.integers(1, 9))) % 10}{iban[4:]}"
    assert "iban" not in {kind for *_, kind in find_items(data.draw(spaced(broken)), KINDS)}


def test_lengths_of_ibans_are_those_of_the_registry() -> None:
    def length(country: str) -> int:
        return 4 + sum(
            int(n)
            for n in stdnum.iban._ibandb.info(country)[0][1]["bban"]
            .replace("!", " ")
            .translate(str.maketrans("nac", "   "))
            .split()
        )

    countries = [
        a + b for a, b in itertools.product(string.ascii_uppercase, repeat=2) if stdnum.iban._ibandb.info(a + b)[0][1]
    ]
    assert {country: length(country) for country in countries} == TABLE["iban"]


@st.composite
def cards(draw: st.DrawFn) -> str:
    start, n = draw(
        st.sampled_from(
            [
                ("4", 16),
                ("51", 16),
                ("2221", 16),
                ("34", 15),
                ("37", 15),
                ("36", 14),
                ("6011", 16),
                ("3530", 16),
                ("4", 19),
            ]
        )
    )
    number = start + draw(digits(n - len(start) - 1))
    doubled = [int(d) * (2 - i % 2) for i, d in enumerate(reversed(number))]
    return number + str(-sum(d // 10 + d % 10 for d in doubled) % 10)


@given(
    cards(),
    st.data(),
    st.sampled_from(["Visa", "Kreditkarte Nr.", "carte bancaire:", "номер карты", "kortnummer"]),
    words,
)
def test_a_card_number_is_found_beside_a_word_or_in_its_groups(
    card: str, data: st.DataObject, word: str, after: str
) -> None:
    assert_just_this(f"{word} ", data.draw(spaced(card)), f" {after}", "card")
    if len(card) == 16:
        assert_just_this("x ", " ".join(card[i : i + 4] for i in range(0, 16, 4)), f" {after}", "card")
    assert not find_items(f"order {card} {after}", KINDS), "digits alone may be anything"
    broken = card[:-1] + str((int(card[-1]) + data.draw(st.integers(1, 9))) % 10)
    assert "card" not in {kind for *_, kind in find_items(f"{word} {broken}", KINDS)}


@st.composite
def identifiers(draw: st.DrawFn) -> tuple[str, str]:
    """A module, and a number that it takes; check characters, here ?, are those that fit."""
    born = draw(st.dates(date(1955, 1, 1), date(1999, 12, 31)))
    ymd, dmy = f"{born:%y%m%d}", f"{born:%d%m%y}"
    r = [str(draw(st.integers(1, 9))) + draw(digits(9)) for _ in range(2)]
    letters = draw(st.text("BCDFGLMNRST", min_size=7, max_size=7))
    ten = draw(st.permutations("1234567890"))
    forms = {
        "at.vnr": f"{r[0][:3]}?{dmy}",
        "at.tin": f"{r[0][:8]}?",
        "be.ssn": f"{ymd}{r[0][:3]}??",
        "bg.egn": f"{ymd}{r[0][:3]}?",
        "bg.pnf": f"{r[0][:9]}?",
        "cz.rc": f"{ymd}{r[0][:3]}?",
        "de.idnr": f"{''.join(ten[:9])}{ten[draw(st.integers(0, 7))]}?",
        "ee.ik": f"3{ymd}{r[0][:3]}?",
        "es.dni": f"{r[0][:8]}!",
        "es.nie": f"{draw(st.sampled_from('XYZ'))}{r[0][:7]}!",
        "fi.hetu": f"{dmy}-{r[0][:3]}#",
        "fr.nir": f"{draw(st.sampled_from('12'))}{born:%y%m}{draw(st.integers(21, 95))}{r[0][:3]}{r[1][:3]}??",
        "fr.nif": f"{draw(st.integers(0, 3))}{r[0][:9]}???",
        "gr.amka": f"{dmy}{r[0][:4]}?",
        "hr.oib": f"{r[0]}?",
        "ie.pps": f"{r[0][:7]}!",
        "it.codicefiscale": f"{letters[:6]}{born:%y}{'ABCDEHLMPRST'[born.month - 1]}{born:%d}{letters[6]}{r[0][:3]}!",
        "lt.asmens": f"4{ymd}{r[0][:3]}?",
        "lv.pvn": f"{dmy}1{r[0][:3]}?",
        "nl.bsn": f"{r[0][:8]}?",
        "pl.pesel": f"{ymd}{r[0][:4]}?",
        "pt.nif": f"2{r[0][:7]}?",
        "pt.cc": f"{r[0][:8]}?ZZ?",
        "ro.cnp": f"1{ymd}{draw(st.integers(10, 39))}{r[1][:3]}?",
        "se.personnummer": f"{ymd}{r[0][:3]}?",
        "si.emso": f"{dmy[:4]}9{dmy[4:]}50{r[0][:3]}?",
    }
    assert set(forms) == {entry["module"] for entry in TABLE["national_id"]}
    module = draw(st.sampled_from(sorted(forms)))
    is_valid = importlib.import_module(f"stdnum.{module}").is_valid
    alphabets = {"?": string.digits, "!": string.ascii_uppercase, "#": string.digits + string.ascii_uppercase}
    choices = (alphabets.get(character, character) for character in forms[module])
    found = next((n for n in map("".join, itertools.product(*choices)) if is_valid(n)), None)
    assume(found)
    return module, str(found)


@settings(max_examples=200)
@given(identifiers(), st.data(), words, st.booleans())
def test_a_national_identifier_is_found_beside_its_name_in_any_spacing(
    identifier: tuple[str, str], data: st.DataObject, after: str, is_next_line: bool
) -> None:
    module, number = identifier
    (entry,) = (e for e in TABLE["national_id"] if e["module"] == module)
    if module in WORDLESS:
        assert_just_this("x ", number, f" {after}", "national_id")
    else:
        word = data.draw(st.sampled_from(entry["words"])).replace("*", "")
        assert_just_this(
            f"{word}:{chr(10) if is_next_line else ' '}", data.draw(spaced(number)), f" {after}", "national_id"
        )
        assert not find_items(f"no {number} {after}", ["national_id"]), "a weak checksum alone is not enough"
    at = data.draw(st.sampled_from([i for i, c in enumerate(number) if c.isdigit()]))
    broken = f"{number[:at]}{(int(number[at]) + 1) % 10}{number[at + 1 :]}"
    if not any(importlib.import_module(f"stdnum.{e['module']}").is_valid(broken) for e in TABLE["national_id"]):
        assert not find_items(f"{' '.join(w.replace('*', '') for w in entry['words'])} {broken}", ["national_id"])


MARKS = [
    "Tel.",
    "Tél. :",
    "Telefon (privat):",
    "phone",
    "Fax",
    "Mobil",
    "Τηλ.",
    "тел.:",
    "puh.",
    "tlf.",
    "tālr.",
    "Telefón",
    "Handy-Nr.",
]


@given(
    st.sampled_from(["1", "49", "33", "420", "358", "30", "371", "353"]),
    digits(9),
    st.data(),
    st.sampled_from(["+", "00"]),
    words,
)
def test_an_international_phone_number_is_found(
    country: str, rest: str, data: st.DataObject, plus: str, after: str
) -> None:
    number = f"{country} {rest[:2]} {rest[2:5]} {rest[5:]}" + ("7" if country == "1" else "")
    separator = data.draw(st.sampled_from([" ", "-", ".", "/", "\u00a0"] + [""] * (plus == "+")))
    assert_just_this("x ", plus + number.replace(" ", separator), f"; {after}", "phone")


@given(st.sampled_from(MARKS), digits(8), words)
def test_a_national_phone_number_is_found_after_what_marks_it(mark: str, rest: str, after: str) -> None:
    for number in (
        f"0{rest}",
        f"0{rest[:2]}/{rest[2:]}",
        f"(0{rest[:2]}) {rest[2:5]}-{rest[5:]}",
        f"06 {rest[:2]} {rest[2:4]} {rest[4:6]} {rest[6:]}",
    ):
        assert_just_this(f"{mark} ", number, f"; {after}", "phone")
    assert replaced(f"{mark} 0{rest}, 0{rest[:3]}-{rest[3:]}") == f"{mark} <phone>, <phone>"


@pytest.mark.parametrize(
    "text",
    [
        "Tel. 12.03.2020 und 2020-03-12, phone 1998-2003, Fax 3.14159265",
        "ISBN 978-3-16-148410-0, ISSN 0378-5955, EAN 4006381333931",
        "+20 000 000 Euro, +922 337 203 685 477,58, -1.234.567,89 €, 1 234 567",
        "doi:10.1080/00949655.2018.1440294, RFC 2822, ISO 8859-1, §§ 1.2.3.4 und 2.5.29.35",
        "version 93.184.216.34, v1.2.3.4, Chrome/91.0.47.124, linux-5.10.0.99, (>= 1.6.12.99), 1.2.3.4.5",
        "192.168.1.1 10.0.0.1 127.0.0.1 224.0.0.251 2001:db8::1 fe80::1 ::1 193.0.0.0/21 2001:67c::/32",
        "std::vector a::b 12:30:45 2020:10:10 icon@2x.png @handle user@localhost lodash@4.17.21",
        "IP 999.1.1.1, 04.08.2021 12:30, 16.16.16.16.16, 2.500.000.000, 1609459200000, 4111111111111111",
        "44051401359 111222333 33392005961 54362315K",
    ],
)
def test_what_looks_alike_is_left(text: str) -> None:
    assert replaced(text) == text


@given(
    st.from_regex(r"[a-zäéß][a-z0-9._+-]{0,12}[a-z0-9]", fullmatch=True),
    st.from_regex(r"([a-zü0-9][a-z-]{0,8}[a-z]\.){1,3}(org|eu|museum|бг)", fullmatch=True),
    words,
)
def test_an_email_address_is_found(local: str, domain: str, after: str) -> None:
    assert_just_this("mail <", f"{local}@{domain}", f">. {after}", "email")


@given(st.integers(0, 2**32 - 1), st.integers(2 << 124, (4 << 124) - 1), words)
@example(int(ipaddress.ip_address("8.8.8.8")), int(ipaddress.ip_address("2a00:1450:4001:81b::200e")), "")
def test_a_public_ip_address_is_found_and_no_other(four: int, six: int, after: str) -> None:
    for address in (ipaddress.ip_address(four), ipaddress.IPv6Address(six)):
        if address.is_global and not address.is_multicast:
            assert_just_this("IP ", str(address), f" {after}", "ip")
        else:
            assert not find_items(f"IP {address} {after}", ["ip"])
    full = ipaddress.IPv6Address(six)
    if full.is_global:
        assert_just_this("[", full.exploded, "]:443", "ip")


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(
                [
                    "Tel. ",
                    "\n",
                    "a@b.org",
                    "+49 89 1234567",
                    "DE89370400440532013000",
                    " 1.",
                    "2a00::1",
                    "PESEL ",
                    "44051401359",
                    "@",
                    "0",
                ]
            ),
        ),
        max_size=30,
    ).map("".join)
)
def test_whatever_the_text_the_rest_of_it_stays_as_it_is(text: str) -> None:
    items = find_items(text, KINDS)
    done, expected = 0, ""
    for start, end, kind in items:
        assert done <= start < end
        expected += text[done:start] + TOKENS[kind]
        done = end
    assert replaced(text) == expected + text[done:]
    assert all(kind == "email" for *_, kind in find_items(text, ["email"])) and not find_items(text, [])


def test_kinds_are_those_asked_for_and_no_others() -> None:
    text = "a@b.org, Tel. 089 1234567"
    assert replaced(text, ["email"]) == "<email>, Tel. 089 1234567"
    assert replaced(text, ["phone"]) == "a@b.org, Tel. <phone>"
    with pytest.raises(UserError, match=r"emails(.|\n)*email, iban, card, national_id, phone, ip"):
        replace_personal_data(["emails"])


def test_a_text_without_items_is_the_same_object() -> None:
    document = Document("id", "de", "x " * 50 + "1999", "source", "file:1", {})
    text = document.text
    replace_personal_data(KINDS)(document)
    assert document.text is text


@pytest.mark.parametrize("unit", ["123456 ", "AB12", "1.2.3.4 ", "a@", "12-", "+49 ", "Tel. 0", "PESEL 1 "])
def test_hostile_text_takes_time_in_proportion(unit: str) -> None:
    began = time.perf_counter()
    find_items(unit * (100_000 // len(unit)), KINDS)
    assert time.perf_counter() - began < 5
