"""Learning rate as a pure function of the step."""

import math

from configs.enums import ScheduleName
from configs.schema import OptimConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Rate of step `step` (0 is the first) of `steps`.

    Warm-up rises linearly to the peak, which the first step after it has. wsd (Hu et al. 2024, MiniCPM)
    stays there and falls linearly over the last `decay_share` of all steps; cosine falls all the way. The
    floor, `final_lr_share` of the peak, would be met one step after the last.
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
