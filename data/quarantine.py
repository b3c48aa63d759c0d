"""Where bad records go: written down with reason and place, counted, and too many stop the stage."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from configs.errors import UserError

EXCERPT_CHARACTERS = 200
EARLY_STOP_RECORDS = 10_000
"""A source that is bad throughout stops after so many bad records, not after a day of writing them down."""


class Quarantine:
    """Counts the records of each source and writes the bad ones to a JSON-lines file."""

    def __init__(self, path: Path, max_bad_share: float) -> None:
        self.path, self.max_bad_share = path, max_bad_share
        self.n_read: Counter[str] = Counter()
        """Records read, by source."""
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        """Bad records by source and reason."""
        self.other_languages: dict[str, Counter[str]] = defaultdict(Counter)
        """Sound records in languages that the corpus does not want, by source and language."""
        self._file = path.open("w", encoding="utf-8")

    def put(self, source: str, location: str, reason: str, excerpt: object) -> None:
        """Sets one record aside; `location` is its file, within the source, and line or row."""
        shown = excerpt if isinstance(excerpt, str) else repr(excerpt)
        record = {"source": source, "location": location, "reason": reason, "excerpt": shown[:EXCERPT_CHARACTERS]}
        # ASCII with escapes: an excerpt may hold what UTF-8 cannot.
        self._file.write(json.dumps(record) + "\n")
        self.reasons[source][reason] += 1
        if self.reasons[source].total() >= EARLY_STOP_RECORDS:
            self.check(source)

    def check(self, source: str) -> None:
        """Raises `UserError` where more of the source is bad than the config allows."""
        n_bad, n_read = self.reasons[source].total(), self.n_read[source]
        if n_bad <= self.max_bad_share * n_read:
            return
        self._file.flush()
        counts = ", ".join(f"{reason} {n}" for reason, n in self.reasons[source].most_common())
        raise UserError(
            f"corpus.sources.{source}: {n_bad} of {n_read} records are bad ({counts}), for example\n{self._examples()}",
            f"corpus.max_bad_share = {self.max_bad_share}",
            "correct text_field, lang_field or the files; or allow more with corpus.max_bad_share",
        )

    def close(self) -> None:
        """Completes the file."""
        self._file.close()

    def _examples(self) -> str:
        with self.path.open(encoding="utf-8") as file:
            return "".join(f"    {line}" for line, _ in zip(file, range(3), strict=False)).rstrip("\n")
