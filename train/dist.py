"""Who this process is among the ranks, by torchrun's variables or Slurm's, and what ranks say to each other."""

import ctypes
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from configs.enums import Device
from configs.errors import EXIT_MISTAKE, UserError
from configs.schema import RunConfig

Fact = TypeVar("Fact")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Rank:
    """One process of the job."""

    rank: int
    world_size: int
    device: torch.device
    host: str = ""  # its node
    group_size: int = 1  # neighbours in the order of ranks that work on the same sequences

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """Its place among those that work on the same sequences."""
        return self.rank % self.group_size

    @property
    def data_rank(self) -> int:
        """Which share of the sequences it works on, of `data_world_size`."""
        return self.rank // self.group_size

    @property
    def data_world_size(self) -> int:
        """Shares that the sequences of a step are dealt out in."""
        return self.world_size // self.group_size

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        torch_dist.barrier()

    def sum(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> list[float]:
        """Sums each value over all ranks, in float64; in int64, which is exact modulo 2**64, where that is asked."""
        on_device = torch.tensor(values, dtype=dtype).to(self.device)
        torch_dist.all_reduce(on_device)
        return on_device.tolist()

    def gather(self, fact: Any) -> list[Any]:
        """What every rank gives, in order of ranks, on every rank; for small things and rare moments."""
        facts: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(facts, fact)
        return facts

    def tell(self, fact: Fact) -> Fact:
        """The first rank's fact, on every rank."""
        told = [fact]
        torch_dist.broadcast_object_list(told, device=self.device)
        return told[0]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, on every rank's device; the others give one of its shape."""
        on_device = tensor.to(self.device)
        torch_dist.broadcast(on_device, 0)
        return on_device

    def together(self, action: Callable[[], object]) -> None:
        """All ranks do what may raise `UserError`: where it does on any, all end, and the first rank tells why."""
        mistake = None
        try:
            action()
        except UserError as error:
            mistake = error
        mistakes = [told for told in self.gather(mistake) if told]
        if mistakes:
            raise mistakes[0] if self.is_first else SystemExit(EXIT_MISTAKE)

    def first_does(self, action: Callable[[], object]) -> None:
        """The first rank does something that may raise `UserError`; all go on or none."""
        self.together(action if self.is_first else lambda: None)


def join(cfg: RunConfig) -> Rank:
    """Makes this process a rank of the job: device, threads, process group.

    Raises `UserError` where the number of processes is not what the config was frozen for.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    world_size = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    if world_size != cfg.cluster.world_size:
        shape = f"cluster.nodes = {cfg.cluster.nodes} x cluster.devices_per_node = {cfg.cluster.devices_per_node}"
        rule = "one process a device; the batch of each is derived from their number"
        repair = f"start {cfg.cluster.world_size} processes, or override cluster.nodes and cluster.devices_per_node"
        raise UserError(f"{world_size} processes for {shape}", rule, repair)
    torch.set_num_threads(cfg.cluster.cpus_per_device)
    on_cpu = cfg.cluster.device is Device.cpu
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    if on_cpu:
        _keep_memory()
    else:
        torch.cuda.set_device(device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29400")
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed looks for it, srun does not set it
    torch_dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        rank=rank,
        world_size=world_size,
        # The watchdog is to write its stacks before a collective gives up.
        timeout=datetime.timedelta(seconds=cfg.engine.timeout_s + 120),
        device_id=None if on_cpu else device,
    )
    return Rank(rank, world_size, device, os.environ.get("SLURMD_NODENAME") or platform.node(), cfg.engine.group_size)


def _keep_memory() -> None:
    """Has glibc keep what PyTorch frees: else each tensor of some MB is mapped, and its pages zeroed, anew.

    On a CPU a tenth of a step goes there (docs/performance.md). Another C library goes on as it is.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


leave = torch_dist.destroy_process_group
