"""The ledger: RUN/ledger.jsonl, one JSON object a line, only ever appended to. Model card and report render it.

What is not known is written as `gap("reason")`, never left out and never guessed.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def gap(reason: str) -> str:
    """The value of a fact that is not known."""
    return f"GAP: {reason}"


def json_lines(path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, if it is there; a line torn by a kill is passed over. `options`: json.loads'."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                if isinstance(found := json.loads(line, **options), dict):
                    yield found


class Ledger:
    """Appends to and reads the record of one run; one process writes at a time (rank 0)."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ledger.jsonl"

    def append(self, event: str, **facts: Any) -> None:
        """Writes one line and forces it to disk, so that a killed job has told all it did."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # A process killed in mid-line leaves no newline; the next record must not be glued to its rest.
            file.seek(max(file.tell() - 1, 0))
            if file.read(1) not in (b"", b"\n"):
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, event: str | None = None) -> Iterator[dict[str, Any]]:
        """Records in order, those of one event or all."""
        return (record for record in json_lines(self.path) if event is None or record["event"] == event)

    def last(self, event: str, **matching: Any) -> dict[str, Any] | None:
        """The newest record of an event whose facts equal `matching`, or None."""
        found = [record for record in self.read(event) if matching.items() <= record.items()]
        return found[-1] if found else None

    @property
    def n_bytes(self) -> int:
        """Length of the file so far."""
        return self.path.stat().st_size if self.path.exists() else 0
