"""Which parameters are treated alike, and the optimizers: AdamW of PyTorch, Muon and AdEMAMix.

They step the flat fp32 partitions that ZeRO makes of groups. What is kept of a gradient, and so stands in a checkpoint,
follows from a group's `betas`: as many of `MOMENTS`; the first is always the average that decays by the first beta.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from configs.enums import OptimizerName
from configs.schema import OptimConfig, RunConfig
from model.decoder import Decoder, width_factors

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_slow")


def build_optimizer(decoder: Decoder, cfg: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` says; AdamW, also within Muon, is fused, so nothing is compiled at run time."""
    groups, optim = parameter_groups(decoder, cfg.optim), cfg.optim
    if optim.name is OptimizerName.ademamix:
        return AdEMAMix(groups, optim, optim.slow_warmup_steps or cfg.train.steps)
    kind = Muon if optim.name is OptimizerName.muon else torch.optim.AdamW
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def parameter_groups(decoder: Decoder, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Each parameter in one group; matrices are decayed, but not the input embedding.

    The schedule's rate is multiplied with `lr_factor` (muP), and the decay divided by it, so that a step takes the same
    share at every width (Dey et al. 2025, arXiv 2505.01618). Muon's update, spread over all directions and not over
    few as Adam's, grows in effect with the root of the width alone: its factor is the root of Adam's.
    """
    groups: dict[tuple[float, float, tuple[float, ...]], list[Tensor]] = {}
    for name, parameter in decoder.named_parameters():
        _, factor = width_factors(decoder.cfg, name)
        betas: tuple[float, ...] = (cfg.beta1, cfg.beta2)
        if cfg.name is OptimizerName.ademamix:
            betas = (*betas, cfg.beta3)
        elif cfg.name is OptimizerName.muon and name.endswith("_proj.weight"):
            betas, factor = (cfg.momentum,), math.sqrt(factor)
        is_decayed = parameter.ndim >= 2 and parameter is not decoder.embedding.weight
        groups.setdefault((cfg.weight_decay / factor * is_decayed, factor, betas), []).append(parameter)
    names = ("weight_decay", "lr_factor", "betas")
    return [{"params": groups[key], **dict(zip(names, key, strict=True))} for key in sorted(groups, reverse=True)]


def state_bytes(cfg: RunConfig, vocab_rows: int) -> int:
    """Bytes of master weights and moments in fp32, over all ranks."""
    with torch.device("meta"):
        groups = parameter_groups(Decoder(cfg.model, vocab_rows), cfg.optim)
    return sum(4 * (1 + len(group["betas"])) * parameter.numel() for group in groups for parameter in group["params"])


def ready(state: dict[str, Tensor], flat: Tensor, betas: tuple[float, ...]) -> dict[str, Tensor]:
    """State of a flat partition: moments and number of steps, as zeros where there are none yet."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state.update({kind: torch.zeros_like(flat) for kind in MOMENTS[: len(betas)]})
    return state


class AdEMAMix(torch.optim.Optimizer):
    """Adam with a slow average of gradients beside the fast one (Pagliardini et al. 2024, arXiv 2409.03137).

    In `warmup_steps` the weight of the slow one rises to alpha, and its half-life to that of beta3, both linearly.
    """

    def __init__(self, groups: list[dict[str, Any]], cfg: OptimConfig, warmup_steps: int) -> None:
        super().__init__(groups, {"lr": cfg.lr})
        self.alpha, self.eps, self.warmup_steps = cfg.alpha, cfg.eps, warmup_steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Uses up the gradients: their memory takes the denominators."""
        for settings, flat in _each(self.param_groups):
            lr, (beta1, beta2, beta3) = settings["lr"], settings["betas"]
            state = ready(self.state[flat], flat, settings["betas"])
            step = float(state["step"].add_(1))
            risen = min(step / self.warmup_steps, 1.0)
            beta3 = math.exp(1 / ((1 - risen) / math.log(beta1) + risen / math.log(beta3)))
            state["exp_avg"].lerp_(flat.grad, 1 - beta1)
            state["exp_avg_slow"].lerp_(flat.grad, 1 - beta3)
            state["exp_avg_sq"].mul_(beta2).addcmul_(flat.grad, flat.grad, value=1 - beta2)
            root = torch.sqrt(state["exp_avg_sq"], out=flat.grad).div_(math.sqrt(1 - beta2**step)).add_(self.eps)
            flat.mul_(1 - lr * settings["weight_decay"])
            flat.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1**step))
            flat.addcdiv_(state["exp_avg_slow"], root, value=-lr * self.alpha * risen)


class Matrix(NamedTuple):
    """A matrix, flattened, of which each rank has a range, in their order: `numels` elements, `here` on this one.

    Its owner, who makes it whole, is the rank with the largest range, and among equals each in turn.
    """

    shape: torch.Size
    here: slice
    numels: list[int]
    owner: int


class Muon(torch.optim.AdamW):
    """AdamW, but orthogonal momentum for groups with one beta (Jordan 2024, kellerjordan.github.io/posts/muon).

    Not DeepSpeed's, which under most of its stages clips the orthogonal update in place of the gradient, and keeps
    momentum by whole matrices. Here clipping, norms and checkpoints are those of every optimizer.
    """

    matrices: dict[Tensor, list[Matrix]]
    """By flat partition, on all ranks the same ones in the same order; set by the engine."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Collective; uses up the gradients of matrices."""
        groups = self.param_groups
        for settings, flat in _each([group for group in groups if len(group["betas"]) == 1]):
            momentum, [beta] = ready(self.state[flat], flat, settings["betas"])["exp_avg"], settings["betas"]
            momentum.lerp_(flat.grad, 1 - beta)
            flat.grad.lerp_(momentum, beta)  # Nesterov's look ahead
            _make_orthogonal(flat.grad, self.matrices[flat])
            flat.mul_(1 - settings["lr"] * settings["weight_decay"]).add_(flat.grad, alpha=-settings["lr"])
        self.param_groups = [group for group in groups if len(group["betas"]) > 1]
        super().step()
        self.param_groups = groups


def _each(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
    return ((group, flat) for group in groups for flat in group["params"])


def _make_orthogonal(update_N: Tensor, matrices: list[Matrix]) -> None:
    """In place: one exchange brings the parts of each matrix to its owner, another brings them back."""
    rank, matrices = torch_dist.get_rank(), sorted(matrices, key=lambda matrix: matrix.owner)
    own, ranks = [matrix for matrix in matrices if matrix.owner == rank], range(len(matrices[0].numels))
    given = [sum(matrix.numels[rank] for matrix in matrices if matrix.owner == other) for other in ranks]
    taken = [sum(matrix.numels[other] for matrix in own) for other in ranks]
    parts, whole = torch.cat([update_N[matrix.here] for matrix in matrices]), update_N.new_empty(sum(taken))
    torch_dist.all_to_all_single(whole, parts, taken, given)
    by_rank = [
        torch.split(of, [matrix.numels[other] for matrix in own]) for other, of in enumerate(torch.split(whole, taken))
    ]
    for matrix, *pieces in zip(own, *by_rank, strict=True):
        done = orthogonal(torch.cat(pieces).view(matrix.shape)).flatten()
        for piece, part in zip(pieces, torch.split(done, matrix.numels), strict=True):
            piece.copy_(part)
    torch_dist.all_to_all_single(parts, whole, given, taken)
    for matrix, part in zip(matrices, torch.split(parts, [matrix.numels[rank] for matrix in matrices]), strict=True):
        update_N[matrix.here] = part


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """Near U V^T of U S V^T, scaled to 0.2 in the root mean square.

    Five steps of Newton and Schulz with Jordan's coefficients bring singular values near 1; bf16 suffices. 0.2 is what
    AdamW's updates have, whose rate and decay then serve (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    x = matrix_MN.to(torch.float32 if matrix_MN.device.type == "cpu" else torch.bfloat16)
    x = x.mT if len(x) > len(x.mT) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return 0.2 * math.sqrt(max(x.shape)) * (x if x.shape == matrix_MN.shape else x.mT).to(matrix_MN.dtype)
