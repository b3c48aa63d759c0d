"""What identification and cleaning make of real text in many languages; derives data/thresholds.yaml.

    python benchmarks/text.py FOLDER                                    brings the text
    python benchmarks/languages.py FOLDER                               prints three tables; about ten minutes
    python benchmarks/languages.py FOLDER --derive data/thresholds.yaml

Truth for precision and recall is labelled text, and no model takes part in labelling it: paragraphs and sentences of
the Universal Declaration, and of those manuals in which at most 2 % of the paragraphs are left in English. What an
edition has word for word in common with another language's is not used: names, code, and what nobody translated.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.text import LANGUAGES
from configs.text import IdentifyConfig
from data.files import find_files, read_lines
from data.language import Guess, identify, open_identifier
from data.quality import derive, quality, repair, save_thresholds
from data.sources import Document

UDHR = "package:data/samples/udhr-europe.jsonl.zst"
CONFUSED = [["hr", "bs", "sr"], ["cs", "sk"], ["da", "nb", "sv"], ["pt", "gl", "es"], ["mt", "it"]]
SETTINGS = IdentifyConfig(model="lid176", second="langid", confused=CONFUSED)
LONG, SHORT = range(60, 10**9), range(25, 60)
MAX_TEXTS = 500
"""Of each language, origin and length, so that no origin decides alone; the first by hash."""
MAX_ENGLISH = 0.02

Texts = dict[str, list[str]]
"""Texts by language."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--derive", type=Path)
    told = parser.parse_args()
    documents = [*read(told.folder)]
    if told.derive:
        return save_thresholds(derive(reference(documents)), told.derive, HEADER)
    truth = labelled(documents)
    tell_accuracy(truth)
    tell_kept(documents)
    return tell_in_language(documents)


def read(folder: Path) -> Iterator[Document]:
    """Documents that benchmarks/text.py brought, and the Universal Declaration as an origin of its own."""
    for path in [*sorted(folder.glob("*.jsonl.zst")), find_files(UDHR, ())[0].path]:
        for line in read_lines(path):
            record = json.loads(line)
            origin = record.get("origin", "udhr")
            yield Document(record["id"], record["lang"], record["text"], origin, "", {})


# --- precision and recall


def labelled(documents: list[Document]) -> dict[range, Texts]:
    """Texts by length and by the language that they are in for certain."""
    editions: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for document in documents:
        if document.source != "messages":
            editions[document.source][primary(document.lang)].update(pieces(document))
    truth: dict[range, Texts] = {LONG: defaultdict(list), SHORT: defaultdict(list)}
    for origin, by_language in editions.items():
        n_editions = Counter(text for texts in by_language.values() for text in texts)
        english = by_language["en"]
        for language, texts in by_language.items():
            long = [text for text in texts if len(text) in LONG]
            in_english = sum(text in english for text in long) / max(len(long), 1)
            is_translated = origin == "udhr" or language == "en" or (in_english <= MAX_ENGLISH and len(long) >= 100)
            if language in LANGUAGES and is_translated:
                print(
                    f"truth: {origin} {language}: {len(long)} paragraphs, {in_english:.1%} in English", file=sys.stderr
                )
                for length, chosen in truth.items():
                    own = (text for text in texts if len(text) in length and n_editions[text] == 1)
                    chosen[language] += sorted(own, key=by_hash)[:MAX_TEXTS]
    return truth


def pieces(document: Document) -> Iterator[str]:
    """Paragraphs; of the Universal Declaration also sentences, since it has next to no short paragraphs."""
    for line in document.text.split("\n"):
        yield line
        if document.source == "udhr":
            yield from (s for s in re.split(r"(?<=[.;:!?])\s+", line) if len(s) in SHORT)


def tell_accuracy(truth: dict[range, Texts]) -> None:
    models = [open_identifier("lid176"), open_identifier("langid")]
    columns = [scores(texts, guess(texts, models)) for texts in truth.values()]
    head = ["lang"] + ["n", "lid176", "langid", "both"] * 2
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for language in [*(x for x in LANGUAGES if x != "pt-BR"), "mean"]:
        print(f"| {language} | " + " | ".join(column[language] for column in columns) + " |")


def guess(texts: Texts, models: list[Callable[[str], Guess]]) -> dict[str, list[tuple[str, str]]]:
    return {
        language: [(primary(a), primary(b)) for a, b in ([m(t).language for m in models] for t in members)]
        for language, members in texts.items()
    }


