"""What became of every document: counts by step and language, reasons with examples.

Each step takes documents in and lets them out, changed or not, or rejects them for a reason; what goes in is what comes
out and what is rejected, in documents, for every step. Tallies of parts add up to the tally of the whole, whatever the
parts.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data.files import write_whole
from ledger.pages import render

EXAMPLES = 3
READ = "read"
"""The first step: records that are no documents are rejected by it."""
UNKNOWN = "und"
"""The language of a document of which none is known (BCP-47)."""


@dataclass
class Tally:
    """One step in one language: [documents, bytes] in, out and changed, and by reason of rejection."""

    came: list[int] = field(default_factory=lambda: [0, 0])
    """By the language that a document had before the step."""
    left: list[int] = field(default_factory=lambda: [0, 0])
    """By the language that it has after it, with the bytes that it has then."""
    changed: int = 0
    """Documents whose text is another one after the step."""
    rejected: dict[str, list[int]] = field(default_factory=dict)
    """By reason."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """The first few of each reason: source, location and the beginning of the text."""

    def add(self, other: "Tally") -> None:
        """Adds the tally of a later part."""
        self.changed += other.changed
        for mine, its in ((self.came, other.came), (self.left, other.left)):
            mine[0], mine[1] = mine[0] + its[0], mine[1] + its[1]
        for reason, (n, n_bytes) in other.rejected.items():
            self.reject(reason, n, n_bytes)
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:EXAMPLES]

    def reject(self, reason: str, n: int, n_bytes: int) -> None:
        """Counts rejections."""
        counts = self.rejected.setdefault(reason, [0, 0])
        counts[0], counts[1] = counts[0] + n, counts[1] + n_bytes


class Audit:
    """Tallies by step, in the order of the steps, and language."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Tally]] = {}
        self.records: dict[str, dict[str, int]] = {}
        """By source: how many were `read`, and how many of them are no documents, by reason."""

    def tally(self, step: str, language: str) -> Tally:
        """The tally of one step in one language, begun where there is none."""
        try:  # asked for several times a document
            return self.steps[step][language]
        except KeyError:
            return self.steps.setdefault(step, {}).setdefault(language or UNKNOWN, Tally())

    def count_record(self, source: str, reason: str = "") -> None:
        """Counts a record as read, and as bad where there is a reason."""
        counts = self.records.setdefault(source, {READ: 0})
        counts[READ] += 1
        if reason:
            counts[reason] = counts.get(reason, 0) + 1

    def reject(self, step: str, language: str, reason: str, n_bytes: int, place: dict[str, str]) -> None:
        """Counts one rejected document or record; the first few of `place` (source, location, excerpt) are kept."""
        tally = self.tally(step, language)
        tally.reject(reason, 1, n_bytes)
        if len(shown := tally.examples.setdefault(reason, [])) < EXAMPLES:
            shown.append(place)

    def add(self, other: "Audit") -> None:
        """Adds a later part."""
        for step, languages in other.steps.items():
            for language, tally in languages.items():
                self.tally(step, language).add(tally)
        for source, counts in other.records.items():
            mine = self.records.setdefault(source, {})
            mine |= {reason: mine.get(reason, 0) + n for reason, n in counts.items()}

    def refuse_bad_share(self, source: str, max_bad_share: float) -> None:
        """Raises `UserError` where more of a source is bad than the config allows."""
        counts = self.records.get(source, {READ: 0})
        n_read, bad = counts[READ], {reason: n for reason, n in counts.items() if reason != READ}
        n_bad = sum(bad.values())
        if n_bad <= max_bad_share * n_read:
            return
        told = ", ".join(f"{reason} {n}" for reason, n in sorted(bad.items(), key=lambda item: -item[1]))
        shown = [
            {"reason": reason, **example}
            for tally in self.steps[READ].values()
            for reason, examples in tally.examples.items()
            for example in examples
            if example["source"] == source
        ]
        examples = "".join(f"\n    {json.dumps(example)}" for example in shown[:EXAMPLES])
        raise UserError(
            f"corpus.sources.{source}: {n_bad} of {n_read} records are bad ({told}), for example{examples}",
            f"corpus.max_bad_share = {max_bad_share}",
            "correct text_field, lang_field or the files; or allow more with corpus.max_bad_share",
        )

    def sums(self) -> dict[str, Any]:
        """Documents and bytes by step: came, left, rejected by reason; what the ledger takes."""
        found: dict[str, Any] = {}
        for step, languages in self.steps.items():
            whole = Tally()
            for tally in languages.values():
                whole.add(tally)
            found[step] = {"came": whole.came, "left": whole.left, "changed": whole.changed, "rejected": whole.rejected}
        return found

    def save(self, path: Path) -> None:
        """Writes the audit as JSON, the same for the same counts."""
        steps = {
            step: {language: vars(tally) for language, tally in sorted(languages.items())}
            for step, languages in self.steps.items()
        }
        write_whole(path, json.dumps({"steps": steps, "records": self.records}, ensure_ascii=True, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Audit":
        """Reads what `save` wrote."""
        found, audit = json.loads(path.read_text(encoding="utf-8")), cls()
        audit.records = found["records"]
        for step, languages in found["steps"].items():
            audit.steps[step] = {language: Tally(**tally) for language, tally in languages.items()}
        return audit

    @classmethod
    def total(cls, parts: Iterable[Path]) -> "Audit":
        """The sum over saved audits, in the order given."""
        audit = cls()
        for path in parts:
            audit.add(cls.load(path))
        return audit


def write_page(audit: Audit, title: str, facts: dict[str, Any], path: Path) -> None:
    """Writes the audit as one HTML page that needs nothing else."""
    template = Path(__file__).with_name("audit.html.j2")
    write_whole(path, render(template, title=title, audit=audit, sums=audit.sums(), facts=facts))
