"""Causal attention that stays inside documents, by the kernel that each device has for it.

Shape suffixes: B sequences, T positions, P = B T positions of all sequences, N query heads, K key/value heads, H width
of a head, S documents.
"""

from itertools import pairwise
from typing import Any, cast

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
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=True).transpose(1, 2)
    q_PNH, k_PKH, v_PKH = q_BTNH.flatten(0, 1), k_BTKH.flatten(0, 1), v_BTKH.flatten(0, 1)
    if q_PNH.device.type == "cpu":
        out: Tensor = one_by_one(q_PNH, k_PKH, v_PKH, ends)[0]
    else:
        longest, has_groups = q_BTNH.shape[1], q_PNH.shape[1] > k_PKH.shape[1]
        found = varlen_attn(
            q_PNH, k_PKH, v_PKH, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=has_groups
        )
        out = cast(Tensor, found)
    return out.view(q_BTNH.shape)


# Operations of their own, whose loops depend on data: a compiled block is one graph with them in it.
@torch.library.custom_op("marathon::one_by_one", mutates_args=())
def one_by_one(q_PNH: Tensor, k_PKH: Tensor, v_PKH: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of each document, [P, N, H], and the logarithms of its denominators, [P, N]."""
    out_PNH, log_sum_PN = torch.empty_like(q_PNH), q_PNH.new_empty(q_PNH.shape[:2], dtype=torch.float32)
    for span in _spans(ends):
        q, k, v = (_sequence(x[span]) for x in (q_PNH, k_PKH, v_PKH))
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        out_PNH[span], log_sum_PN[span] = out[0].transpose(0, 1), log_sum[0].transpose(0, 1)
    return out_PNH, log_sum_PN


@torch.library.custom_op("marathon::one_by_one_backward", mutates_args=())
def one_by_one_backward(
    slope: Tensor, q_PNH: Tensor, k_PKH: Tensor, v_PKH: Tensor, out_PNH: Tensor, log_sum_PN: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, keys and values, from that by the output."""
    slopes = torch.empty_like(q_PNH), torch.empty_like(k_PKH), torch.empty_like(v_PKH)
    for span in _spans(ends):
        given = (_sequence(x[span]) for x in (slope, q_PNH, k_PKH, v_PKH, out_PNH))
        log_sum = log_sum_PN[span].T[None]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, log_sum, 0.0, True)
        for whole, part in zip(slopes, found, strict=True):
            whole[span] = part[0].transpose(0, 1)
    return slopes


@one_by_one.register_fake
def _(q_PNH: Tensor, k_PKH: Tensor, v_PKH: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_PNH), q_PNH.new_empty(q_PNH.shape[:2], dtype=torch.float32)


@one_by_one_backward.register_fake
def _(slope: Tensor, q_PNH: Tensor, k_PKH: Tensor, v_PKH: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_PNH), torch.empty_like(k_PKH), torch.empty_like(v_PKH)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ends = inputs
    ctx.save_for_backward(*qkv, *output, ends)


def _backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *one_by_one_backward(slope.contiguous(), *ctx.saved_tensors), None


one_by_one.register_autograd(_backward, setup_context=_keep)


def _spans(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(ends.tolist()) if start < end]


def _sequence(x_TNH: Tensor) -> Tensor:
    return x_TNH.transpose(0, 1)[None]
