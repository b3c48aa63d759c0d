"""Facts of the host: software, hardware, commit. Written into the ledger by every stage."""

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from ledger.record import gap

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
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "processor": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


@functools.cache
def commit() -> str:
    """Commit of Marathon's own code, with `+changed` where the work tree differs from it."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return gap("installed without a git work tree")
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changed" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError) as error:
        return gap(f"git does not answer: {error}")


def container() -> str:
    """Image this process runs in, as the container runtime or the job script tells it."""
    told = (os.environ.get(name) for name in ("MARATHON_IMAGE", "SINGULARITY_CONTAINER", "APPTAINER_CONTAINER"))
    return next(filter(None, told), gap("no container announced itself"))


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError as error:
        return gap(str(error))
    return found[1] if found else platform.machine()
