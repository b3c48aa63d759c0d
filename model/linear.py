"""Products with weights: on accelerators PyTorch's own, on a CPU in fp32 those of oneDNN.

PyTorch multiplies fp32 matrices with MKL, which leaves AMD's cores at four fifths of what they can do for the shapes
of a decoder; oneDNN goes by what a core can do, whoever made it (docs/performance.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias, as allocated: `init_weights` or a checkpoint fills it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """PyTorch's own values would be drawn and thrown away; on the meta device they import its compiler."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return product(x, self.weight)


def product(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, [..., K] to [..., N]; W may be a transposed view, which costs nothing."""
    if x.device.type != "cpu" or x.dtype is not torch.float32:
        return F.linear(x, weight_NK)
    found: Tensor = on_cpu(x, weight_NK)
    return found


# An operation of its own: PyTorch's compiler takes the one within for inference with constant weights alone.
@torch.library.custom_op("marathon::product", mutates_args=())
def on_cpu(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, None, "none", [], "")
    return found


@on_cpu.register_fake
def _(x: Tensor, weight_NK: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight_NK))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
    x, weight_NK = ctx.saved_tensors
    # The sum over positions is the one product for which MKL is the better.
    return on_cpu(slope, weight_NK.T), slope.flatten(0, -2).T @ x.flatten(0, -2)


on_cpu.register_autograd(_backward, setup_context=_keep)
