"""The loss by chunks against PyTorch's own on all logits at once."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import loss
from model.decoder import Decoder, init_weights
from model.loss import IGNORED, next_token_labels, summed_cross_entropy

ROWS = 97


def at_once(hidden, weight, labels, z_loss):
    logits, labels = F.linear(hidden.flatten(0, 1), weight).float(), labels.flatten()
    nats = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return nats + z_loss * (logits.logsumexp(1).square() * (labels != IGNORED)).sum(), nats


def drawn(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(3, 40, 16, generator=generator), torch.randn(ROWS, 16, generator=generator)
    labels = torch.randint(ROWS, (3, 40), generator=generator)
    labels[0, 5] = labels[2, 39] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("chunk_positions", [1, 7, 120, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_all_logits(monkeypatch, chunk_positions, z_loss, dtype, tolerance):
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", ROWS * chunk_positions)
    monkeypatch.setattr(loss, "ROWS", 48)
    *found, labels = drawn(dtype)
    *expected, _ = drawn(dtype)
    ours, theirs = summed_cross_entropy(*found, labels, z_loss), at_once(*expected, labels, z_loss)
    for one, other in zip(ours, theirs, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=tolerance)
    (0.3 * ours[0]).backward()
    (0.3 * theirs[0]).backward()
    for one, other in zip(found, expected, strict=True):
        assert (one.grad - other.grad).abs().max() <= tolerance * other.grad.abs().max()


def test_nothing_to_predict_has_no_loss_and_no_gradient():
    hidden, weight, labels = drawn(torch.float32)
    objective, nats = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    objective.backward()
    assert nats.item() == objective.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_likely_token_costs_next_to_nothing_and_an_impossible_one_is_finite():
    weight = torch.tensor([[1.0], [-1.0]]) * 1e4
    hidden, labels = torch.ones(1, 2, 1), torch.tensor([[0, 1]])
    objective, nats = summed_cross_entropy(hidden, weight, labels)
    assert float(nats) == pytest.approx(2e4)
    assert torch.isfinite(objective)


def test_the_first_token_of_a_document_is_not_predicted(tiny_model):
    tokens, doc = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    labels = next_token_labels(tokens, doc)
    assert labels.tolist() == [[6, IGNORED, 8]]
    decoder = Decoder(tiny_model, 256)
    init_weights(decoder, 0)
    hidden = decoder.hidden(tokens[:, :-1], doc[:, :-1])
    log_p = decoder(tokens[:, :-1], doc[:, :-1]).log_softmax(-1)[0]
    expected = -(log_p[0, 6] + log_p[2, 8])
    assert torch.allclose(summed_cross_entropy(hidden, decoder.output_weight, labels)[1], expected, atol=1e-4)


def peak_bytes(dtype, n_positions, vocabulary, width):
    """What the loss and its gradients take at the most, as the system counts it: resident memory of this process."""
    for positions, rows in ((8, 64), (n_positions, vocabulary)):  # the first loads libraries
        hidden = torch.randn(1, positions, width).to(dtype).requires_grad_()
        weight = (0.02 * torch.randn(rows, width)).to(dtype).requires_grad_()
        labels = torch.randint(rows, (1, positions))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident_bytes("VmRSS")
        summed_cross_entropy(hidden, weight, labels)[0].backward()
    return resident_bytes("VmHWM") - before


def resident_bytes(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_takes_memory_for_a_chunk_and_the_gradients(dtype):
    positions, vocabulary, width = 4096, 262_144, 64
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        found = fresh.submit(peak_bytes, dtype, positions, vocabulary, width).result()
    # Logits of a chunk in fp32, in bf16 also as a factor of the next products; gradients of matrix and hidden states.
    chunk = loss.CHUNK_LOGITS["cpu"] * (4 if dtype is torch.float32 else 4 + 2)
    needed = chunk + 4 * vocabulary * width + dtype.itemsize * positions * width
    assert 0.8 * needed < found < 1.2 * needed
    assert found < 4 * positions * vocabulary / 8
