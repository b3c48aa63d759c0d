import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.enums import Packing
from configs.errors import UserError
from data.loader import Samples
from data.manifest import Manifest
from data.order import CYCLE, Phase
from data.packing import build_packing, open_packing, pack, packing_path, record_packing
from model.loss import IGNORED, next_token_labels
from tests.data.corpora import EOS, PAD, Ids, write_corpus, write_shard

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=120)


def pieces_of(lengths: list[int], seq_len: int) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(lengths)
    pieces = pack(ends - lengths, int(ends[-1]), seq_len)
    assert np.array_equal(pieces, np.array(sorted(pieces.tolist()))), "sorted"
    n_sequences = int(pieces[-1, 0]) + 1
    assert sorted(set(pieces[:, 0].tolist())) == list(range(n_sequences)), "no sequence is empty"
    return [[(a, b) for sequence, a, b in pieces.tolist() if sequence == i] for i in range(n_sequences)]


@given(LENGTHS, st.integers(2, 40))
def test_every_token_but_the_first_of_a_document_is_a_target_once(lengths: list[int], seq_len: int) -> None:
    sequences = pieces_of(lengths, seq_len)
    assert all(sum(b - a for a, b in sequence) <= seq_len + 1 for sequence in sequences)
    targets = [place for sequence in sequences for a, b in sequence for place in range(a + 1, b)]
    starts = (np.cumsum(lengths) - lengths).tolist()
    assert sorted(targets) == sorted(set(range(sum(lengths))) - set(starts))
    whole = [(start, start + n) for start, n in zip(starts, lengths, strict=True) if n <= seq_len + 1]
    assert set(whole) <= {piece for sequence in sequences for piece in sequence}, "what fits is not cut"


@given(LENGTHS, st.integers(2, 40))
def test_packing_is_that_of_best_fit_item_by_item(lengths: list[int], seq_len: int) -> None:
    """As many sequences, filled alike, as the textbook's loop makes."""
    rests = []
    for n in lengths:
        while n > seq_len + 1:
            n -= seq_len
        rests.append(n)
    spaces: list[int] = []
    for n in sorted(rests, reverse=True):
        fitting = [space for space in spaces if space >= n]
        best = min(fitting) if fitting else seq_len + 1
        if fitting:
            spaces.remove(best)
        spaces.append(best - n)
    n_full = sum(-(-(n - 1) // seq_len) - 1 for n in lengths if n > seq_len + 1)
    found = [seq_len + 1 - sum(b - a for a, b in sequence) for sequence in pieces_of(lengths, seq_len)]
    assert sorted(found) == sorted(spaces + [0] * n_full)


def test_long_documents_and_short_ones_by_hand() -> None:
    # T = 4. The first has 11 tokens: 0-4, 4-8, and 8-10 as the rest, 3 tokens, with room for 2.
    assert pieces_of([11, 3, 2], 4) == [[(0, 5)], [(4, 9)], [(8, 11)], [(11, 14), (14, 16)]]
    assert pieces_of([5, 6], 4) == [[(5, 10)], [(0, 5)], [(9, 11)]], "5 tokens fit in T + 1, 6 do not"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)

    def documents(n: int) -> Ids:
        return [rng.integers(4, 1_000, size).tolist() for size in rng.integers(0, 40, n)]

    parts = {("de", "web"): [documents(50), documents(7)], ("fr", "web"): [documents(20)], ("mt", "web"): [[[7]]]}
    return write_corpus(tmp_path / "corpus", parts)


SEQ_LEN = 16
PHASES = [Phase(0, {"de/web": CYCLE // 2, "fr/web": CYCLE // 4, "mt/web": CYCLE // 4})]


def pack_corpus(corpus: Path, seq_len: int = SEQ_LEN) -> list[Path]:
    paths = [build_packing(corpus / entry.stem, seq_len) for entry in Manifest.load(corpus).shards]
    record_packing(corpus, seq_len)
    return paths


def test_samples_hold_whole_documents_and_padding_that_is_never_predicted(corpus: Path) -> None:
    pack_corpus(corpus)
    samples = Samples(corpus, PHASES, SEQ_LEN, 1, Packing.best_fit)
    batch = samples.__getitems__(range(400))
    tokens, doc = batch["tokens"], batch["doc"]
    labels = next_token_labels(tokens, doc)
    is_pad = tokens == PAD
    assert is_pad.any() and (labels != PAD).all()
    assert ((labels == IGNORED) == (is_pad[:, 1:] | (tokens[:, :-1] == EOS))).all(), "all else is predicted"
    assert (torch.diff(doc, dim=1)[is_pad[:, 1:]] == 1).all(), "each token of padding stands alone"
    distinct = {tuple(row[row != PAD].tolist()) for row in tokens}
    assert len(distinct) == sum(count for count, _ in json.loads((corpus / f"fit-{SEQ_LEN}.json").read_text()).values())


def test_documents_of_packed_samples_are_named(corpus: Path) -> None:
    pack_corpus(corpus)
    samples = Samples(corpus, PHASES, SEQ_LEN, 1, Packing.best_fit)
    for position in range(40):
        batch = samples[position]
        n_documents = len(set(batch["doc"][batch["tokens"] != PAD].tolist()))
        found = samples.documents([position])
        assert len(found) == n_documents, "its pieces, each of another document"
        assert {f"{name.language}/{name.source}" for name in found} == {samples.parts[int(batch["part"][0])]}
    assert len(samples.documents(range(400))) == 50 + 7 + 20 + 1


def test_a_packed_sample_is_another_than_a_concatenated_one(corpus: Path) -> None:
    pack_corpus(corpus)
    packed, plain = (Samples(corpus, PHASES, SEQ_LEN, 1, packing)[0] for packing in (Packing.best_fit, Packing.concat))
    assert packed["part"] == plain["part"] and packed["sample_id"] != plain["sample_id"]


def test_an_index_is_the_same_whenever_it_is_made_and_another_for_another_shard(corpus: Path) -> None:
    paths = pack_corpus(corpus)
    before = [path.read_bytes() for path in paths]
    assert pack_corpus(corpus) == paths and [path.read_bytes() for path in paths] == before
    assert not [name for name in os.listdir(corpus / "shards") if name.startswith(".")], "nothing else is left"
    stem = corpus / Manifest.load(corpus).shards[0].stem
    write_shard(stem, [[5] * 9, [6]])
    other = build_packing(stem, SEQ_LEN)
    assert other not in paths and other.name.startswith(f"{stem.name}.fit-{SEQ_LEN}-")


def test_a_corpus_that_is_not_packed_for_this_length_is_refused(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"fit-16-.* has not been made\n.*best_fit.*\n.*marathon data"):
        Samples(corpus, PHASES, SEQ_LEN, 1, Packing.best_fit)
    pack_corpus(corpus)
    Samples(corpus, PHASES, SEQ_LEN, 1, Packing.best_fit)
    with pytest.raises(UserError, match=r"fit-17-.* has not been made"):
        Samples(corpus, PHASES, 17, 1, Packing.best_fit)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_index_is_told(corpus: Path, damage: str) -> None:
    path = pack_corpus(corpus)[0]
    content = bytearray(path.read_bytes())
    crc = zlib.crc32(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "cut":
        del content[-10:]
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=path.name):
        open_packing(str(path), crc)


def test_an_index_has_its_place_by_shard_length_and_content() -> None:
    assert packing_path("shards/a.00000", 64, "0123456789abcdef" * 4) == "shards/a.00000.fit-64-0123456789abcdef"
