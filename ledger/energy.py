"""Joules of devices, of whole nodes and of the facility, by the counters that a node has: docs/speed.md."""

import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ledger.record import gap

BOUNDARIES = ("devices", "nodes")
SAMPLE_EVERY_S = 10.0
"""RAPL's counters may begin again every four minutes: 65 kJ at 280 W."""
HIGHEST_W = 2000.0
"""What no processor draws: a counter that would have gone round with more than this was reset."""


class Counter:
    """Grows with the energy used, and begins again at 0: after `range_j`, or when it is reset."""

    def __init__(self, read_j: Callable[[], float], range_j: float = math.inf) -> None:
        self.read_j, self.range_j, self.last_j, self.last_s = read_j, range_j, read_j(), time.monotonic()

    def gained_j(self) -> float:
        """Joules since the last call; NaN where the counter was reset meanwhile, or could not be read."""
        last_s, last_j, self.last_s, self.last_j = self.last_s, self.last_j, time.monotonic(), math.nan
        with suppress(OSError, ValueError):
            self.last_j = self.read_j()
        gained_j = self.last_j - last_j
        if gained_j < 0:
            gained_j += self.range_j
            return gained_j if gained_j <= HIGHEST_W * (self.last_s - last_s) else math.nan
        return gained_j


class Meter:
    """What one process reads of its node, in a thread every ten seconds and when asked; for no devices, nothing.

    Devices of this job are told by UUID (NVIDIA) or PCI address (AMD), a CPU is "". `root` is where `sys` lies.
    `sources` names the meter of each boundary, or is its GAP.
    """

    def __init__(self, devices: Sequence[str], root: Path = Path("/")) -> None:
        found = {b: _first_that_counts(b, devices, root) for b in BOUNDARIES if devices}
        self.sources = {boundary: source for boundary, (source, _) in found.items()}
        self._counters = {boundary: counters for boundary, (_, counters) in found.items()}
        self._gained_j, self._lock, self._read_s = dict.fromkeys(BOUNDARIES, 0.0), threading.Lock(), time.monotonic()
        threading.Thread(target=self._sample_on, name="energy", daemon=True).start()

    def read(self) -> tuple[float, list[float]]:
        """Seconds since the last reading, and joules by boundary, NaN where they are not known."""
        with self._lock:
            self._sample()
            before_s, self._read_s = self._read_s, time.monotonic()
            gained_j, self._gained_j = self._gained_j, dict.fromkeys(BOUNDARIES, 0.0)
        return self._read_s - before_s, list(gained_j.values())

    def _sample_on(self) -> None:
        while True:
            time.sleep(SAMPLE_EVERY_S)
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        for boundary, counters in self._counters.items():
            self._gained_j[boundary] += sum(counter.gained_j() for counter in counters) if counters else math.nan


@dataclass
class Spent:
    """Joules of a run by boundary, and for how many of its seconds they were read; stands in its checkpoints."""

    seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOUNDARIES, 0.0))
    metered_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOUNDARIES, 0.0))

    def add(self, seconds: float, joules: Sequence[float]) -> None:
        """Joules of all nodes by boundary; where they are NaN, these seconds were not metered."""
        self.seconds += seconds
        for boundary, gained_j in zip(BOUNDARIES, joules, strict=True):
            if math.isfinite(gained_j):
                self.joules[boundary] += gained_j
                self.metered_s[boundary] += seconds

    def record(self, tokens: int, meters: dict[str, str], pue: float) -> dict[str, dict[str, Any]]:
        """What ledger, card and report say of each boundary; joules a token are those of the time that was metered."""
        found: dict[str, dict[str, Any]] = {}
        for name, boundary, factor in (("devices", "devices", 1), ("nodes", "nodes", 1), ("facility", "nodes", pue)):
            share, joules = self.metered_s[boundary] / (self.seconds or 1), self.joules[boundary] * factor
            rate = {"joules_per_token": joules / (tokens * share or 1), "metered_share": share}
            missing = "the cluster's YAML states no PUE" if share else meters[boundary].removeprefix("GAP: ")
            facts = {"kwh": joules / 3.6e6, **rate, "meter": meters[boundary]}
            found[name] = facts if share and factor else {"kwh": gap(missing)}
        return found


def _first_that_counts(boundary: str, devices: Sequence[str], root: Path) -> tuple[str, list[Counter]]:
    cray = root / "sys/cray/pm_counters"
    tries: dict[str, Iterator[Counter]] = {"Cray pm_counters, whole nodes": _pm_counters(cray, "energy")}
    if boundary == "devices" and devices[0]:
        tries = {"Cray pm_counters, modules of accelerators": _pm_counters(cray, "accel*_energy")}
        tries |= {"NVML, boards": _nvml(devices), "amdgpu, modules": _amdgpu(devices, root)}
    elif boundary == "devices":
        tries = {"Cray pm_counters, processors and memory": _pm_counters(cray, "cpu_energy", "memory_energy")}
        tries |= {"RAPL, processors and memory": _rapl(root)}
    reasons = []
    for source, find in tries.items():
        try:
            counters = list(find)
            if any(counter.last_j for counter in counters):
                return source, counters
            reasons.append(f"{source}: not there, or stands at 0")
        except (OSError, ValueError, AttributeError) as error:
            reasons.append(f"{source}: {error}")
    return gap("no meter can be read: " + "; ".join(reasons)), []


def _pm_counters(folder: Path, *names: str) -> Iterator[Counter]:
    """Files of a line such as `8412 J 1670000000 us`, of the whole node, whoever uses it."""
    for path in (path for name in names for path in sorted(folder.glob(name))):
        yield Counter(partial(_number, path))


def _rapl(root: Path) -> Iterator[Counter]:
    """Packages and their memory, in microjoules; the zones of cores lie within packages, psys around them."""
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if (zone / "name").read_text().startswith(("package", "dram")):
            yield Counter(partial(_number, zone / "energy_uj", 1e-6), _number(zone / "max_energy_range_uj", 1e-6))


def _number(path: Path, unit: float = 1.0) -> float:
    return float(path.read_text().split()[0]) * unit


def _nvml(devices: Sequence[str]) -> Iterator[Counter]:
    """Millijoules of a board since its driver was loaded, from Volta on."""
    library = ctypes.CDLL("libnvidia-ml.so.1")

    def read_j(handle: ctypes.c_void_p) -> float:
        millijoules = ctypes.c_ulonglong()
        if status := library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError(f"nvmlDeviceGetTotalEnergyConsumption returns {status}")
        return millijoules.value / 1e3

    library.nvmlInit_v2()
    for uuid in devices:
        handle = ctypes.c_void_p()  # stays empty where something fails, which the reading tells
        library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        yield Counter(partial(read_j, handle))


def _amdgpu(devices: Sequence[str], root: Path) -> Iterator[Counter]:
    """The driver's table gpu_metrics (linux: kgd_pp_interface.h), units of 2^-16 J.

    Of an MI250X the first GCD counts the module and the second stands at 0: a sum has each module once.
    """

    def read_j(path: Path) -> float:
        kind, version = (table := path.read_bytes())[2:4]
        at = {5: 88, 6: 16}.get(version, 24)
        units = int.from_bytes(table[at : at + 8], "little")
        if kind != 1 or not 1 <= version <= 8 or units == 2**64 - 1:
            raise ValueError(f"{path} has version {kind}.{version}, or no energy")
        return units / 2**16

    for address in devices:
        yield Counter(partial(read_j, root / "sys/bus/pci/devices" / address / "gpu_metrics"))
