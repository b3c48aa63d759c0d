"""Is this machine ready? Each check says what it found and, where something is wrong, how to mend it.

A check looks at the real thing: it writes a file, opens a process group, asks the installed packages. What
does not apply here, as a GPU check on a login node, says so and is skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch.distributed as torch_dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from configs.compose import run_dir
from configs.errors import UserError
from configs.schema import RunConfig
from data.manifest import verify
from data.pipeline import corpus_dir
from ledger.host import version
from marathon import placement
from marathon.outcome import Outcome, does_not_apply, failed, passed, warned
from train.retention import checkpoint_bytes, checkpoints_on_disk

DISTRIBUTION = "marathon-llm"
KNOWN_BAD = (
    (">=0.18.6,<0.19.0", "", "ZeRO-1 in bf16 drops most of the last micro-batch from the gradient"),
    ("<0.18.9", ">=2.10", "this torch with ZeRO-3 gives NaN from a race"),
    ("<0.19.5", "", "scaled gradients and misplaced checkpoints were mended up to 0.19.5"),
)
"""Ranges of deepspeed and torch that train wrongly without a word, from DeepSpeed's own history of changes."""


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
    wrong = [r for r in needed if not _within(version(r.name), str(r.specifier))]
    if wrong:
        found = ", ".join(f"{r.name} {version(r.name) or 'not installed'} (needs {r.specifier})" for r in wrong)
        return failed(found, f"install {', '.join(f'{r.name}{r.specifier}' for r in wrong)}")
    return passed(f"python {version('python')} and {len(needed) - 1} libraries, all within their ranges")


def check_known_bad() -> Outcome:
    """Pairs of deepspeed and torch that are known to train wrongly."""
    deepspeed, torch_version = version("deepspeed"), version("torch")
    found = f"deepspeed {deepspeed or 'not installed'} with torch {torch_version or 'not installed'}"
    for deepspeed_range, torch_range, harm in KNOWN_BAD:
        if _within(deepspeed, deepspeed_range) and _within(torch_version, torch_range):
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


def check_scratch(cfg: RunConfig) -> Outcome:
    """Writes a file to the scratch folder, forces it to disk, and removes it."""
    folder = _existing(Path(cfg.cluster.scratch))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        repair = "export MARATHON_SCRATCH=<a folder of yours>, or cluster.scratch=…"
        return failed(f"{folder}: {error.strerror}", repair)
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


GENERAL: dict[str, Callable[[], Outcome]] = {
    "versions": check_versions,
    "known bad versions": check_known_bad,
    "rendezvous": check_rendezvous,
}
CONFIGURED: dict[str, Callable[[RunConfig], Outcome]] = {
    "torch build": placement.check_torch_build,
    "devices": placement.check_devices,
    "cores": placement.check_cores,
    "core masks": placement.check_core_masks,
    "threads": placement.check_threads,
    "hub": placement.check_hub,
    "network interface": placement.check_interfaces,
    "scratch": check_scratch,
    "space": check_space,
    "corpus": check_corpus,
}


def _within(version: str | None, range_: str) -> bool:
    # Clusters' builds carry names such as 2.10.0a0+git: they count as the release that they lead to.
    return version is not None and SpecifierSet(range_).contains(version, prereleases=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(f for f in (folder, *folder.parents) if f.exists())
