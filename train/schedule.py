"""What a step is: how its sequences are shared out over the devices, and its learning rate."""

import math
from typing import NamedTuple

from configs.enums import ScheduleName
from configs.schema import OptimConfig, RunConfig, ScheduleConfig


class StepShape(NamedTuple):
    """Of one optimizer step: sequences over all devices, and in a forward pass of one device; how many such passes."""

    seqs_per_step: int
    micro_batch_seqs: int
    accumulation_steps: int

    def __str__(self) -> str:
        n_at_once = self.seqs_per_step // (self.micro_batch_seqs * self.accumulation_steps)
        return (
            f"{self.seqs_per_step} sequences a step = {self.micro_batch_seqs} a forward pass x "
            f"{self.accumulation_steps} accumulated x {n_at_once} at once"
        )


def step_shape(cfg: RunConfig) -> StepShape:
    """The largest micro batch that divides a device's share and keeps to `max_micro_batch_seqs`."""
    seqs_per_device = cfg.train.seqs_per_step * cfg.engine.group_size // cfg.cluster.world_size
    largest = min(cfg.train.max_micro_batch_seqs, seqs_per_device)
    micro = next(n for n in range(largest, 0, -1) if seqs_per_device % n == 0)
    return StepShape(cfg.train.seqs_per_step, micro, seqs_per_device // micro)


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Rate of step `step` (0 is the first) of `steps`.

    Warm-up rises linearly to the peak, which the first step after it has. wsd (Hu et al. 2024, MiniCPM) stays there and
    falls linearly over the last `decay_share` of all steps; cosine falls all the way. The floor, `final_lr_share` of
    the peak, would be met one step after the last.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name is ScheduleName.wsd:
        decay_steps = round(schedule.decay_share * steps)
        height = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    else:
        progress = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
        height = (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (schedule.final_lr_share + (1 - schedule.final_lr_share) * height)
