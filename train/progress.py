"""What a run has behind it: with weights, moments and random states, all that a resume needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from data.order import Phase


@dataclass
class Progress:
    """Stands in the manifest of every checkpoint."""

    step: int = 0  # optimizer steps done, those with a gradient that was not finite included
    updates: int = 0  # steps whose gradient was applied: what AdamW counts
    tokens: int = 0  # tokens trained on, repetitions counted
    lr: float = 0.0  # learning rate of the last step
    order_state: list[int] = field(default_factory=list)
    """`data.order.OrderHash.state` summed over all ranks: a proof of what was consumed, whoever consumed it."""
    order_hash: str = ""  # the same proof as hexadecimal digits
    consumed: dict[str, int] = field(default_factory=dict)  # tokens by language
    consumed_by_source: dict[str, int] = field(default_factory=dict)  # tokens by source, over all languages
    consumed_by_part: dict[str, int] = field(default_factory=dict)
    """Tokens by language and source, such as `de/wiki`: what the other two are summed from."""
    phases: list[Phase] = field(default_factory=list)
    """The mixtures, and from which position on, those to come included; see data/order.py."""
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of positions left out after loss spikes, sorted."""
    losses: list[float] = field(default_factory=list)  # of the last steps, for finding spikes
    skipped_steps: list[int] = field(default_factory=list)  # steps whose gradient was not finite
    rewinds: int = 0  # how often the run has gone back after a spike
    flops: float = 0.0  # operations of forward and backward so far
    device_s: float = 0.0  # seconds of stepping so far, times devices
    joules: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Of devices and of nodes so far. A kill loses what came after the last checkpoint, a rewind nothing."""
    metered_s: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Seconds in which these two were read, and all seconds."""
    ledger_bytes: int = 0  # length of the ledger when this was saved

    @property
    def consumption(self) -> dict[str, dict[str, int]]:
        """What was consumed, as metrics and ledger have it."""
        return {name: value for name, value in vars(self).items() if name.startswith("consumed")}

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Progress":
        """From the entry of a manifest."""
        phases = [Phase(**phase) for phase in found["phases"]]
        skipped = [(first, end) for first, end in found["skipped"]]
        return cls(**{**found, "phases": phases, "skipped": skipped})
