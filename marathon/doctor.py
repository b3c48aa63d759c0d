"""Is this machine ready? Each check says what it found and, where something is wrong, how to mend it.

A check looks at the real thing: files, processes, packages, what Slurm set; what does not apply here is skipped. No
check knows a cluster's name; where the nearest cores of a device matter, the node's hardware decides.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as torch_dist
from packaging.requirements import Requirement

from configs.compose import run_dir
from configs.enums import Device
from configs.errors import UserError
from configs.schema import RunConfig
from data.manifest import verify
from data.pipeline import corpus_dir
from ledger.host import version
from train.retention import checkpoint_bytes, checkpoints_on_disk
from train.versions import is_within, known_bad

DISTRIBUTION = "marathon-llm"
CCD_OF_GCD = (6, 7, 2, 3, 0, 1, 4, 5)
"""Nodes with four MI250X and a 64-core EPYC 7A53: which group of 8 cores is nearest to each of the 8 GCDs; core 0
of each group belongs to the system (LUMI user guide, "Distribution and binding")."""
HIDE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
FAST_INTERFACES = ("hsn", "ib")  # Slingshot and InfiniBand


class Outcome(NamedTuple):
    """What was found and how to mend it; with `warn` a run may be slow or fragile, with `fail` it fails or is wrong."""

    status: Literal["pass", "warn", "fail", "skip"]
    found: str
    repair: str = ""


passed, warned, failed = (partial(Outcome, status) for status in ("pass", "warn", "fail"))


def does_not_apply(why: str) -> Outcome:
    """There is nothing here to look at."""
    return Outcome("skip", f"not applicable: {why}")


def run_doctor(cfg: RunConfig | None) -> dict[str, Outcome]:
    """Looks at everything; without a config, at what does not depend on one. Takes about five seconds."""
    without = does_not_apply("no experiment= was given")
    general = {name: check() for name, check in GENERAL.items()}
    return general | {name: check(cfg) if cfg else without for name, check in CONFIGURED.items()}


def print_checks(outcomes: dict[str, Outcome]) -> int:
    """Prints a plain table; returns 1 where a check failed, else 0."""
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        print(f"{outcome.status}  {name:<{width}}  {outcome.found}")
        if outcome.repair:
            print(f"{'':<{width + 6}}  repair: {outcome.repair}")
    counted = Counter(outcome.status for outcome in outcomes.values())
    print(", ".join(f"{counted[status]} {status}" for status in ("pass", "warn", "fail", "skip")))
    return int(counted["fail"] > 0)


def check_versions() -> Outcome:
    """The interpreter and every dependency against the ranges that the package states."""
    # A cluster's jobs run the checkout itself, in a container that may not know it as a package.
    if version(DISTRIBUTION) is None:
        return warned("Marathon is not installed, its ranges are not known", "pip install --no-deps -e .")
    stated = [f"python{metadata.metadata(DISTRIBUTION)['Requires-Python']}", *(metadata.requires(DISTRIBUTION) or [])]
    needed = [r for r in map(Requirement, stated) if r.marker is None or r.marker.evaluate()]
    wrong = [r for r in needed if not is_within(version(r.name), str(r.specifier))]
    if wrong:
        found = ", ".join(f"{r.name} {version(r.name) or 'not installed'} (needs {r.specifier})" for r in wrong)
        return failed(found, f"install {', '.join(f'{r.name}{r.specifier}' for r in wrong)}")
    return passed(f"python {version('python')} and {len(needed) - 1} libraries, all within their ranges")


def check_known_bad_versions() -> Outcome:
    """Pairs of deepspeed and torch that are known to train wrongly."""
    deepspeed, torch_version = version("deepspeed"), version("torch")
    found = f"deepspeed {deepspeed or 'not installed'} with torch {torch_version or 'not installed'}"
    if harm := known_bad(deepspeed, torch_version):
        return failed(f"{found}: {harm}", "pip install 'deepspeed>=0.19.5'")
    return passed(f"{found}: none known")


def check_rendezvous() -> Outcome:
    """Two processes on this machine form a gloo group and sum a number."""
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    command, begin = [sys.executable, "-P", "-c", _RENDEZVOUS, str(store.port)], time.monotonic()
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [rank.communicate()[1].strip() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        last_line = next(filter(None, errors), "no answer").splitlines()[-1]
        repair = "GLOO_SOCKET_IFNAME must name an interface of this machine, or be unset; the host name must resolve"
        return failed(f"two gloo processes did not meet: {last_line[:200]}", repair)
    return passed(f"two gloo processes met and summed in {time.monotonic() - begin:.1f} s")


_RENDEZVOUS = """
import datetime, signal, sys
port, rank = map(int, sys.argv[1:])
signal.alarm(20)
import torch, torch.distributed as dist
wait = datetime.timedelta(seconds=15)
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=wait)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
assert total.item() == 3, f"1 + 2 gave {total.item()}"
dist.destroy_process_group()
"""


def check_torch_build(cfg: RunConfig) -> Outcome:
    """Whether torch was built for the device that the cluster has."""
    built = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    wanted = cfg.cluster.device.value
    found = f"torch {torch.__version__} for {built}, cluster.device = {wanted}"
    if wanted in ("cpu", built):
        return passed(found)
    repair = f"start it in the container or environment whose torch is built for {wanted}"
    return failed(found, repair) if _in_job() else warned(f"{found}; right only outside of jobs", repair)


def check_devices(cfg: RunConfig) -> Outcome:
    """Devices that torch sees against cluster.devices_per_node; a process has to see all of its node's."""
    if cfg.cluster.device is Device.cpu:
        return does_not_apply("cluster.device = cpu")
    seen, wanted = torch.cuda.device_count(), cfg.cluster.devices_per_node
    if seen == 0 and not _in_job():
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
    if cfg.cluster.device is not Device.cpu and not _in_job():
        return does_not_apply("no Slurm job: the node that will compute is another")
    found = f"{cores} cores for {sharing} x cluster.cpus_per_device = {own}"
    if cores >= sharing * own:
        return passed(found)
    if _in_job():
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
    if sum(mask.bit_count() for mask in masks) != sum(masks).bit_count():  # a core of two masks carries into the next
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
    if not cfg.cluster.online and not offline and _in_job():
        return warned(f"{found}: a library may wait for a network that is not there", "export HF_HUB_OFFLINE=1")
    return passed(found)


