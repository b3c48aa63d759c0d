"""Whether a text reads like one: repetition, form and stop words within limits of its language; a scorer; repair.

Limits are data, derived from reference text of each language. A language that has none is not filtered: limits of
another one would reject it for what it is.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.errors import UserError
from data.files import find_list, write_whole
from data.language import open_fasttext
from data.sources import SPACE_MARK, Document

TOP_NGRAMS, DUPLICATE_NGRAMS = range(2, 5), range(5, 11)
SENTENCE_ENDS = (".", "!", "?", "…", ":", ";", "\u037e")  # the last one is the Greek question mark
CLOSERS = "\"'”’“»«)]"

TAIL = 0.01  # share of the reference text that may stand beyond a limit, on each side
MIN_STOP_WORD_SHARE, MAX_STOP_WORDS = 0.002, 20
MIN_DOCUMENTS = 500  # limits from fewer would be chance

BOUNDS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "words": ((10, 50), (100_000, 100_000)),
    "mean_word_length": ((1, 3), (10, 20)),
    "non_alphabetic_words": ((0, 0), (0.2, 0.4)),
    "stop_words": ((2, 2), (MAX_STOP_WORDS, MAX_STOP_WORDS)),
    "line_breaks": ((0, 0), (0.15, 0.3)),
    "line_punctuation": ((0, 0.2), (1, 1)),
    "duplicate_lines": ((0, 0), (0.2, 0.4)),
    "duplicate_line_characters": ((0, 0), (0.1, 0.2)),
    **{f"top_{n}_grams": ((0, 0), (0.24 - 0.02 * n, 0.48 - 0.04 * n)) for n in TOP_NGRAMS},
    **{f"duplicate_{n}_grams": ((0, 0), (0.2 - 0.01 * n, 0.4 - 0.02 * n)) for n in DUPLICATE_NGRAMS},
    "language_score": ((0.3, 0.9), (1, 1)),
}
"""Where the lower and the upper limit of each heuristic may lie. Very clean reference text would forbid what is usual
elsewhere, dirty text would allow everything. The strict ends are near the limits of Gopher (Rae et al. 2021)."""


@dataclass
class Limits:
    """What is known of a language: how many documents told it, its stop words, lowest and highest values."""

    documents: int
    stop_words: list[str]
    limits: dict[str, list[float]]


def quality(thresholds: str) -> Callable[[Document], str]:
    """Step that rejects with the name of the first heuristic out of limits; `thresholds` is the path of a YAML."""
    known = read_thresholds(thresholds)

    def step(document: Document) -> str:
        found = known.get(document.lang) or known.get(document.lang.partition("-")[0])
        if not found:
            return ""
        values = measure(document, found.stop_words)
        return next((name for name, (low, high) in found.limits.items() if not low <= values[name] <= high), "")

    return step


def scorer(model_path: str, min_quality: float, label: str = "__label__hq") -> Callable[[Document], str]:
    """Step that sets `quality` to the probability of `label` by a fastText classifier; rejects with `low_quality`."""
    classify = open_fasttext(model_path, -1)
    if label not in (labels := sorted(name for name, _ in classify(""))):
        rule = "the label whose probability is the quality is one of the classifier's"
        raise UserError(f"{model_path} has no label {label}", rule, f"one of {', '.join(labels[:10])}")

    def step(document: Document) -> str:
        document.quality = min(dict(classify(document.text)).get(label, 0.0), 1.0)
        return "" if document.quality >= min_quality else "low_quality"

    return step


def repair(document: Document) -> str:
    """Step that mends what was decoded wrongly, drops control characters, and brings to NFC; it rejects nothing.

    Quotes, ligatures, widths and HTML entities stay as they were written. NFC loses nothing that Unicode holds to be
    different; without it `é` has two spellings, which tokenizer, identification and search for copies take for two.
    """
    import ftfy
    from ftfy.badness import is_bad

    text = document.text
    if _DAMAGED.search(text) or is_bad(text):  # ftfy itself asks is_bad, line by line, at a third of the speed
        text = _CONTROLS.sub("", ftfy.fix_text(text, ftfy.TextFixerConfig(normalization=None, **_KEPT)))
    text = unicodedata.normalize("NFC", text).replace(SPACE_MARK, "_")
    if text != document.text:
        document.text = text
    return ""


def measure(document: Document, stop_words: Sequence[str]) -> dict[str, float]:
    """Values of all heuristics. Words are what spaces part, in small letters; shares of n-grams are in characters.

    `stop_words` counts the different ones that occur, `line_breaks` those for each word.
    """
    words = document.text.lower().split()
    lines = [line for line in map(str.strip, document.text.split("\n")) if line]
    counts, n_words, n_lines = Counter(words), max(len(words), 1), max(len(lines), 1)
    n_characters, n_in_lines = max(sum(map(len, words)), 1), max(sum(map(len, lines)), 1)
    repeated = [(line, n - 1) for line, n in Counter(lines).items() if n > 1]
    return {
        "words": len(words),
        "mean_word_length": n_characters / n_words,
        "non_alphabetic_words": sum(n for w, n in counts.items() if not any(map(str.isalpha, w))) / n_words,
        "stop_words": sum(word in counts for word in stop_words),
        "line_breaks": (n_lines - 1) / n_words,
        "line_punctuation": sum(line.rstrip(CLOSERS).endswith(SENTENCE_ENDS) for line in lines) / n_lines,
        "duplicate_lines": sum(n for _, n in repeated) / n_lines,
        "duplicate_line_characters": sum(n * len(line) for line, n in repeated) / n_in_lines,
        **{name: min(n / n_characters, 1.0) for name, n in _repeated_ngrams(words).items()},
        "language_score": document.lang_score,
    }


def derive(documents: Mapping[str, Sequence[Document]], min_documents: int = MIN_DOCUMENTS) -> dict[str, Limits]:
    """Limits and stop words from reference text by language; a language that has too little is named, and left out.

    A limit leaves `TAIL` of the documents beyond it, within `BOUNDS`. Stop words are the most frequent ones that make
    `MIN_STOP_WORD_SHARE` of the words of every source: a word of one subject is frequent in some sources only.
    """
    found = {}
    for language, members in sorted(documents.items()):
        if len(members) >= min_documents:
            found[language] = _limits(members)
        else:
            print(f"{language}: {len(members)} documents are too few, no limits", flush=True)
    return found


def read_thresholds(path: str) -> dict[str, Limits]:
    """Limits by language from a YAML as `save_thresholds` writes it; raises `UserError`."""
    rule = "by language: documents, stop_words, and limits as {heuristic: [lowest, highest]}"
    try:
        found = {language: Limits(**entry) for language, entry in yaml.safe_load(find_list(path).read_bytes()).items()}
        names = {name for entry in found.values() for name, (_, _) in entry.limits.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}", rule, "derive it again, or correct it") from None
    if wrong := sorted(names - BOUNDS.keys()):
        raise UserError(f"{path}: {', '.join(wrong)}", rule, f"heuristics are {', '.join(BOUNDS)}")
    return found


def save_thresholds(found: Mapping[str, Limits], path: Path, header: Iterable[str]) -> None:
    """Writes limits as YAML; `header` are the lines of the comment above: from which text, by which command."""
    plain = {language: vars(entry) for language, entry in found.items()}
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=118)
    write_whole(path, "".join(f"# {line}\n" for line in header) + body)


_KEPT = {"uncurl_quotes": False, "fix_latin_ligatures": False, "fix_character_width": False, "unescape_html": False}
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DAMAGED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc]")


def _repeated_ngrams(words: list[str]) -> dict[str, int]:
    """Characters in the repeated n-gram that takes most of them, and in all n-grams from their second occurrence on.

    A longer n-gram can be repeated only where a shorter one is: most texts are done after a few rounds.
    """
    found = {name: 0 for name in BOUNDS if name.endswith("_grams")}
    ends = [0, *accumulate(map(len, words))]
    places: Sequence[int] = range(len(words))
    names: Sequence[Any] = words
    for n in range(2, DUPLICATE_NGRAMS.stop):
        ngrams = [(name, words[i + n - 1]) for i, name in zip(places, names, strict=True) if i + n <= len(words)]
        times = Counter(ngrams)
        numbers = {ngram: number for number, ngram in enumerate(times) if times[ngram] > 1}
        if not numbers:
            break
        repeated = [(i, ngram) for i, ngram in zip(places, ngrams, strict=False) if ngram in numbers]
        places, names = [i for i, _ in repeated], [numbers[ngram] for _, ngram in repeated]
        if n in TOP_NGRAMS:
            found[f"top_{n}_grams"] = max(times[ngram] * (ends[i + n] - ends[i]) for i, ngram in repeated)
        else:
            found[f"duplicate_{n}_grams"] = _covered(places, names, n, ends)
    return found


def _covered(places: Sequence[int], names: Sequence[int], n: int, ends: list[int]) -> int:
    """Characters in n-grams that stand before them already; where they overlap, they count once."""
    seen, covered, total = set(), 0, 0
    for i, name in zip(places, names, strict=True):
        if name in seen:
            total += ends[i + n] - ends[max(i, covered)]
            covered = i + n
        seen.add(name)
    return total


def _limits(documents: Sequence[Document]) -> Limits:
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        words[document.source].update(filter(str.isalpha, document.text.lower().split()))
    totals = [(counts, counts.total()) for counts in words.values()]
    shares = {word: min(counts[word] / total for counts, total in totals) for word in totals[0][0]}
    frequent = [word for word in sorted(shares, key=lambda w: (-shares[w], w)) if shares[word] >= MIN_STOP_WORD_SHARE]
    found = Limits(len(documents), frequent[:MAX_STOP_WORDS], {})
    rows = [measure(document, found.stop_words) for document in documents]
    for name, bounds in BOUNDS.items():
        ends = np.quantile([row[name] for row in rows], (TAIL, 1 - TAIL))
        found.limits[name] = [round(float(np.clip(end, *bound)), 3) for end, bound in zip(ends, bounds, strict=True)]
        if name == "words":  # what is too short already has no say in the rest
            rows = [row for row in rows if row[name] >= found.limits[name][0]]
    return found
