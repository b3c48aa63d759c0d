"""Initial weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.decoder import Decoder, RMSNorm


@contextlib.contextmanager
def left_empty() -> Iterator[None]:
    """Modules built inside keep their parameters as allocated, for those who fill them at once.

    PyTorch's own initial values would be drawn and thrown away; on the meta device they import its compiler.
    """
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    for kind in kept:
        kind.reset_parameters = lambda self: None  # type: ignore[method-assign, assignment, misc]
    try:
        yield
    finally:
        for kind, method in kept.items():
            kind.reset_parameters = method  # type: ignore[method-assign]


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int) -> None:
    """Fills every parameter, always alike for a seed.

    Normal with `init_std`, cut at three deviations; layers that write to the residual stream are divided by
    sqrt(2 n_layer), so that its variance does not grow with depth (GPT-2, section 2.3). A parameter that no
    rule names is an error: values left from allocation would train, silently and badly.
    """
    generator = torch.Generator().manual_seed(seed)
    std = decoder.cfg.init_std
    residual_std = std / math.sqrt(2 * decoder.cfg.n_layer)
    filled: set[int] = set()

    def fill(weight: Tensor, deviation: float) -> None:
        # Drawn in fp32 on the CPU, whatever the parameter is: the same model on every device and precision.
        values = torch.empty(weight.shape).normal_(0.0, deviation, generator=generator)
        weight.copy_(values.clamp_(-3 * deviation, 3 * deviation))
        filled.add(id(weight))

    for name, module in decoder.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
            filled.add(id(module.weight))
        elif isinstance(module, nn.Linear):
            fill(module.weight, residual_std if name.endswith(("o_proj", "down_proj")) else std)
        elif isinstance(module, nn.Embedding):
            fill(module.weight, std)
    if forgotten := [name for name, p in decoder.named_parameters() if id(p) not in filled]:
        raise AssertionError(f"no rule initialises {forgotten}")
