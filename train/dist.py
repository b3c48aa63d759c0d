"""Who this process is among the ranks, and what ranks say to each other.

Facts come from torchrun's variables, or from Slurm's where srun started the process itself.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist

from configs.enums import Device
from configs.errors import UserError
from configs.schema import RunConfig


@dataclass(frozen=True)
class Rank:
    """One process of the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        torch_dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums each value over all ranks, in float64."""
        return self._sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Sums each value over all ranks, modulo 2**64, in int64."""
        return self._sum(torch.tensor(values, dtype=torch.int64)).tolist()

    def max(self, value: float) -> float:
        """The largest value of all ranks."""
        on_device = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch_dist.all_reduce(on_device, torch_dist.ReduceOp.MAX)
        return on_device.item()

    def tell(self, text: str) -> str:
        """The first rank's text, on every rank."""
        told = [text]
        torch_dist.broadcast_object_list(told)
        return told[0]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum_integers([int(flag)])[0] > 0

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        on_device = values.to(self.device)
        torch_dist.all_reduce(on_device)
        return on_device.cpu()


def join(cfg: RunConfig) -> Rank:
    """Makes this process a rank of the job: device, threads, process group.

    Raises:
        UserError: the number of processes is not what the config was frozen for.
    """
    rank, world_size, local_rank = (
        _fact("RANK", "SLURM_PROCID", 0),
        _fact("WORLD_SIZE", "SLURM_NTASKS", 1),
        _fact("LOCAL_RANK", "SLURM_LOCALID", 0),
    )
    if world_size != cfg.cluster.world_size:
        raise UserError(
            f"{world_size} processes for cluster.nodes = {cfg.cluster.nodes} x "
            f"cluster.devices_per_node = {cfg.cluster.devices_per_node}",
            "one process a device; the batch of each is derived from their number",
            f"start {cfg.cluster.world_size} processes, or override cluster.nodes and cluster.devices_per_node",
        )
    torch.set_num_threads(cfg.cluster.cpus_per_device)
    on_cpu = cfg.cluster.device is Device.cpu
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29400")
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed looks for it, srun does not set it
    torch_dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=cfg.engine.timeout_s),
        device_id=None if on_cpu else device,
    )
    return Rank(rank, world_size, local_rank, device)


def leave() -> None:
    """Ends the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def _fact(name: str, slurm_name: str, default: int) -> int:
    return int(os.environ.get(name) or os.environ.get(slurm_name) or default)
