"""What a step is: how its sequences are shared out over the devices, and its learning rate."""

import math
from typing import NamedTuple

from configs.enums import DecayShape, ScheduleName
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


def step_shape(cfg: RunConfig, step: int | None = None) -> StepShape:
    """Of step `step`, or once a ramp is over: the largest micro batch that divides a device's share and is allowed."""
    train = cfg.train
    seqs = train.seqs_per_step if step is None else train.first_sample(step + 1) - train.first_sample(step)
    seqs_per_device = seqs * cfg.engine.group_size // cfg.cluster.world_size
    largest = min(train.max_micro_batch_seqs, seqs_per_device)
    micro = next(n for n in range(largest, 0, -1) if seqs_per_device % n == 0)
    return StepShape(seqs, micro, seqs_per_device // micro)


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Rate of step `step` (0 is the first) of `steps`.

    Warm-up rises linearly to the peak, which the first step after it has. wsd (Hu et al. 2024, MiniCPM) stays there and
    falls over the last `decay_share` of all steps; cosine falls all the way. The floor, `final_lr_share` of the peak,
    would be met one step after the last.
    """
    if step < schedule.warmup_steps:
        return optim.lr * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name is ScheduleName.wsd:
        begin, shape = steps - round(schedule.decay_share * steps), schedule.decay_shape
    else:
        begin, shape = schedule.warmup_steps, DecayShape.cosine
    progress = (step - begin) / (steps - begin) if step > begin else 0.0
    height = {
        DecayShape.linear: 1 - progress,
        DecayShape.sqrt: 1 - math.sqrt(progress),
        DecayShape.cosine: (1 + math.cos(math.pi * progress)) / 2,
    }[shape]
    return optim.lr * (schedule.final_lr_share + (1 - schedule.final_lr_share) * height)
