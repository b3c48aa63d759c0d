"""Sequences shared out over neighbouring devices (Jacobs et al. 2023, DeepSpeed Ulysses).

Everything but attention works position by position, so each device of a group takes an equal stretch of every sequence.
For attention the group exchanges: each device gets all positions of some heads, and afterwards its stretch of all heads
again. Two exchanges of a stretch's size a layer, whatever the length.

Shape suffixes: B sequences, T positions of a stretch, of S in a group, N heads, M = N / S heads of a device, H width of
a head.
"""

import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from model.attention import attend


class Ulysses:
    """Attention over whole sequences, of which this device holds a stretch; for `Attention.attend`."""

    def __init__(self, group_size: int) -> None:
        self.size = group_size
        self.group, _ = torch_dist.new_subgroups(group_size)  # type: ignore[no-untyped-call] # neighbours

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, ends: Tensor | None) -> Tensor:
        """[B, T, N, H]; without `ends` of documents, which is how texts are scored, each device has whole ones."""
        if ends is None:
            return attend(q_BTNH, k_BTKH, v_BTKH)
        return self._stretch(attend(self._whole(q_BTNH), self._whole(k_BTKH), self._whole(v_BTKH), ends))

    def _whole(self, x_BTNH: Tensor) -> Tensor:
        """[B, T, N, H] to [B, S T, M, H]."""
        x_BTSMH = x_BTNH.view(*x_BTNH.shape[:2], self.size, -1, x_BTNH.shape[3])
        return self._exchange(x_BTSMH.movedim(2, 0)).movedim(0, 1).flatten(1, 2)

    def _stretch(self, x_BTMH: Tensor) -> Tensor:
        """[B, S T, M, H] to [B, T, N, H]."""
        x_BSTMH = x_BTMH.view(len(x_BTMH), self.size, -1, *x_BTMH.shape[2:])
        return self._exchange(x_BSTMH.movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    def _exchange(self, x: Tensor) -> Tensor:
        """Sends x[i] to device i of the group, and returns what each has sent, in their order."""
        # By PyTorch's operation with a gradient, which its compiler knows: a collective into a buffer it would take for
        # an empty tensor, without an error and without a gradient.
        found: Tensor = all_to_all_single_autograd(x.contiguous(), None, None, self.group)
        return found
