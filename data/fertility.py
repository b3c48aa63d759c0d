"""What a tokenizer costs each language, on text that says the same in all of them."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.enums import LanguageBalance
from configs.errors import UserError
from configs.text import TokenizerConfig
from data.files import JSONL, PACKAGE_ROOT, find_files, read_lines, sha256
from data.tokenizer import Encoder

PUBLISHED = PACKAGE_ROOT / "data" / "fertility.yaml"  # figures of published tokenizers, with their source


def read_parallel(path: str, languages: Iterable[str] = ()) -> dict[str, list[str]]:
    """Articles of each language in the same order: those that all of the `languages` have; of all where none is named.

    pt-BR takes the text of pt where it has none of its own; a language without any is left out.
    Raises `UserError` for text in another form, or in fewer than two of the languages.
    """
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for line in (line for file in find_files(path, JSONL) for line in read_lines(file.path)):
        try:
            row = json.loads(line)
            texts[row["lang"]][str(row["article"])] = row["text"]
        except (ValueError, KeyError, TypeError):
            raise _unfit(path, f"the line {line[:60]!r}…") from None
    found = {lang: texts.get(lang) or texts.get(re.split("[-_]", lang)[0]) for lang in sorted(languages or texts)}
    chosen = {lang: articles for lang, articles in found.items() if articles}
    common = sorted(set.intersection(*map(set, chosen.values()))) if chosen else []
    if len(chosen) < 2 or not common:
        raise _unfit(path, f"{len(common)} articles in {len(chosen)} of the languages {' '.join(found)}")
    return {lang: [articles[name] for name in common] for lang, articles in chosen.items()}


def tokenizer_report(
    folder: Path, cfg: TokenizerConfig, languages: Iterable[str] = (), trained_on: Collection[str] = ()
) -> dict[str, Any]:
    """Figures of an exported tokenizer on `cfg.parity_text`, as JSON has them: of each language, and of all together.

    fertility: tokens per whitespace word. parity: tokens relative to English for the same content; without English, to
    the mean. byte_share: share of tokens that are single bytes. single_language_share: share of the entries in use
    that one language alone uses. dead: entries that their own text does not lead to. `trained_on` are hashes of the
    files that it was trained on.
    """
    parallel, encoder = read_parallel(cfg.parity_text, languages), Encoder(folder)
    ids = {lang: encoder.encode(texts)[1] for lang, texts in parallel.items()}
    entries, reference = encoder.entries(), len(ids["en"]) if "en" in ids else np.mean([*map(len, ids.values())])
    is_byte, rows = np.ones(encoder.vocab_size, bool), {}
    is_byte[[*entries]] = False
    for lang, texts in parallel.items():
        n, words, n_bytes = len(ids[lang]), sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
        rows[lang] = {
            "words": words,
            "tokens": n,
            "fertility": n / words,
            "parity": float(n / reference),
            "bytes_per_token": n_bytes / n,
            "byte_share": float(is_byte[ids[lang]].mean()),  # text gives entries and bytes, nothing else
        }
    users = np.bincount(np.concatenate([np.unique(used) for used in ids.values()]))
    offsets, reached = encoder.encode([*entries.values()])
    is_alive = (np.diff(offsets) == 1) & (reached[offsets[:-1]] == [*entries])
    dead = [text for text, alive in zip(entries.values(), is_alive, strict=True) if not alive]
    trained = any(sha256(file.path) in trained_on for file in find_files(cfg.parity_text, JSONL))
    balanced = cfg.balance is LanguageBalance.parity and not cfg.path
    known = ["trained"] * trained + ["its languages balanced"] * balanced
    return {
        "text": cfg.parity_text,
        "reference": "English" if "en" in ids else "the mean",
        "vocab_size": encoder.vocab_size,
        "languages": rows,
        "together": _together(rows),
        "entries_in_use": int((users > 0).sum()),
        "single_language_share": float((users == 1).sum() / (users > 0).sum()),
        "dead": len(dead),
        "dead_examples": dead[:20],
        "published": _published(cfg.parity_text, rows),
        "warnings": [f"{what} on the text that it is measured on: it does worse elsewhere" for what in known],
    }


def report_table(report: Mapping[str, Any]) -> str:
    """The report as text: a row for each language, and a column for each published tokenizer beside this one."""
    measured = {"this tokenizer": report, **report["published"]}
    rows = [("language", "bytes/token", "byte tokens", *measured)]
    for lang, row in report["languages"].items():
        own = f"{row['bytes_per_token']:.2f}", f"{row['byte_share']:.2%}"
        rows.append((lang, *own, *(_cell(found["languages"].get(lang)) for found in measured.values())))
    together = [found["together"] for found in measured.values()]
    rows += [
        ("mean", "", "", *map(_cell, together)),
        ("worst", "", "", *(f"{found['worst']} ({found['worst_parity']:.2f})" for found in together)),
        ("Gini", "", "", *(f"{found['gini']:.3f}" for found in together)),
    ]
    lines = [f"{name:<10}" + "".join(f"{cell:>15}" for cell in cells) for name, *cells in rows]
    n_used, share = report["entries_in_use"], report["single_language_share"]
    lines += [
        f"tokens per word, and in brackets relative to {report['reference']} for the same content, on {report['text']}",
        f"{n_used:,} of {report['vocab_size']:,} entries in use by it, {share:.0%} of these by one language alone; "
        f"{report['dead']:,} that their own text does not lead to",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report["warnings"])])


def _cell(found: Mapping[str, float] | None) -> str:
    return f"{found['fertility']:.2f} ({found['parity']:.2f})" if found else ""


def _together(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Means over languages, the worst one, and the Gini coefficient of tokens for the same content."""
    parity = {lang: row["parity"] for lang, row in rows.items()}
    worst, mean, n = max(parity, key=lambda lang: parity[lang]), sum(parity.values()) / len(rows), len(rows)
    gini = sum(abs(a - b) for a in parity.values() for b in parity.values()) / (2 * n * n * mean)
    fertility = sum(row["fertility"] for row in rows.values()) / n
    return {"fertility": fertility, "parity": mean, "worst": worst, "worst_parity": parity[worst], "gini": gini}


def _published(text: str, languages: Collection[str]) -> dict[str, Any]:
    """Published tokenizers in those of the languages that they were measured in; none for another text."""
    known, published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")), {}
    if text == known["text"] and "en" in languages:
        for name, found in known["tokenizers"].items():
            pairs = {lang: pair for lang, pair in found["languages"].items() if lang in languages}
            rows = {lang: dict(zip(("fertility", "parity"), pair, strict=True)) for lang, pair in pairs.items()}
            published[name] = {"source": found["source"], "languages": rows, "together": _together(rows)}
    return published


def _unfit(path: str, found: str) -> UserError:
    rule = "parallel text is JSON lines with lang, article and text, articles being the same in two or more languages"
    return UserError(f"tokenizer.parity_text = {path}: {found}", rule, "give such a file, or leave the shipped one")
