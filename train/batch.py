"""How a step's sequences are shared out: everything follows from `tokens_per_step` and the number of devices."""

from dataclasses import dataclass

from configs.schema import RunConfig


@dataclass(frozen=True)
class StepShape:
    """Portions of one optimizer step."""

    seqs_per_step: int
    """Sequences over all devices."""
    micro_batch_seqs: int
    """Sequences of one forward pass on one device."""
    accumulation_steps: int
    """Forward passes of one device in a step."""

    def __str__(self) -> str:
        return (
            f"{self.seqs_per_step} sequences a step = {self.micro_batch_seqs} a forward pass x "
            f"{self.accumulation_steps} accumulated x {self.seqs_per_step // self.seqs_per_device} devices"
        )

    @property
    def seqs_per_device(self) -> int:
        """Sequences of one device in a step."""
        return self.micro_batch_seqs * self.accumulation_steps


def step_shape(cfg: RunConfig) -> StepShape:
    """The largest micro batch that divides a device's share and keeps to `max_micro_batch_seqs`."""
    seqs_per_device = cfg.train.seqs_per_step // cfg.cluster.world_size
    largest = min(cfg.train.max_micro_batch_seqs, seqs_per_device)
    micro = next(n for n in range(largest, 0, -1) if seqs_per_device % n == 0)
    return StepShape(cfg.train.seqs_per_step, micro, seqs_per_device // micro)
