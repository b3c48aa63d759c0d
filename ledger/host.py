"""Facts of the host: software, hardware, commit. Written into the ledger by every stage."""

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ledger.record import gap

DISTRIBUTIONS = (
    "marathon-llm",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "accelerate",
    "lm_eval",
    "hydra-core",
    "numpy",
)


@functools.cache
def software() -> dict[str, str]:
    """Versions of Python and of what decides results; a distribution that is absent is a GAP."""
    return {"python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}}


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
    return (
        os.environ.get("MARATHON_IMAGE")
        or os.environ.get("SINGULARITY_CONTAINER")
        or os.environ.get("APPTAINER_CONTAINER")
        or gap("no container announced itself")
    )


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return gap("not installed")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return gap(str(error))
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
