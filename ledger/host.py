"""Facts of the host: software, hardware, commit. Written into the ledger by every stage."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from ledger.record import gap

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = (
    "marathon-llm", "torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "datasets", "accelerate",
    "lm_eval", "hydra-core", "numpy",
)  # fmt: skip


@functools.cache
def software() -> dict[str, str]:
    """Versions of Python and of what decides results; a distribution that is absent is a GAP."""
    return {name: version(name) or gap("not installed") for name in ("python", *DISTRIBUTIONS)}


def version(name: str) -> str | None:
    """Of Python or of a distribution; None where it is not installed."""
    try:
        return platform.python_version() if name == "python" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def hardware() -> dict[str, str | int]:
    """Processor, cores usable by this process, and host name."""
    machine, facts = platform.machine(), Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*: (.*)$", facts, re.MULTILINE)  # which ARM's do not tell
    cores = len(os.sched_getaffinity(0))
    return {"host": platform.node(), "machine": machine, "processor": model[1] if model else machine, "cores": cores}


@functools.cache
def commit() -> str:
    """Commit of Marathon's own code, with `+changed` where the work tree differs from it."""
    if not (ROOT / ".git").exists():
        return gap("installed without a git work tree")
    try:
        return _git("rev-parse", "HEAD") + ("+changed" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError) as error:
        return gap(f"git does not answer: {error}")


def container() -> str:
    """Image this process runs in, as the container runtime or the job script tells it."""
    told = (os.environ.get(name) for name in ("MARATHON_IMAGE", "SINGULARITY_CONTAINER", "APPTAINER_CONTAINER"))
    return next(filter(None, told), gap("no container announced itself"))


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", "-C", ROOT, *arguments], stderr=subprocess.DEVNULL, text=True).strip()
