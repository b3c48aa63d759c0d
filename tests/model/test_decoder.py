"""The decoder against transformers' Qwen3 and against itself."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from configs.compose import compose
from configs.enums import Recompute
from configs.rules import GROUPS
from model.decoder import Decoder, count_parameters, flops_per_token, init_weights, padded_rows
from model.hf import to_their_config, to_their_name, to_transformers

ROWS = 256


def make_decoder(cfg, seed=0):
    decoder = Decoder(cfg, ROWS)
    init_weights(decoder, seed)
    # Norm weights of one would hide a norm that is left out or misplaced.
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return decoder.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_logits_equal_transformers(tiny_model, tied, n_kv_head):
    decoder = make_decoder(replace(tiny_model, tie_embeddings=tied, n_kv_head=n_kv_head))
    theirs = to_transformers(decoder, seq_len=128)
    tokens = torch.randint(ROWS, (3, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (decoder(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_their_weights_load_into_ours(tiny_model, tied):
    cfg = replace(tiny_model, tie_embeddings=tied)
    decoder = Decoder(cfg, ROWS).eval()
    theirs = Qwen3ForCausalLM(Qwen3Config(**to_their_config(decoder, seq_len=64))).eval()
    state = theirs.state_dict()
    decoder.load_state_dict({name: state[to_their_name(name)] for name in decoder.state_dict()})
    tokens = torch.randint(ROWS, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (decoder(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def test_greedy_generation_equals_transformers(tiny_model):
    decoder = make_decoder(tiny_model)
    theirs = to_transformers(decoder, seq_len=128)
    theirs.generation_config.eos_token_id = None
    prompt = torch.randint(ROWS, (7,), generator=torch.Generator().manual_seed(3))
    expected = theirs.generate(
        prompt[None], attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=64, do_sample=False
    )
    assert decoder.generate_greedily(prompt, 64).tolist() == expected[0].tolist()


def test_documents_in_one_sequence_do_not_see_each_other(tiny_model):
    decoder = make_decoder(tiny_model)
    tokens = torch.randint(ROWS, (1, 30), generator=torch.Generator().manual_seed(4))
    doc = torch.tensor([[0] * 11 + [1] * 13 + [2] * 6])
    with torch.no_grad():
        packed = decoder(tokens, doc)[0]
        for start, end in ((0, 11), (11, 24), (24, 30)):
            assert torch.allclose(packed[start:end], decoder(tokens[:, start:end])[0], atol=1e-5)


def test_one_document_needs_no_mask(tiny_model):
    decoder = make_decoder(tiny_model)
    tokens = torch.randint(ROWS, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.allclose(decoder(tokens), decoder(tokens, torch.zeros(2, 20, dtype=torch.int32)), atol=1e-5)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_computed_again_changes_memory_and_nothing_else(tiny_model, is_compiled):
    tokens = torch.randint(ROWS, (2, 64), generator=torch.Generator().manual_seed(6))
    doc = (torch.arange(64) >= 20).int().expand(2, 64)
    gradients, kept = {}, {}

    def keep(tensor):
        kept[recompute][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for recompute in (Recompute.none, Recompute.selective, Recompute.full):
        decoder = Decoder(tiny_model, ROWS, recompute)
        init_weights(decoder, 0)
        if is_compiled:
            for block in decoder.blocks:
                block.compile(dynamic=False)
        kept[recompute] = {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = decoder.hidden(tokens, doc)
        hidden.square().sum().backward()
        gradients[recompute] = [parameter.grad for parameter in decoder.parameters()]
    for found in gradients.values():
        for ours, expected in zip(found, gradients[Recompute.none], strict=True):
            assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
    none, selective, full = (sum(of_one.values()) for of_one in kept.values())
    assert full < selective < none if is_compiled else full < none  # eager keeps results where no hook sees them


def test_initial_weights_depend_on_the_seed_alone(tiny_model):
    first, second, other = (make_decoder(tiny_model, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("name", sorted(p.stem for p in (GROUPS / "model").glob("*.yaml")))
def test_sizes_on_the_meta_device(name):
    """Counts by formula equal the parameters of the built network, and what the YAML's first line says."""
    cfg = compose(["experiment=smoke", f"model={name}"]).model
    rows = 4096 if name == "smoke" else 131_072
    with torch.device("meta"):
        decoder = Decoder(cfg, rows)
        logits = decoder(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, rows)
    counted = sum(p.numel() for p in decoder.parameters())
    assert count_parameters(cfg, rows) == counted
    said = (GROUPS / "model" / f"{name}.yaml").read_text().split()[1]
    number, unit = float(said[:-1]), {"M": 1e6, "B": 1e9}[said[-1]]
    digits = len(said[:-1].replace(".", ""))
    assert float(f"{counted / unit:.{digits}g}") == number


def test_flops_are_those_of_the_matrix_products(tiny_model):
    """Counted by PyTorch on the plain products; it counts attention in full, ours the causal half."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    decoder, seq_len = make_decoder(tiny_model).train(), 32
    ours = {torch.ops.marathon.product: lambda x, weight, out_shape: 2 * math.prod(x) * weight[0]}
    counting = FlopCounterMode(display=False, custom_mapping=ours)
    with counting as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.zeros(1, seq_len, dtype=torch.long)).sum().backward()
    half_attention = 6 * tiny_model.n_layer * tiny_model.n_head * tiny_model.head_dim * seq_len
    assert counter.get_total_flops() / seq_len == flops_per_token(tiny_model, ROWS, seq_len) + half_attention


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 128), (128, 128), (129, 256), (131_072, 131_072)])
def test_rows_are_padded(vocab_size, rows):
    assert padded_rows(vocab_size) == rows
