"""What a run says while it trains: metrics.jsonl always, the terminal, and Weights & Biases when asked.

A run that was killed and resumed from an earlier step repeats some steps in metrics.jsonl; the later line counts.
"""

import json
import math
import os
import resource
import time
import timeit
from pathlib import Path
from typing import Any

import torch

from configs.compose import to_yaml
from configs.enums import WandbMode
from configs.schema import RunConfig
from ledger.progress import Progress as Terminal
from train.dist import Rank
from train.progress import Progress

MFU_FORMULA = "MFU = model FLOPs per token x tokens/s / (devices x peak)"


class Metrics:
    """Writes metric records; on ranks other than the first it does nothing."""

    def __init__(self, run_dir: Path, cfg: RunConfig, rank: Rank, step: int) -> None:
        self.path, self.steps, self.is_first = run_dir / "metrics.jsonl", cfg.train.steps, rank.is_first
        self.terminal = Terminal("training", "steps", self.steps, done=step, shown=rank.is_first)
        self._wandb: Any = None
        if rank.is_first and cfg.log.wandb is not WandbMode.off:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            self._wandb = wandb.init(
                project=cfg.log.wandb_project,
                name=cfg.name,
                id=cfg.name,
                resume="allow",
                mode="online" if cfg.log.wandb is WandbMode.online else "offline",
                dir=str(run_dir / "logs"),
                config={"yaml": to_yaml(cfg)},
            )

    def write(self, kind: str, progress: Progress, **values: Any) -> None:
        """One record: appended to metrics.jsonl, a line on the terminal, and sent to wandb."""
        if not self.is_first:
            return
        facts = {"step": progress.step, "tokens": progress.tokens, **values}
        # Infinity and NaN are not JSON; a reader should not stumble over the record that tells of them.
        sound = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in facts.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **sound, "time": round(time.time(), 3)}) + "\n")
        where = f"step {progress.step:>{len(str(self.steps))}}/{self.steps}"
        if kind == "valid":
            worst, bpb = max(values["bpb"].items(), key=lambda of_language: of_language[1])
            line = f"validation {values['bpb_mean']:.3f} bits per byte (worst {worst} {bpb:.3f})"
        else:
            line = (
                f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  gradient {values['grad_norm']:.2f}  "
                f"{values['tokens_per_s']:,.0f} tokens/s  MFU {values['mfu']:.1%}  {values['memory_gib']:.1f} GiB"
            )
        self.terminal.say(f"{where}  {line}")
        if self._wandb is not None:
            self._wandb.log(_flat(kind, values), step=progress.step)

    def close(self) -> None:
        """Ends the bar, and the wandb run if there is one."""
        self.terminal.stop()
        if self._wandb is not None:
            self._wandb.finish()


def memory_gib(device: torch.device) -> float:
    """Highest use so far: of the device's allocator, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def meter_name(device: torch.device) -> str:
    """How energy meters know a device: NVIDIA's by UUID, AMD's by PCI address; a CPU has no name."""
    if device.type == "cpu":
        return ""
    facts: Any = torch.cuda.get_device_properties(device)
    numbers = [getattr(facts, f"pci_{name}_id", 0) for name in ("domain", "bus", "device")]  # older PyTorch has none
    return "{:04x}:{:02x}:{:02x}.0".format(*numbers) if torch.version.hip else f"GPU-{facts.uuid}"


def peak_flops(cfg: RunConfig, rank: Rank) -> float:
    """Peak of one device in operations a second, as the config states it, or on a CPU as measured.

    Measured: the best of some products of two 1024 x 1024 fp32 matrices, all ranks at once, averaged over ranks. It is
    what this machine can do for the plainest kernel, so MFU on a CPU is a share of that.
    """
    if cfg.cluster.peak_tflops > 0:
        return cfg.cluster.peak_tflops * 1e12
    a, b = torch.randn(2, 1024, 1024)
    rank.barrier()
    best_s = min(timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=8))
    return rank.sum([2 * 1024**3 / best_s])[0] / rank.world_size


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(f"{prefix}/{key}", inner)
    return out
