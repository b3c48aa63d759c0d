"""Cross-entropy over the vocabulary."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that is not to be predicted."""


def next_token_labels(tokens_BT1: Tensor, doc_BT1: Tensor) -> Tensor:
    """Labels [B, T] for inputs `tokens[:, :-1]`: the next token, or `IGNORED` where a new document begins.

    What follows the end of a document is another document, which nothing before it can tell.
    """
    same_document_BT = doc_BT1[:, 1:] == doc_BT1[:, :-1]
    return tokens_BT1[:, 1:].masked_fill(~same_document_BT, IGNORED)


def summed_cross_entropy(hidden_BTD: Tensor, output_weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over the positions that have a label; a scalar in fp32."""
    logits_PV = F.linear(hidden_BTD.flatten(0, 1), output_weight_VD).float()
    return F.cross_entropy(logits_PV, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
