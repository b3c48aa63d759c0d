"""Causal attention that stays inside documents, by the kernel that each device has for it.

Shape suffixes: B sequences, T positions, P = B T positions of all sequences, N query heads, K key/value heads, H width of
a head, S documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def document_ends(doc_BT: Tensor) -> Tensor:
    """int32[S + 1]: 0, then where each document, or the part of it that stands in a sequence, ends among P positions.

    The last end is repeated up to a power of two: compiled code is made for a shape, and these are few.
    """
    is_last = torch.ones_like(doc_BT, dtype=torch.bool)
    is_last[:, :-1] = doc_BT[:, 1:] != doc_BT[:, :-1]
    ends = F.pad(is_last.flatten().nonzero().flatten() + 1, (1, 0))
    n = max(16, 1 << (len(ends) - 1).bit_length())
    return F.pad(ends, (0, n - len(ends)), value=doc_BT.numel()).int()


def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, ends: Tensor | None = None) -> Tensor:
    """Each position looks at those before it in its document, [B, T, N, H]; without `ends` a sequence is one.

    On NVIDIA and AMD it is FlashAttention with documents of any length; on a CPU, PyTorch's own, document by document.
    Neither computes what a mask would throw away.
    """
    if ends is None:
        return _attend_sequences(q_BTNH, k_BTKH, v_BTKH)
    q_PNH, k_PKH, v_PKH = q_BTNH.flatten(0, 1), k_BTKH.flatten(0, 1), v_BTKH.flatten(0, 1)
    if q_PNH.device.type == "cpu":
        return _attend_one_by_one(q_PNH, k_PKH, v_PKH, ends).view(q_BTNH.shape)
    longest = q_BTNH.shape[1]
    out = varlen_attn(
        q_PNH, k_PKH, v_PKH, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=q_PNH.shape[1] > k_PKH.shape[1]
    )
    assert isinstance(out, Tensor)
    return out.view(q_BTNH.shape)


def _attend_sequences(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@torch.compiler.disable  # its loop depends on data; a compiled block goes on after it
def _attend_one_by_one(q_PNH: Tensor, k_PKH: Tensor, v_PKH: Tensor, ends: Tensor) -> Tensor:
    lengths = [n for n in ends.diff().tolist() if n]
    parts = zip(*(x.split(lengths) for x in (q_PNH, k_PKH, v_PKH)), strict=True)
    return torch.cat([_attend_sequences(q[None], k[None], v[None])[0] for q, k, v in parts])
