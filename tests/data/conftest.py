"""A corpus prepared once for all tests of the room, and a maker of configs for small ones."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.compose import compose
from configs.enums import SourceFormat
from configs.schema import RunConfig
from configs.text import HoldoutConfig, SourceConfig
from data.pipeline import prepare

UDHR = "package:data/samples/udhr-europe.jsonl.zst"


@pytest.fixture(scope="session")
def smoke_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return compose(["experiment=smoke", f"cluster.scratch={tmp_path_factory.mktemp('scratch')}"])


@pytest.fixture(scope="session")
def corpus(smoke_config: RunConfig) -> Path:
    """The smoke corpus: 24 languages, 4096 entries."""
    return prepare(smoke_config)


@pytest.fixture
def make_config(smoke_config: RunConfig, corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config over one source of JSON lines, given as records or raw lines, with a ready tokenizer."""

    def make(lines: list[object] | None = None, **source: object) -> RunConfig:
        cfg = copy.deepcopy(smoke_config)
        cfg.cluster.scratch = str(tmp_path / "scratch")
        cfg.tokenizer.path = str(corpus / "tokenizer" / "tokenizer.model")
        path = tmp_path / "source.jsonl"
        if lines is not None:
            path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        settings = {"format": SourceFormat.jsonl, "path": str(path), "licence": "CC0-1.0", "origin": "here"} | source
        cfg.corpus.sources = {"small": SourceConfig(**settings)}  # type: ignore[arg-type]
        cfg.corpus.languages = []
        cfg.corpus.holdout = HoldoutConfig(share=0.3)
        cfg.tasks.workers = 1  # no processes to start, which takes longer than the work
        return cfg

    return make
