import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ModelConfig
from eval.validation import DocumentScore, bits_per_byte, mean_bpb, score_documents
from model.decoder import Decoder, init_weights


@pytest.fixture
def decoder(tiny_model: ModelConfig) -> Decoder:
    decoder = Decoder(tiny_model, 384).eval()
    init_weights(decoder, seed=3)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # an untrained model predicts all tokens alike, whatever the context
    return decoder


def document_of(*tokens: int) -> SimpleNamespace:
    return SimpleNamespace(id="one", lang="de", tokens=np.array(tokens), n_bytes=1)


def naive_nats(decoder: Decoder, tokens: np.ndarray, seq_len: int) -> float:
    """Token by token in float64; a token sees the first window it fits into, counted from its own place."""
    exact, text, stride = copy.deepcopy(decoder).double(), torch.from_numpy(tokens[:-1].astype(np.int64)), seq_len // 2
    nats = 0.0
    for i in range(1, len(text)):
        start = 0 if i <= seq_len else math.ceil((i - seq_len) / stride) * stride
        assert i <= seq_len or seq_len / 2 <= i - start <= seq_len
        logits = exact(text[None, start:i])[0, -1]
        nats -= float(torch.log_softmax(logits, -1)[text[i]])
    return nats


def score(decoder, documents, seq_len=32, batch_seqs=4, **ranks):
    found = score_documents(decoder, documents, seq_len=seq_len, batch_seqs=batch_seqs, device="cpu", **ranks)
    return {entry.id: entry for entry in found}


@pytest.mark.parametrize("seq_len", [16, 17, 4096])
@torch.no_grad()
def test_nats_are_those_of_a_loop_over_tokens(decoder, documents, seq_len):
    few = [document for document in documents if document.id in ("de-0", "de-2", "el-3")]
    assert any(len(document.tokens) > 4 * 16 for document in few)
    found = score(decoder, few, seq_len)
    for document in few:
        assert found[document.id].nll_nats == pytest.approx(naive_nats(decoder, document.tokens, seq_len), rel=1e-6)


def test_bos_and_eos_are_not_scored(decoder, documents):
    document = documents[0]
    other_eos = SimpleNamespace(**{**vars(document), "tokens": np.append(document.tokens[:-1], 7)})
    (found,), (other,) = score(decoder, [document]).values(), score(decoder, [other_eos]).values()
    assert found == other
    assert found.n_tokens == len(document.tokens) - 2
    assert found.n_bytes == document.n_bytes


@torch.no_grad()
def test_first_token_is_predicted_from_bos(decoder):
    (found,) = score(decoder, [document_of(1, 77, 2)]).values()
    assert found.nll_nats == pytest.approx(-float(torch.log_softmax(decoder(torch.tensor([[1]])), -1)[0, 0, 77]))


def test_text_of_no_tokens_costs_nothing(decoder):
    (found,) = score(decoder, [document_of(1, 2)]).values()
    assert (found.nll_nats, found.n_tokens) == (0.0, 0)


@pytest.mark.parametrize("batch_seqs", [1, 3, 50])
def test_batches_do_not_matter(decoder, documents, batch_seqs):
    alone, together = score(decoder, documents, batch_seqs=7), score(decoder, documents, batch_seqs=batch_seqs)
    for name, entry in alone.items():
        assert together[name].nll_nats == pytest.approx(entry.nll_nats, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_ranks_share_the_documents(decoder, documents, world_size):
    whole = score(decoder, documents)
    shares = [score(decoder, documents, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(map(len, shares)) == len(documents)
    together = {name: entry for share in shares for name, entry in share.items()}
    assert together.keys() == whole.keys()
    for name, entry in whole.items():
        assert together[name].nll_nats == pytest.approx(entry.nll_nats, rel=1e-5)
    work = [sum(entry.n_tokens for entry in share.values()) for share in shares]
    if world_size < 4:
        assert max(work) - min(work) <= max(len(document.tokens) for document in documents)


def test_bpb_is_a_ratio_of_sums(decoder, documents):
    scores = list(score(decoder, documents).values())
    by_lang = bits_per_byte(reversed(scores), bootstrap_samples=100)
    assert list(by_lang) == ["de", "el", "pl"]
    for lang, entry in by_lang.items():
        of_lang = [s for s in scores if s.lang == lang]
        expected = sum(s.nll_nats for s in of_lang) / math.log(2) / sum(s.n_bytes for s in of_lang)
        assert entry.bpb == pytest.approx(expected, rel=1e-12)
        assert (entry.documents, entry.tokens) == (4, sum(s.n_tokens for s in of_lang))
        assert entry.bytes == sum(s.n_bytes for s in of_lang)
    assert mean_bpb(by_lang) == pytest.approx(sum(entry.bpb for entry in by_lang.values()) / 3)
    assert by_lang == bits_per_byte(scores, bootstrap_samples=100)


def test_one_bit_for_each_byte_is_one():
    scores = [DocumentScore(str(i), "de", n * math.log(2), n, n) for i, n in enumerate((1, 10, 100))]
    entry = bits_per_byte(scores, bootstrap_samples=50)["de"]
    assert (entry.bpb, entry.low, entry.high) == pytest.approx((1, 1, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 10_000)), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_lies_between_the_best_and_the_worst_document(documents, seed):
    scores = [DocumentScore(f"{i:03}", "de", nats, 1, n_bytes) for i, (nats, n_bytes) in enumerate(documents)]
    entry = bits_per_byte(scores, bootstrap_samples=200, seed=seed)["de"]
    ratios = [s.nll_nats / s.n_bytes / math.log(2) for s in scores]
    assert min(ratios) * (1 - 1e-9) <= entry.low <= entry.high <= max(ratios) * (1 + 1e-9)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    n_bytes = rng.integers(100, 2000, size=(300, 60))
    bits = rng.normal(1.0, 0.2, size=n_bytes.shape) * n_bytes
    covered, widths = 0, []
    for bits_of, bytes_of in zip(bits, n_bytes, strict=True):
        scores = [
            DocumentScore(f"{i:03}", "de", b * math.log(2), 1, int(n))
            for i, (b, n) in enumerate(zip(bits_of, bytes_of, strict=True))
        ]
        entry = bits_per_byte(scores, bootstrap_samples=200)["de"]
        covered += entry.low <= 1.0 <= entry.high
        widths.append(entry.high - entry.low)
    assert 0.90 <= covered / 300 <= 0.98
    quarter = bits_per_byte(scores[:15], bootstrap_samples=200)["de"]
    assert quarter.high - quarter.low > 1.3 * np.mean(widths)
