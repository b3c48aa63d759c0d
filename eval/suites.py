"""Question suites in the 24 official languages of the EU, generated from CLDR as PyPI `babel` carries it.

A suite is a folder named by the hash of its content: JSONL with the questions and YAML with the task for
lm-evaluation-harness, one pair a family and language, and `suite.json`, which tells what is in it. It is complete or
absent; anyone can ask the same with `lm_eval --include_path . --tasks agreement_pl` inside it.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Collection
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import babel
from babel import Locale
from babel.core import get_cldr_version

from configs.enums import Family
from configs.errors import UserError
from configs.schema import SuiteConfig
from ledger.pages import render

LANGUAGES = tuple("bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv".split())  # noqa: SIM905

# Fewer questions than this say nothing: the standard error of an accuracy is then above 15 points.
MIN_ITEMS = 10
# Two-letter codes of CLDR that are no countries or territories of ISO 3166, or stand for several.
NO_TERRITORY = frozenset("AC CP CQ DG EA EU EZ IC QO TA UN XA XB ZZ".split())  # noqa: SIM905


class Item(NamedTuple):
    """A question: which of `choices` goes on from `query`? An empty query means the start of a document."""

    query: str
    choices: tuple[str, ...]
    gold: int = 0


Group = tuple[Item, ...]  # asked together or not at all


def agreement(lang: str) -> list[Group]:
    """Number agreement: "22" goes on as " petabajty", not as " petabajtów".

    Two forms of a unit are asked in both directions, each with a number that demands it, so that always preferring one
    scores exactly one half. In Hungarian nouns stay in the singular after numbers: there is nothing to ask.
    """
    locale, groups = _locale(lang), {}
    numbers: dict[str, list[int]] = {}
    for number in range(1, 200):
        numbers.setdefault(locale.plural_form(number), []).append(number)
    english = _units(_locale("en"))
    for unit, forms in sorted(_units(locale).items()):
        if lang != "en":
            forms = _without_gaps(forms, english.get(unit, {}).values())
        demanding: dict[str, list[int]] = {}
        for category in sorted(forms.keys() & numbers.keys()):
            demanding.setdefault(forms[category], []).extend(numbers[category])
        for pair in combinations(sorted(demanding), 2):
            rng = _rng(lang, *pair)
            groups[pair] = tuple(
                _item(right, wrong, rng.choice(demanding[right])) for right, wrong in (pair, pair[::-1])
            )
    return list(groups.values())


def countries(lang: str) -> list[Group]:
    """Country names: "angielski: Germany", next line "polski:", goes on as " Niemcy", out of four of like length.

    Names come from English, for English from French, and the labels from the language itself, so that nothing foreign
    but the asked name is in the question. Names alike in both are left out: copying would answer them.
    """
    source_lang = "fr" if lang == "en" else "en"
    source, target, labels = _territories(source_lang), _territories(lang), _locale(lang).languages
    names = sorted(set(target.values()), key=lambda name: (len(name.encode()), name))
    groups: list[Group] = []
    for code in sorted(source.keys() & target.keys()):
        asked, right = source[code], target[code]
        if asked.casefold() != right.casefold():
            place = names.index(right)
            alike = [name for name in names[max(0, place - 10) : place + 11] if name not in (asked, right)]
            choices = tuple(f" {name}" for name in (right, *_rng(lang, code).sample(alike, 3)))
            groups.append((Item(f"{labels[source_lang]}: {asked}\n{labels[lang]}:", choices),))
    return groups


FAMILIES: dict[Family, Callable[[str], list[Group]]] = {Family.agreement: agreement, Family.countries: countries}


def build_suite(suite: SuiteConfig, languages: Collection[str], root: Path) -> Path:
    """Writes the suite under `root`, if it is not there yet, and returns its folder; without families, it is empty.

    Languages outside the 24 are passed over. Raises `UserError` for families that have nothing to ask.
    """
    spoken = [lang for lang in LANGUAGES if lang in languages]
    found = {f"{family}_{lang}": FAMILIES[family](lang) for family in suite.tasks for lang in spoken}
    sizes = {name: sum(map(len, groups)) for name, groups in found.items()}
    asked = {name: groups for name, groups in found.items() if sizes[name] >= MIN_ITEMS}
    if suite.tasks and not asked:
        told = f"suite.tasks = {[*map(str, suite.tasks)]} in {sorted(languages)}"
        raise UserError(told, "has no questions", f"languages of {LANGUAGES}")
    files: dict[str, bytes] = {}
    tasks, template = {}, Path(__file__).with_name("task.yaml.j2")
    for name, groups in asked.items():
        items = _drawn(name, groups, suite.max_items_per_language)
        lines = [json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items]
        files[f"{name}.jsonl"], files[f"{name}.yaml"] = "".join(lines).encode(), render(template, name=name).encode()
        tasks[name] = {"items": len(items), "items_found": sizes[name], "chance": 1 / len(items[0].choices)}
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + files[name] + b"\0" for name in sorted(files))).hexdigest()
    origin = f"CLDR {get_cldr_version()} through babel {babel.__version__}"
    left_out = {name: size for name, size in sizes.items() if name not in asked}
    index = {"hash": digest, "origin": origin, "licence": "Unicode-3.0", "tasks": tasks, "left_out": left_out}
    files["suite.json"] = (json.dumps(index, ensure_ascii=False, indent=1) + "\n").encode()
    files["LICENSE-CLDR.txt"] = (Path(babel.__file__).parent / "locale-data" / "LICENSE.unicode").read_bytes()
    folder = root / f"suite-{digest[:16]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".suite-", dir=root) as beside:
            written = Path(beside, folder.name)
            written.mkdir()
            for name, content in files.items():
                (written / name).write_bytes(content)
            try:
                written.rename(folder)
            except OSError:
                # Another run may have been first; the name is the hash of the content, so theirs is ours.
                if not folder.exists():
                    raise
    return folder


def _locale(lang: str) -> Locale:
    # Portuguese of the EU is that of Portugal; CLDR means that of Brazil by plain `pt`.
    return Locale.parse("pt_PT" if lang == "pt" else lang)


def _rng(*key: str) -> random.Random:
    return random.Random("/".join(key))


def _units(locale: Locale) -> dict[str, dict[str, str]]:
    """Patterns of each unit by plural category; where CLDR has no long ones, it means the short ones."""
    units = {}
    # babel has no public way to the patterns of all plural forms, only to the right one.
    for unit, lengths in locale._data["unit_patterns"].items():
        for length in ("short", "long"):
            forms = {category: _plain(form) for category, form in lengths.get(length, {}).items() if category != "per"}
            if len(forms) > 1:
                units[unit] = {category: form for category, form in forms.items() if _is_spelled_out(form)}
    return units


def _plain(text: str) -> str:
    # No-break spaces (U+00A0, U+202F) bind numbers to units in CLDR; running text has plain ones.
    return text.replace("\u00a0", " ").replace("\u202f", " ")


def _is_spelled_out(form: str) -> bool:
    words = form.replace("{0}", " ").replace("-", " ").replace("’", "").replace("'", "").split()
    is_abbreviated = any(word.isupper() for word in words) or len(max(words, key=len, default="")) < 3
    return form.count("{0}") == 1 and "".join(words).isalpha() and not is_abbreviated


def _without_gaps(forms: dict[str, str], english: Collection[str]) -> dict[str, str]:
    """Without forms that stand for a missing translation: English ones, and short ones, beside native ones."""
    longest = max(map(len, forms.values()), default=0)
    native = {category: form for category, form in forms.items() if form not in english and 2 * len(form) > longest}
    return native or forms


def _item(right: str, wrong: str, number: int) -> Item:
    """The words both forms share in front become the query, so that only what differs is scored."""
    right, wrong = right.format(number), wrong.format(number)
    n_alike = len(os.path.commonprefix((right, wrong)))  # noqa: RUF071 - characters are meant
    shared = max(right.rfind(" ", 0, n_alike), 0)
    return Item(right[:shared], (right[shared:], wrong[shared:]))


def _territories(lang: str) -> dict[str, str]:
    """Names of countries by ISO code; names with a second name in brackets are left out."""
    return {
        code: _plain(name)
        for code, name in _locale(lang).territories.items()
        if len(code) == 2 and code.isalpha() and code not in NO_TERRITORY and name != code and "(" not in name
    }


def _drawn(name: str, groups: list[Group], max_items: int) -> list[Item]:
    """Whole groups drawn with a fixed seed, in their order, up to `max_items` questions.

    The right choice is at a place drawn anew for each question: were it always the first, ties would be rewarded.
    """
    places, room = [], max_items
    for place in _rng("choose").sample(range(len(groups)), len(groups)):
        if len(groups[place]) <= room:
            places.append(place)
            room -= len(groups[place])
    rng, items = _rng("gold", name), []
    for query, choices, gold in (item for place in sorted(places) for item in groups[place]):
        order = rng.sample(range(len(choices)), len(choices))
        items.append(Item(query, tuple(choices[i] for i in order), order.index(gold)))
    return items
