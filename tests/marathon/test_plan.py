"""The plan against what PyTorch really keeps."""

import pytest
import torch

from configs.compose import compose
from data.pipeline import prepare
from marathon.plan import activation_bytes_per_token, device_memory, mixture_text, plan_text
from model.decoder import Decoder
from tests.marathon.conftest import SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(tiny_model, dtype):
    """Distinct storages kept for the backward pass of the blocks, weights left out."""
    decoder = Decoder(tiny_model, 128).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = decoder.hidden(tokens)
    hidden.sum().backward()
    found = sum(kept.values()) / tokens.numel()
    planned = activation_bytes_per_token(tiny_model, dtype.itemsize)
    assert planned == pytest.approx(found, rel=0.2)


def test_sharding_takes_memory_off_a_device():
    def memory(**settings):
        return device_memory(
            compose(["experiment=eu24_1b", "cluster=lumi", *(f"{k}={v}" for k, v in settings.items())])
        )

    one, two = memory(engine="zero1"), memory(engine="zero2")
    assert two["gradients"] < one["gradients"]
    more = memory(**{"cluster.nodes": 4})
    assert more["optimizer"] == pytest.approx(one["optimizer"] / 4)
    assert more["weights"] == one["weights"]


def test_the_plan_names_what_does_not_fit():
    assert "WARNING" in plan_text(compose(["experiment=eu24_8b", "cluster=lumi", "train.max_micro_batch_seqs=8"]))
    told = plan_text(compose(["experiment=eu24_1b", "cluster=lumi", "cluster.nodes=16"]))
    assert "WARNING" not in told
    assert "47,683 steps x 2,097,152" in told
    assert "1,040,254,976" in told or "1,040," in told


def test_the_plan_shows_every_phase_of_the_mixture_once_there_is_a_corpus(tmp_path):
    phase = "mixture.phases=[{from_tokens: 16384, rule: weights, weights: {mt: 1}, max_epochs: 9}]"
    cfg = compose([*SMALL, f"cluster.scratch={tmp_path}", phase])
    assert mixture_text(cfg).startswith("mixture       is planned when there is a corpus")
    prepare(cfg)
    header, columns, *rows = mixture_text(cfg).splitlines()
    assert header == "mixture from 0 tokens on, by unimax" and columns.split()[:3] == ["part", "available", "share"]
    assert rows[3] == "mixture from 16,384 tokens on, by weights"
    tokens, epochs = zip(*((row.split()[3], row.split()[4]) for row in rows if row.startswith("mt/udhr")), strict=True)
    assert tokens == ("5,461", "16,384") and float(epochs[1]) == pytest.approx(4 * float(epochs[0]), abs=0.02)
