"""A small run of the whole chain, made once by the command itself, and its twin under signals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    "experiment=smoke",
    "train.tokens=32768",
    "train.log_every_steps=3",
    "train.validate_every_steps=4",
    "train.save_every_steps=4",
    "schedule.warmup_steps=1",
    "suite.max_items_per_language=2",
    "corpus.languages=[de,el,mt]",
    "mixture.max_epochs=100",
    "tokenizer.vocab_size=1000",
)


class Command:
    """The `marathon` command with a scratch folder of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environment = {**os.environ, "MARATHON_SCRATCH": str(scratch), "PYTHONSAFEPATH": "1"}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "marathon.cli", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


@pytest.fixture(scope="session")
def marathon(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def finished(marathon: Command) -> tuple[Path, str]:
    """Folder of a finished run, and what the command printed."""
    status, output = marathon("run", *SMALL, "name=whole")
    assert status == 0, output
    return marathon.scratch / "runs" / "whole", output
