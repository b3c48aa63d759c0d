import dataclasses
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.text import HoldoutConfig
from data.heldout import split_of, valid_documents
from data.manifest import VALID, Manifest
from data.sources import Document
from data.tokenizer import Encoder


def document(doc_id: str, **fields: object) -> Document:
    return Document(doc_id, "de", "text", "source", "place", dict(fields))


def test_a_field_decides_where_one_is_named() -> None:
    holdout = HoldoutConfig(by_field="article", by_values=[4, 9], share=1.0)
    splits = [split_of(document("x", **f), holdout) for f in ({"article": 4}, {"article": "9"}, {"article": 5}, {})]
    assert splits == ["valid", "valid", "train", "train"]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_documents(doc_id: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    if split_of(document(doc_id), HoldoutConfig(share=low)) == "valid":
        assert split_of(document(doc_id), HoldoutConfig(share=high)) == "valid"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_share_is_about_that_share(share: float) -> None:
    held_out = sum(split_of(document(f"doc/{i}"), HoldoutConfig(share=share)) == "valid" for i in range(10_000))
    assert abs(held_out - share * 10_000) <= 5 * (10_000 * share * (1 - share)) ** 0.5


def test_held_out_documents_come_back_whole(corpus: Path) -> None:
    valid, encoder = valid_documents(corpus), Encoder(corpus / "tokenizer")
    assert [*dict.fromkeys(d.lang for d in valid)] == Manifest.load(corpus).languages(VALID)
    documents = [d for d in valid if d.lang == "el"]
    assert sorted(d.id for d in documents) == sorted(f"udhr/el/{article}" for article in (4, 9, 13, 18, 22, 26))
    for found in documents:
        ids = found.tokens.tolist()
        assert (ids[0], ids[-1], found.lang, found.source) == (1, 2, "el", "udhr")
        assert len(encoder.decode(ids[1:-1]).encode()) == found.n_bytes
    assert len(valid) == 24 * 6


def test_no_more_than_the_config_allows_and_always_the_same(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, manifest = valid_documents(corpus), Manifest.load(corpus)
    assert manifest.max_valid_docs_per_language == 1000
    limited = dataclasses.replace(manifest, max_valid_docs_per_language=2)
    monkeypatch.setattr(Manifest, "load", lambda folder: limited)
    expected = [d.id for _, of_one in groupby(whole, key=attrgetter("lang")) for d in islice(of_one, 2)]
    assert [d.id for d in valid_documents(corpus)] == expected and len(expected) == 24 * 2
