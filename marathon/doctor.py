"""Is this machine ready? Each check says what it found and, where something is wrong, how to mend it.

A check looks at the real thing: it writes a file, opens a process group, asks the installed packages. What
does not apply here, as a GPU check on a login node, says so and passes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch.distributed as torch_dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from configs.compose import GROUPS, run_dir
from configs.errors import UserError
from configs.schema import RunConfig
from data.manifest import verify
from data.pipeline import corpus_dir
from marathon import placement
from marathon.outcome import Outcome, Status, does_not_apply, failed, in_job, passed, warned
from marathon.plan import checkpoint_bytes, checkpoints_on_disk

DISTRIBUTION = "marathon-llm"
KNOWN_BAD = (
    (">=0.18.6,<0.19.0", "", "ZeRO-1 in bf16 drops most of the last micro-batch from the gradient"),
    ("<0.18.9", ">=2.10", "this torch with ZeRO-3 gives NaN from a race"),
    ("<0.19.5", "", "scaled gradients and misplaced checkpoints were mended up to 0.19.5"),
)
"""Ranges of deepspeed and torch that train wrongly without a word, from DeepSpeed's own history of changes."""
LEAST_SHARED_MEMORY_BYTES = 2**30
"""Docker gives 64 MiB unless told otherwise; NCCL's buffers and loader workers then die with a bus error."""
CLOCK_TOLERANCE_S = 2.0
RENDEZVOUS_TIMEOUT_S = 20


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    repair: str
    """Empty where there is nothing to mend."""


def run_doctor(cfg: RunConfig | None) -> list[Check]:
    """Looks at everything; without a config, at what does not depend on one. Takes about five seconds."""
    checks = [Check(name, *check()) for name, check in GENERAL.items()]
    for name, configured in CONFIGURED.items():
        outcome = configured(cfg) if cfg else does_not_apply("no experiment= was given")
        checks.append(Check(name, *outcome))
    return checks


def print_checks(checks: list[Check]) -> int:
    """Prints a plain table; returns 1 where a check failed, else 0."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status}  {check.name:<{width}}  {check.found}")
        if check.repair:
            print(f"{'':<{width + 6}}  repair: {check.repair}")
    counted = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail")}
    print(f"{counted['pass']} pass, {counted['warn']} warn, {counted['fail']} fail")
    return int(counted["fail"] > 0)


def check_python() -> Outcome:
    """The interpreter's version against the range that the package states."""
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        needed = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return warned(version, "install Marathon, so that its ranges are known: pip install --no-deps -e .")
    if SpecifierSet(needed).contains(version, prereleases=True):
        return passed(f"{version}, within {needed}")
    return failed(f"{version}, needs {needed}", "use an interpreter of that range")


def check_libraries() -> Outcome:
    """Every dependency's version against the range that the package states."""
    try:
        stated = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return warned(f"{DISTRIBUTION} is not installed", "install it: pip install --no-deps -e .")
    requirements = [Requirement(line) for line in stated]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    wrong = [f"{r.name} {_version(r.name)} (needs {r.specifier})" for r in needed if not _fits(r)]
    if wrong:
        return failed(", ".join(wrong), f"pip install {' '.join(repr(str(r)) for r in needed if not _fits(r))}")
    return passed(
        f"all {len(needed)} within their ranges: torch {_version('torch')}, deepspeed {_version('deepspeed')}"
    )


def check_known_bad() -> Outcome:
    """Pairs of deepspeed and torch that are known to train wrongly."""
    deepspeed, torch_version = _version("deepspeed"), _version("torch")
    for deepspeed_range, torch_range, harm in KNOWN_BAD:
        if _within(deepspeed, deepspeed_range) and _within(torch_version, torch_range):
            return failed(
                f"deepspeed {deepspeed} with torch {torch_version}: {harm}", "pip install 'deepspeed>=0.19.5'"
            )
    return passed(f"deepspeed {deepspeed} with torch {torch_version}: none known")