def scores(texts: Texts, guesses: dict[str, list[tuple[str, str]]]) -> dict[str, str]:
    """Cells of a row by language: number of texts, then precision / recall for each way to decide.

    Precision is among the languages of this benchmark, each with the same weight however many texts it has.
    """
    ways = [lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair[0] if pair[0] == pair[1] else ""]
    cells, sums = {}, [[0.0, 0.0] for _ in ways]
    named = [Counter[str]() for _ in ways]
    for language, pairs in guesses.items():
        for way, shares in zip(ways, named, strict=True):
            for found, n in Counter(map(way, pairs)).items():
                shares[language, found] = n / len(pairs)
                shares[found] += n / len(pairs)
    judged = [x for x in LANGUAGES if texts.get(x)]
    for language in judged:
        rates = [(of[language, language] / max(of[language], 1e-9), of[language, language]) for of in named]
        for total, rate in zip(sums, rates, strict=True):
            total[0], total[1] = total[0] + rate[0], total[1] + rate[1]
        cells[language] = " | ".join([str(len(texts[language])), *(f"{p:.1%} / {r:.1%}" for p, r in rates)])
    n = sum(len(texts[x]) for x in judged)
    cells["mean"] = " | ".join([str(n), *(f"{p / len(judged):.1%} / {r / len(judged):.1%}" for p, r in sums)])
    return defaultdict(lambda: "0 | | | ", cells)


# --- what is kept


def tell_kept(documents: list[Document]) -> None:
    """Documents, MB and shares of MB by declared language, after repair, identification and quality."""
    find, judge = identify(SETTINGS), quality("package:data/thresholds.yaml")
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    others: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        if document.source == "udhr":
            continue
        declared, copy = document.lang, Document("", document.lang, document.text, document.source, "", {})
        size, counts = len(document.text.encode()), sizes[declared]
        repair(copy)
        reason = find(copy)
        outcome = reason or ("in" if copy.lang == declared else "other")
        counts["documents"], counts["bytes"] = counts["documents"] + 1, counts["bytes"] + size
        counts[outcome] += size
        others[declared][copy.lang] += size if outcome == "other" else 0
        if outcome == "in" and not (reason := judge(copy)):
            counts["kept documents"], counts["kept"] = counts["kept documents"] + 1, counts["kept"] + size
        elif outcome == "in":
            reasons[declared][reason] += size
    head = "lang | documents | MB | in it | in another | unsure | disputed | fails quality | kept documents | MB | kept"
    print(f"\n| {head} |\n|{'---|' * len(head.split('|'))}")
    for language, n in sorted(sizes.items()):
        other, reason = (next(iter(counter[language].most_common(1)), ("", 0))[0] for counter in (others, reasons))
        shares = [n[key] / n["bytes"] for key in ("in", "other", "language_unsure", "language_disputed")]
        shown = [f"{share:.1%}" for share in shares]
        shown[1] += f" {other}" if shares[1] >= 0.0005 else ""
        failed = f"{(n['in'] - n['kept']) / n['bytes']:.1%} {reason}".strip()
        sums = [str(n["kept documents"]), f"{n['kept'] / 1e6:.2f}", f"{n['kept'] / n['bytes']:.1%}"]
        print(
            "| " + " | ".join([language, str(n["documents"]), f"{n['bytes'] / 1e6:.2f}", *shown, failed, *sums]) + " |"
        )


def tell_in_language(documents: list[Document]) -> None:
    """Share of the characters in paragraphs of 60 and more that lid176 finds in the declared language, by origin."""
    model, found, whole = open_identifier("lid176"), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for place, text in sorted({((d.lang, d.source), x) for d in documents for x in paragraphs(d)}):
        whole[place] += len(text)
        found[place] += len(text) * (primary(model(text).language) == primary(place[0]))
    origins = sorted({origin for _, origin in whole})
    print(f"\n| lang | {' | '.join(origins)} |\n|{'---|' * (len(origins) + 1)}")
    for language in LANGUAGES:
        places = [(language, origin) for origin in origins]
        print(f"| {language} | " + " | ".join(f"{found[p] / whole[p]:.1%}" if whole[p] else "" for p in places) + " |")


# --- reference text


HEADER = (
    "Limits of quality by language, and its stop words; what each means stands in data/quality.py.",
    "Derived from package descriptions and manuals of Debian 12 (libreoffice-help, gnome-user-docs, debian-handbook,",
    "installation-guide) and the Universal Declaration, as far as lid176 and langid find them in their language:",
    "    python benchmarks/text.py FOLDER && python benchmarks/languages.py FOLDER --derive data/thresholds.yaml",
    "Manuals repeat themselves more than prose does: for a corpus of the web derive limits from text of your own.",
)


def reference(documents: Iterable[Document], min_documents: int = 500) -> dict[str, list[Document]]:
    """Documents that are in their language throughout, for languages that have enough of them."""
    find, model, found = identify(SETTINGS), open_identifier("lid176"), defaultdict(list)
    for document in documents:
        language = primary(document.lang)
        if find(document) or primary(document.lang) != language:
            continue
        long = [*paragraphs(document)]
        inside = sum(len(text) for text in long if primary(model(text).language) == language)
        if inside >= 0.9 * sum(map(len, long)):
            found[language].append(document)
    return {language: members for language, members in found.items() if len(members) >= min_documents}


def paragraphs(document: Document) -> Iterator[str]:
    return (line for line in document.text.split("\n") if len(line) in LONG)


def primary(language: str) -> str:
    return language.partition("-")[0]


def by_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    main()
