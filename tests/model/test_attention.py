"""Attention by document against attention under a mask, which says who sees whom in so many words."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import attend, document_ends

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) <= 24)


def under_a_mask(q_BTNH, k_BTKH, v_BTKH, doc_BT):
    mask = (doc_BT[:, :, None] == doc_BT[:, None, :]).tril()[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def heads(doc_BT, n_kv_head, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(*doc_BT.shape, n, 16) for n in (4, n_kv_head, n_kv_head)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=40)
@given(rows=st.lists(LENGTHS, min_size=1, max_size=3), n_kv_head=st.sampled_from([1, 2, 4]))
def test_values_and_gradients_are_those_under_a_mask(rows, n_kv_head):
    """Documents number on from sequence to sequence or begin anew: what stands in another sequence is another part."""
    documents = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    doc_BT = torch.stack([F.pad(doc, (0, 24 - len(doc)), value=99) for doc in documents]).int()
    found, expected = heads(doc_BT, n_kv_head), heads(doc_BT, n_kv_head)
    ours, theirs = attend(*found, document_ends(doc_BT)), under_a_mask(*expected, doc_BT)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.cos().sum().backward()
    theirs.cos().sum().backward()
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


def test_in_bf16():
    doc = torch.tensor([[0] * 7 + [1] * 9, [0] * 16])
    found = heads(doc, 2, torch.bfloat16)
    assert torch.allclose(attend(*found, document_ends(doc)), under_a_mask(*found, doc), atol=2e-2)


def test_ends_are_those_of_documents_and_sequences_and_few_in_shape():
    doc = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]])
    assert document_ends(doc).tolist() == [0, 2, 4, 7, 8] + [8] * 11
    assert {len(document_ends(torch.arange(n)[None])) for n in range(1, 100)} == {16, 32, 64, 128}


def test_the_operation_is_sound_for_compilers():
    doc = torch.tensor([[0] * 7 + [1] * 9])
    given = [x.detach().flatten(0, 1).requires_grad_() for x in heads(doc, 2)]
    torch.library.opcheck(torch.ops.marathon.one_by_one.default, (*given, document_ends(doc)))


def test_a_sequence_without_ends_is_one_document():
    doc = torch.zeros(2, 12, dtype=torch.int32)
    found = heads(doc, 2)
    assert torch.allclose(attend(*found), attend(*found, document_ends(doc)), atol=1e-6)


@pytest.mark.parametrize("n_documents", [1, 5])
def test_a_block_with_it_is_one_graph(tiny_model, n_documents):
    from model.decoder import Decoder, init_weights

    decoder = Decoder(tiny_model, 256)
    init_weights(decoder, 0)
    decoder.blocks[0].compile(fullgraph=True, dynamic=False)
    doc = (torch.arange(40) * n_documents // 40)[None]
    assert decoder.hidden(torch.zeros(1, 40, dtype=torch.long), doc).shape == (1, 40, tiny_model.d_model)