def check_safe_path() -> Outcome:
    """Whether a folder named like one of our packages could be imported in its place."""
    if sys.flags.safe_path:
        return passed("PYTHONSAFEPATH: the current folder is not searched for modules")
    ours = GROUPS.parent
    packages = [p.parent.name for p in ours.glob("*/__init__.py")]
    hiding = [name for name in packages if (Path.cwd() / name).is_dir() and Path.cwd() != ours]
    if hiding:
        return failed(f"{Path.cwd()} holds {', '.join(sorted(hiding))}, which hide ours", "export PYTHONSAFEPATH=1")
    if in_job():
        return warned("PYTHONSAFEPATH is not set in this job", "export PYTHONSAFEPATH=1 in the job script")
    return passed("not set; nothing in this folder hides our packages")


def check_rendezvous() -> Outcome:
    """Two processes on this machine form a gloo group and sum a number."""
    store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    command = [sys.executable, "-P", "-c", _RENDEZVOUS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(store.port)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    begin, errors = time.monotonic(), []
    for rank in ranks:
        try:
            errors.append(rank.communicate(timeout=RENDEZVOUS_TIMEOUT_S)[1].strip())
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.communicate()
            errors.append(f"no answer in {RENDEZVOUS_TIMEOUT_S} s")
    if any(rank.returncode for rank in ranks):
        last_line = next(error for error in errors if error).splitlines()[-1]
        return failed(
            f"two gloo processes did not meet: {last_line[:200]}",
            "GLOO_SOCKET_IFNAME must name an interface of this machine, or be unset; the host name must resolve",
        )
    return passed(f"two gloo processes met and summed in {time.monotonic() - begin:.1f} s")


_RENDEZVOUS = """
import sys, datetime, torch, torch.distributed as dist
rank, port = map(int, sys.argv[1:])
wait = datetime.timedelta(seconds=15)
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=wait)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
assert total.item() == 3, f"1 + 2 gave {total.item()}"
dist.destroy_process_group()
"""


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
    folder, needed = _existing(Path(cfg.cluster.scratch)), checkpoints_on_disk(cfg) * checkpoint_bytes(cfg)
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


def check_shared_memory(_: RunConfig) -> Outcome:
    """Room in /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return does_not_apply("no /dev/shm")
    free = shutil.disk_usage(folder).free
    if free >= LEAST_SHARED_MEMORY_BYTES:
        return passed(f"{free / 2**30:,.1f} GiB free in /dev/shm")
    return warned(f"{free / 2**20:,.0f} MiB free in /dev/shm", "start the container with --ipc=host or --shm-size=8g")


def check_clock(cfg: RunConfig, now: Callable[[], float] = time.time) -> Outcome:
    """The clock that stamps files in the scratch folder against this machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(Path(cfg.cluster.scratch)), prefix=".doctor-") as file:
            file.write(b"now")
            file.flush()
            apart_s = abs(os.stat(file.name).st_mtime - now())
    except OSError as error:
        return does_not_apply(f"no file can be written: {error.strerror}")
    if apart_s <= CLOCK_TOLERANCE_S:
        return passed(f"files and system agree within {CLOCK_TOLERANCE_S:.0f} s")
    return warned(
        f"files are stamped {apart_s:,.0f} s off this machine's clock", "ask the site: its time service is off"
    )


GENERAL: dict[str, Callable[[], Outcome]] = {
    "python": check_python,
    "libraries": check_libraries,
    "known bad versions": check_known_bad,
    "module path": check_safe_path,
    "rendezvous": check_rendezvous,
}
CONFIGURED: dict[str, Callable[[RunConfig], Outcome]] = {
    "torch build": placement.check_torch_build,
    "devices": placement.check_devices,
    "visible devices": placement.check_visible_devices,
    "cores": placement.check_cores,
    "core masks": placement.check_core_masks,
    "threads": placement.check_threads,
    "hub": placement.check_hub,
    "network interface": placement.check_interfaces,
    "scratch": check_scratch,
    "space": check_space,
    "corpus": check_corpus,
    "shared memory": check_shared_memory,
    "clock": check_clock,
}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _fits(requirement: Requirement) -> bool:
    return _within(_version(requirement.name), str(requirement.specifier))


def _within(version: str, range_: str) -> bool:
    # Clusters' builds carry names such as 2.10.0a0+git: they count as the release that they lead to.
    return version != "not installed" and SpecifierSet(range_).contains(version, prereleases=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(f for f in (folder, *folder.parents) if f.exists())
