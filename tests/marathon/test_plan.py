"""The plan against what PyTorch really keeps."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.compose import compose
from configs.enums import Recompute
from data.pipeline import prepare
from marathon.plan import activation_bytes_per_token, device_memory, mixture_text, plan_text
from model import loss
from model.decoder import KEPT, Decoder, init_weights, padded_rows
from tests.marathon.conftest import SMALL
from train.schedule import step_shape


class Held(TorchDispatchMode):
    """Bytes of all tensors that exist, but for those that were there before; `most` is their largest sum."""

    def __init__(self, before):
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        found = operation(*arguments, **(named or {}))
        for tensor in tree_leaves(found):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.before:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.most = max(self.most, sum(n_bytes for _, n_bytes in self.storages.values()))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [Recompute.none, *KEPT])
def test_activations_are_what_pytorch_holds(tiny_model, dtype, recompute):
    """At the most, over forward and backward pass: six blocks, of which one may be there whole."""
    tiny_model.n_layer = 6
    decoder = Decoder(tiny_model, 128, recompute).to(dtype)
    init_weights(decoder, 1)
    tokens = torch.zeros(8, 256, dtype=torch.long)
    with Held(decoder.parameters()) as held:
        hidden = decoder.hidden(tokens, torch.zeros_like(tokens))
        hidden.backward(torch.ones_like(hidden))
    planned = activation_bytes_per_token(tiny_model, dtype.itemsize, recompute)
    assert planned == pytest.approx(held.most / tokens.numel(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_takes_what_is_planned_for_it(monkeypatch, tiny_model, dtype):
    rows = padded_rows(4096)
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 16 * rows)
    cfg = compose(["experiment=smoke", f"engine.precision={'fp32' if dtype.itemsize == 4 else 'bf16'}"])
    n_tokens = cfg.train.seq_len * step_shape(cfg).micro_batch_seqs
    hidden = torch.randn(1, n_tokens, cfg.model.d_model).to(dtype).requires_grad_()
    weight = torch.randn(rows, cfg.model.d_model).to(dtype).requires_grad_()
    labels = torch.ones(1, n_tokens, dtype=torch.long)
    with Held([hidden, weight, labels]) as held:
        loss.summed_cross_entropy(hidden, weight, labels)
    assert device_memory(cfg)["loss"] == pytest.approx(held.most, rel=0.1)


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
