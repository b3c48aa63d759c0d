"""The next-token loss, without ever holding the logits of all positions.

A chunk of positions at a time: logits, log-likelihood, and at once the gradients, so that the logits are neither kept
nor computed again. That takes three matrix products, as the plain way does, and memory for one chunk. The gradients
wait for the backward pass, which scales them.

Shape suffixes: B sequences, T positions, P positions of all sequences, C positions of a chunk, D width of the residual
stream, V rows of the vocabulary, R some of them.
"""

from typing import Any

import torch
from torch import Tensor

from model.linear import product

IGNORED = -100  # label of a position that is not to be predicted
CHUNK_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits of a chunk by kind of device: 256 MiB in fp32, 512 positions with a vocabulary of 131,072; and 1 GiB. A chunk
reads and writes the gradient of the output matrix, 8 bytes for each number, and takes 6 operations a position for it:
with C positions, 4 F / (3 C B) of its time at F operations and B bytes a second. 2,048 make it a tenth on an A100."""
ROWS = 1 << 12  # of the output matrix's gradient that are added up at a time: they stay in the caches of a CPU


def next_token_labels(tokens_BT1: Tensor, doc_BT1: Tensor) -> Tensor:
    """Labels [B, T] for inputs `tokens[:, :-1]`: the next token, or `IGNORED` where a new document begins.

    What follows the end of a document is another document, which nothing before it can tell.
    """
    return tokens_BT1[:, 1:].masked_fill(doc_BT1[:, 1:] != doc_BT1[:, :-1], IGNORED)


def summed_cross_entropy(
    hidden_BTD: Tensor, output_weight_VD: Tensor, labels_BT: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What is to be differentiated, and negative log-likelihood in nats: sums over positions with a label, in fp32.

    They differ by `z_loss` times the square of the logarithm of the softmax's denominator (PaLM, section 5), which
    keeps logits from drifting. The second has no gradient.
    """
    found: tuple[Tensor, Tensor] = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_BTD.flatten(0, 1), output_weight_VD, labels_BT.flatten(), z_loss
    )
    return found


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, labels_P: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(2, device=hidden_PD.device)
        chunk = max(CHUNK_LOGITS[hidden_PD.device.type] // len(weight_VD), 1)
        grad_hidden_PD = torch.empty_like(hidden_PD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        parts = (torch.split(whole, chunk) for whole in (hidden_PD, labels_P, grad_hidden_PD))
        for hidden_CD, labels_C, grad_CD in zip(*parts, strict=True):
            sums += _chunk(hidden_CD, weight_VD, labels_C, z_loss, grad_CD, grad_weight_VD)
        ctx.gradients = grad_hidden_PD, grad_weight_VD.to(weight_VD.dtype)
        nats, squares = sums.unbind()
        ctx.mark_non_differentiable(nats)
        return nats + z_loss * squares, nats

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_hidden_PD, grad_weight_VD = ctx.gradients
        del ctx.gradients
        return grad_hidden_PD.mul_(slope), grad_weight_VD.mul_(slope), None, None


def _chunk(
    hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor, z_loss: float, grad_CD: Tensor, grad_weight_VD: Tensor
) -> Tensor:
    """Nats and squared logarithms of the denominators, [2]; fills one gradient and adds to the other."""
    counts_C1 = (labels_C != IGNORED)[:, None]
    label_C1 = labels_C.where(labels_C != IGNORED, 0)[:, None]
    logits_CV = product(hidden_CD, weight_VD).float()
    logit_C1, largest_C1 = logits_CV.gather(1, label_C1), logits_CV.amax(1, keepdim=True)
    slope_CV = torch.softmax(logits_CV, 1, out=logits_CV)  # of both sums by the logits, but for what follows
    # The largest probability is 1 / V at least: its logarithm is exact where that of the label's may not be.
    log_sum_C1 = (largest_C1 - slope_CV.amax(1, keepdim=True).log()) * counts_C1
    nats = (log_sum_C1 - logit_C1 * counts_C1).sum()
    if z_loss:
        slope_CV *= 1 + 2 * z_loss * log_sum_C1
    slope_CV.scatter_add_(1, label_C1, torch.full_like(logit_C1, -1.0))
    slope_CV = slope_CV.to(hidden_CD.dtype)
    torch.mul(product(slope_CV, weight_VD.T), counts_C1, out=grad_CD)
    counted_CD = hidden_CD * counts_C1
    for slope_CR, grad_RD in zip(torch.split(slope_CV, ROWS, 1), torch.split(grad_weight_VD, ROWS), strict=True):
        grad_RD += slope_CR.T @ counted_CD
    return torch.stack((nats, log_sum_C1.square().sum()))