def check_network_interface(cfg: RunConfig, net: Path = Path("/sys/class/net")) -> Outcome:
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
        return failed(found, repair) if _in_job() else warned(found, repair)
    if given[0] in "^=":
        return passed(f"NCCL_SOCKET_IFNAME={given}, which is not compared with this node's")
    chosen = [name for name in there if name.startswith(tuple(given.split(",")))]
    if not chosen:
        return failed(f"NCCL_SOCKET_IFNAME={given} is none of {', '.join(there)}", repair)
    if not set(fast) & set(chosen):
        return warned(f"NCCL_SOCKET_IFNAME={given} leaves out {', '.join(fast)}", repair)
    return passed(f"NCCL_SOCKET_IFNAME={given}")


def check_scratch(cfg: RunConfig) -> Outcome:
    """Writes a file to the scratch folder, forces it to disk, and removes it."""
    folder = _existing(Path(cfg.cluster.scratch))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return failed(
            f"{folder}: {error.strerror}", "export MARATHON_SCRATCH=<a folder of yours>, or cluster.scratch=…"
        )
    return passed(f"{folder}: a file was written and removed")


def check_space(cfg: RunConfig) -> Outcome:
    """Free space against the checkpoints that are still to be written."""
    folder, needed = _existing(Path(cfg.cluster.scratch)), checkpoints_on_disk(cfg.train) * checkpoint_bytes(cfg)
    written = sum(f.stat().st_size for f in (run_dir(cfg) / "checkpoints").rglob("*") if f.is_file())
    free, to_come = shutil.disk_usage(folder).free, max(needed - written, 0)
    found = f"{free / 2**30:,.1f} GiB free, {to_come / 2**30:,.1f} GiB of checkpoints to come; quotas do not show here"
    if free >= to_come:
        return passed(found)
    return failed(found, "train.keep_checkpoints=3, a larger train.save_every_steps, or another cluster.scratch")


def check_corpus(cfg: RunConfig) -> Outcome:
    """Every file of the prepared corpus against its hash, if it is prepared."""
    try:
        # Naming the folder hashes the sources, which leaves a cache: only where there is a folder to look at.
        if not (Path(cfg.cluster.scratch) / "corpora").exists() or not (folder := corpus_dir(cfg)).exists():
            return does_not_apply("the corpus is not prepared yet")
        verify(folder)
    except UserError as error:
        return failed(error.found, error.repair)
    return passed(f"{folder} is what its manifest says")


def _by_name(*checks: Callable[..., Outcome]) -> dict[str, Callable[..., Outcome]]:
    return {check.__name__.removeprefix("check_").replace("_", " "): check for check in checks}


GENERAL = _by_name(check_versions, check_known_bad_versions, check_rendezvous)
CONFIGURED = _by_name(
    check_torch_build, check_devices, check_cores, check_core_masks, check_threads, check_hub, check_network_interface,
    check_scratch, check_space, check_corpus,
)  # fmt: skip


def _in_job() -> bool:
    return "SLURM_JOB_ID" in os.environ


def _is_task_of_one_device(cfg: RunConfig) -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "0")) >= cfg.cluster.world_size


def _existing(folder: Path) -> Path:
    return next(f for f in (folder, *folder.parents) if f.exists())
