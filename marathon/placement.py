"""Checks of where a job's processes are put and what they may reach: devices, cores, threads, network.

They read what Slurm and the job script have set for this process. No check knows a cluster's name; where the
nearest cores of a device matter, the node's hardware decides.
"""

import functools
import operator
import os
from pathlib import Path

import torch

from configs.enums import Device
from configs.schema import RunConfig
from marathon.outcome import Outcome, does_not_apply, failed, in_job, passed, warned

CCD_OF_GCD = (6, 7, 2, 3, 0, 1, 4, 5)
"""Nodes with four MI250X and a 64-core EPYC 7A53: which group of 8 cores is nearest to each of the 8 GCDs; core 0
of each group belongs to the system (LUMI user guide, "Distribution and binding")."""
HIDE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
FAST_INTERFACES = ("hsn", "ib")
"""Names of Slingshot and InfiniBand interfaces."""


def check_torch_build(cfg: RunConfig) -> Outcome:
    """Whether torch was built for the device that the cluster has."""
    built = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    wanted = cfg.cluster.device
    found = f"torch {torch.__version__} for {built}, cluster.device = {wanted.value}"
    if wanted.value in ("cpu", built):
        return passed(found)
    repair = f"start it in the container or environment whose torch is built for {wanted.value}"
    return failed(found, repair) if in_job() else warned(f"{found}; right only outside of jobs", repair)


def check_devices(cfg: RunConfig) -> Outcome:
    """Devices that torch sees against cluster.devices_per_node; a process has to see all of its node's."""
    if cfg.cluster.device is Device.cpu:
        return does_not_apply("cluster.device = cpu")
    seen, wanted = torch.cuda.device_count(), cfg.cluster.devices_per_node
    if seen == 0 and not in_job():
        return does_not_apply("no device here and no Slurm job, as on a login node")
    if seen == wanted:
        return passed(f"{seen} devices")
    hiding = [f"{name}={os.environ[name]}" for name in HIDE_DEVICES if name in os.environ]
    found = f"{seen} devices, cluster.devices_per_node = {wanted}, {' '.join(hiding) or 'no variable hides any'}"
    if seen > wanted:
        return warned(f"{found}: the others stay idle", f"cluster.devices_per_node={seen}")
    repair = f"srun --gpus-per-node={wanted}, without --gpus-per-task and --gpu-bind"
    return failed(found, f"{repair}; unset {' '.join(HIDE_DEVICES)}")


def check_cores(cfg: RunConfig) -> Outcome:
    """Cores that this process may use against cluster.cpus_per_device."""
    cores, own = len(os.sched_getaffinity(0)), cfg.cluster.cpus_per_device
    sharing = 1 if _is_task_of_one_device(cfg) else cfg.cluster.devices_per_node
    if cfg.cluster.device is not Device.cpu and not in_job():
        return does_not_apply("no Slurm job: the node that will compute is another")
    found = f"{cores} cores for {sharing} x cluster.cpus_per_device = {own}"
    if cores >= sharing * own:
        return passed(found)
    if in_job():
        return failed(found, "pass --cpus-per-task to srun again (export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK)")
    return warned(f"{found}: processes will wait for each other", f"cluster.cpus_per_device={max(cores // sharing, 1)}")


