"""A cluster for each file of tests; without root they are skipped, without Slurm it is installed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rig import LEONARDO, LUMI, Rig, Shape

CHECKOUT = Path(__file__).parents[2]
SMALL = (
    "experiment=smoke",
    "cluster.device=cpu",
    "cluster.cpus_per_device=1",
    "schedule.warmup_steps=1",
    "suite.bootstrap_samples=10",
)
"""The smoke experiment on processes instead of devices, a few steps of it."""
QUESTIONS = ("suite.tasks=[agreement]", "suite.max_items_per_language=2")
"""For one of the clusters: sixteen ranks on two cores take minutes to load transformers and lm-eval."""


@pytest.fixture(scope="session")
def installed() -> None:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own needs root")
    subprocess.run([CHECKOUT / "tests/cluster/install.sh"], check=True)


def started(shape: Shape) -> Iterator[Rig]:
    rig = Rig(shape)
    try:
        rig.start()
        yield rig
    finally:
        rig.stop()


@pytest.fixture(scope="module")
def lumi(installed: None) -> Iterator[Rig]:
    yield from started(LUMI)


@pytest.fixture(scope="module")
def leonardo(installed: None) -> Iterator[Rig]:
    yield from started(LEONARDO)


def environment(rig: Rig) -> dict[str, str]:
    """What a user exports to run without a container, on loopback."""
    return {
        "MARATHON_SCRATCH": str(rig.root / "scratch"),
        "MARATHON_CONTAINER": "none",
        "MARATHON_PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
