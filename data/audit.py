"""What became of every document: counts by step and language, reasons with examples.

Parts count what is read, rejected and moved; what came to each step and left it follows from that, for every language,
in documents and bytes. Counts of parts add up to those of the whole, whatever the parts.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data.files import write_whole

EXAMPLES = 3
READ = "read"  # the first step: records that are no documents are rejected by it
UNKNOWN = "und"  # the language of a document of which none is known (BCP-47)


@dataclass
class Tally:
    """One step in one language; pairs are [documents, bytes]."""

    came: list[int] = field(default_factory=lambda: [0, 0])  # by the language that a document had before the step
    left: list[int] = field(default_factory=lambda: [0, 0])  # by the language after it, with the bytes of then
    moved: list[int] = field(default_factory=lambda: [0, 0])
    """What the step added to the language, or took from it, by changing a text or finding another language."""
    changed: int = 0  # documents whose text is another one after the step
    rejected: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # source, location, and how its text begins

    def add(self, other: "Tally") -> None:
        """Adds the tally of a later part."""
        self.changed += other.changed
        for mine, its in ((self.came, other.came), (self.left, other.left), (self.moved, other.moved)):
            count(mine, its[0], its[1])
        for reason, (n, n_bytes) in other.rejected.items():
            self.reject(reason, n, n_bytes, other.examples.get(reason, ()))

    def reject(self, reason: str, n: int, n_bytes: int, examples: Iterable[dict[str, str]]) -> None:
        """Counts rejections and keeps the first few examples (source, location, excerpt)."""
        count(self.rejected.setdefault(reason, [0, 0]), n, n_bytes)
        if len(shown := self.examples.setdefault(reason, [])) < EXAMPLES:
            shown += [*examples][: EXAMPLES - len(shown)]


class Audit:
    """Tallies by step, in the order of the steps, and language."""

    def __init__(self, steps: Iterable[str] = ()) -> None:
        self.steps: defaultdict[str, defaultdict[str, Tally]] = defaultdict(lambda: defaultdict(Tally))
        self.steps |= {step: defaultdict(Tally) for step in steps}
        self.records: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """By source: how many were `read`, and how many of them are no documents, by reason."""

    def tally(self, step: str, language: str) -> Tally:
        """The tally of one step in one language, begun where there is none."""
        return self.steps[step][language or UNKNOWN]

    def count_record(self, source: str, language: str, n_bytes: int, reason: str = "") -> None:
        """Counts a record as read, and as bad where there is a reason."""
        counts = self.records[source]
        counts[READ] += 1
        count(self.tally(READ, language).came, 1, n_bytes)
        if reason:
            counts[reason] += 1

    def move(self, step: str, before: tuple[str, int], after: tuple[str, int]) -> None:
        """Counts a document whose language or bytes a step has changed."""
        count(self.tally(step, before[0]).moved, -1, -before[1])
        count(self.tally(step, after[0]).moved, 1, after[1])

    def follow(self) -> None:
        """Works out what came to each step after the first and what left each, from all that was counted."""
        flow: dict[str, list[int]] = {}
        for step, languages in self.steps.items():
            flow = {lang: tally.came for lang, tally in languages.items()} if step == READ else flow
            for lang in sorted({*flow, *languages}):
                tally = self.tally(step, lang)
                gone = [sum(pair[i] for pair in tally.rejected.values()) for i in (0, 1)]
                tally.came = flow.get(lang, [0, 0])
                tally.left = [tally.came[i] + tally.moved[i] - gone[i] for i in (0, 1)]
            flow = {lang: [*tally.left] for lang, tally in languages.items() if tally.left[0]}

    def refuse_bad_share(self, source: str, max_bad_share: float, units: Path | None = None) -> None:
        """Raises `UserError` where more of a source is bad than the config allows; `units` holds what was rejected."""
        bad = Counter(self.records.get(source))
        n_read, n_bad = bad.pop(READ, 0), bad.total()
        if n_bad <= max_bad_share * n_read:
            return
        shown = [
            f"\n    {json.dumps({'reason': reason, **example})}"
            for tally in self.steps[READ].values()
            for reason, examples in tally.examples.items()
            for example in examples
            if example["source"] == source
        ]
        told, examples = ", ".join(f"{reason} {n}" for reason, n in bad.most_common()), "".join(shown[:EXAMPLES])
        repair = "correct text_field, lang_field or the files; or allow more with corpus.max_bad_share"
        repair += f"; all that are bad stand in {units / source}/*/rejected.jsonl.zst" if units else ""
        found = f"corpus.sources.{source}: {n_bad} of {n_read} records are bad ({told}), for example{examples}"
        rule = f"of the records of a source at most the share corpus.max_bad_share = {max_bad_share} may be bad"
        raise UserError(found, rule, repair)

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
        self.follow()
        steps = {step: dict(sorted(languages.items())) for step, languages in self.steps.items()}
        write_whole(path, json.dumps({"steps": steps, "records": self.records}, default=vars, indent=1) + "\n")

    @classmethod
    def load(cls, *paths: Path) -> "Audit":
        """The sum of saved audits, in the order given."""
        whole = cls()
        for path in paths:
            part = json.loads(path.read_text(encoding="utf-8"))
            for step, languages in part["steps"].items():
                tallies = whole.steps[step]  # here, though it may have counted nothing
                for language, tally in languages.items():
                    tallies[language].add(Tally(**tally))
            for source, counts in part["records"].items():
                whole.records[source].update(counts)
        whole.follow()
        return whole


def count(pair: list[int], n: int, n_bytes: int) -> None:
    """Adds to a pair of documents and bytes."""
    pair[0] += n
    pair[1] += n_bytes


def write_page(audit: Audit, title: str, facts: dict[str, Any], path: Path) -> None:
    """Writes the audit as one HTML page that needs nothing else."""
    from ledger.pages import render

    template = Path(__file__).with_name("audit.html.j2")
    write_whole(path, render(template, title=title, audit=audit, sums=audit.sums(), facts=facts))