def check_core_masks(cfg: RunConfig) -> Outcome:
    """Slurm's masks: one a device, disjoint, large enough, and near the device where the node's layout is known."""
    listed = os.environ.get("SLURM_CPU_BIND_LIST", "")
    if not listed:
        return does_not_apply("Slurm binds no cores here")
    if not _is_task_of_one_device(cfg):
        return does_not_apply("one task serves all devices of the node")
    if not os.environ.get("SLURM_CPU_BIND_TYPE", "").startswith("mask_cpu"):
        return warned(f"SLURM_CPU_BIND_LIST={listed} is no list of masks", "bind with --cpu-bind=mask_cpu:…")
    masks = [int(entry, 16) for entry in listed.split(",")]
    n_devices = cfg.cluster.devices_per_node
    is_known = cfg.cluster.device is Device.rocm and n_devices == len(CCD_OF_GCD)
    nearest = [0xFE << 8 * ccd for ccd in CCD_OF_GCD] if is_known else []
    repair = f"srun --cpu-bind=mask_cpu:{','.join(map(hex, nearest)) or 'one mask a device, none shared'}"
    if len(masks) != n_devices:
        return failed(f"{len(masks)} masks for {n_devices} devices", repair)
    if sum(mask.bit_count() for mask in masks) != functools.reduce(operator.or_, masks).bit_count():
        return failed(f"masks share cores: {listed}", repair)
    if small := [n for n, mask in enumerate(masks) if mask.bit_count() < cfg.cluster.cpus_per_device]:
        return failed(f"masks of local ranks {small} have fewer than {cfg.cluster.cpus_per_device} cores", repair)
    # A core's second hardware thread has a number 64 higher.
    if far := [n for n, (mask, near) in enumerate(zip(masks, nearest, strict=False)) if mask & ~(near | near << 64)]:
        return failed(f"masks of local ranks {far} are not at the cores nearest to their devices", repair)
    return passed(f"{n_devices} masks, disjoint" + (", each nearest to its device" if nearest else ""))


def check_threads(cfg: RunConfig) -> Outcome:
    """OMP_NUM_THREADS against the cores of a process."""
    given, own = os.environ.get("OMP_NUM_THREADS"), cfg.cluster.cpus_per_device
    if given is None:
        return passed(f"OMP_NUM_THREADS is not set; the trainer takes cluster.cpus_per_device = {own}")
    if given.isdigit() and 0 < int(given) <= own:
        return passed(f"OMP_NUM_THREADS={given}")
    return warned(f"OMP_NUM_THREADS={given} for {own} cores a process", f"export OMP_NUM_THREADS={own}, or unset it")


def check_hub(cfg: RunConfig) -> Outcome:
    """HF_HUB_OFFLINE against cluster.online."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    found = f"HF_HUB_OFFLINE {'set' if offline else 'not set'}, cluster.online = {str(cfg.cluster.online).lower()}"
    if cfg.cluster.online and offline:
        return warned(f"{found}: data at a hub cannot be fetched", "unset HF_HUB_OFFLINE, or cluster.online=false")
    if not cfg.cluster.online and not offline and in_job():
        return warned(f"{found}: a library may wait for a network that is not there", "export HF_HUB_OFFLINE=1")
    return passed(found)


def check_interfaces(cfg: RunConfig, net: Path = Path("/sys/class/net")) -> Outcome:
    """NCCL_SOCKET_IFNAME against the fast interfaces of this node; `net` lists the interfaces."""
    if cfg.cluster.nodes == 1 or cfg.cluster.device is Device.cpu:
        return does_not_apply("one node" if cfg.cluster.nodes == 1 else "cluster.device = cpu")
    there = sorted(entry.name for entry in net.iterdir()) if net.is_dir() else []
    fast = [name for name in there if name.startswith(FAST_INTERFACES)]
    if not fast:
        return does_not_apply(f"no interface {' or '.join(f'{name}*' for name in FAST_INTERFACES)} here")
    given, repair = os.environ.get("NCCL_SOCKET_IFNAME", ""), f"export NCCL_SOCKET_IFNAME={','.join(fast)}"
    if not given:
        found = f"NCCL_SOCKET_IFNAME is not set, this node has {', '.join(fast)}"
        return failed(found, repair) if in_job() else warned(found, repair)
    if given[0] in "^=":
        return passed(f"NCCL_SOCKET_IFNAME={given}, which is not compared with this node's")
    chosen = [name for name in there if name.startswith(tuple(given.split(",")))]
    if not chosen:
        return failed(f"NCCL_SOCKET_IFNAME={given} is none of {', '.join(there)}", repair)
    if not set(fast) & set(chosen):
        return warned(f"NCCL_SOCKET_IFNAME={given} leaves out {', '.join(fast)}", repair)
    return passed(f"NCCL_SOCKET_IFNAME={given}")


def _is_task_of_one_device(cfg: RunConfig) -> bool:
    """Whether srun started this process as one of as many as there are devices."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "0")) >= cfg.cluster.world_size
