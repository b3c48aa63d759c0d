"""The optimizer and which parameters it decays."""

import torch
from torch import nn

from configs.schema import OptimConfig
from model.decoder import Decoder


def parameter_groups(decoder: Decoder, weight_decay: float) -> list[dict[str, object]]:
    """Matrices are decayed; norms and the input embedding are not. Every parameter is in exactly one group."""
    embedding = decoder.embedding.weight
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in decoder.parameters():
        (decayed if parameter.ndim >= 2 and parameter is not embedding else kept).append(parameter)
    assert len(decayed) + len(kept) == len(list(decoder.parameters()))
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def adamw(decoder: Decoder, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW of PyTorch in its fused form, which needs no extension compiled at run time."""
    return torch.optim.AdamW(
        parameter_groups(decoder, cfg.weight_decay),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )
