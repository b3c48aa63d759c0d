"""Joules of devices, of whole nodes and of the facility, by the counters that a node has: docs/speed.md."""

import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ledger.record import gap

BOUNDARIES = ("devices", "nodes")
SAMPLE_EVERY_S, MOST_J = 10.0, 20_000.0
"""RAPL's counters may begin again every four minutes, 65 kJ at 280 W; between two readings no processor takes 20 kJ."""


class Counter:
    """Grows with the energy used, and begins again at 0: after `range_j`, or when it is reset."""

    def __init__(self, read_j: Callable[[], float], range_j: float = math.inf) -> None:
        self.read_j, self.range_j, self.last_j = read_j, range_j, read_j()

    def gained_j(self) -> float:
        """Joules since the last call; NaN where the counter was reset meanwhile, or could not be read."""
        last_j, self.last_j = self.last_j, math.nan
        with suppress(OSError, ValueError):
            self.last_j = self.read_j()
        gained_j = self.last_j - last_j
        if gained_j < 0:
            gained_j += self.range_j
            return gained_j if gained_j <= MOST_J else math.nan
        return gained_j


class Meter:
    """What one process reads of its node, in a thread and when asked; `sources`: each boundary's meter, or its GAP.

    Devices of this job are told by UUID (NVIDIA) or PCI address (AMD), a CPU is "". `root` is where `sys` lies.
    """

    def __init__(self, devices: Sequence[str], root: Path = Path("/")) -> None:
        self._found = {b: _first_that_counts(_meters(b, devices, root)) for b in BOUNDARIES if devices}
        self.sources = {boundary: source for boundary, (source, _) in self._found.items()}
        self._gained_j, self._lock, self._read_s = dict.fromkeys(BOUNDARIES, 0.0), threading.Lock(), time.monotonic()
        threading.Thread(target=self._sample_on, name="energy", daemon=True).start()

    def read(self) -> tuple[float, list[float]]:
        """Seconds since the last reading, and joules by boundary, NaN where they are not known."""
        self._sample()
        with self._lock:
            before_s, self._read_s = self._read_s, time.monotonic()
            gained_j, self._gained_j = self._gained_j, dict.fromkeys(BOUNDARIES, 0.0)
        return self._read_s - before_s, list(gained_j.values())

    def _sample(self) -> None:
        with self._lock:
            for boundary, (_, counters) in self._found.items():
                self._gained_j[boundary] += sum(c.gained_j() for c in counters) if counters else math.nan

    def _sample_on(self) -> None:
        while True:
            time.sleep(SAMPLE_EVERY_S)
            self._sample()


def record(joules: Sequence[float], metered_s: Sequence[float], tokens: int, meters: dict[str, str], pue: float) -> Any:
    """What ledger, card and report say of each boundary; `metered_s` ends with all seconds of the run."""
    found: dict[str, dict[str, Any]] = {}
    for name, at, factor in (("devices", 0, 1.0), ("nodes", 1, 1.0), ("facility", 1, pue)):
        meter, spent_j, share = meters[BOUNDARIES[at]], joules[at] * factor, metered_s[at] / (metered_s[-1] or 1.0)
        missing = "the cluster's YAML states no PUE" if share else meter.removeprefix("GAP: ")
        facts = {"joules_per_token": spent_j / (tokens * share or 1), "metered_share": share, "meter": meter}
        found[name] = {"kwh": spent_j / 3.6e6, **facts} if share and factor else {"kwh": gap(missing)}
    return found


def _first_that_counts(meters: dict[str, Iterable[Counter]]) -> tuple[str, list[Counter]]:
    reasons = []
    for source, found in meters.items():
        try:
            counters = list(found)
            if any(counter.last_j for counter in counters):
                return source, counters
            reasons.append(f"{source}: not there, or stands at 0")
        except (OSError, ValueError, AttributeError) as error:
            reasons.append(f"{source}: {error}")
    return gap("no meter can be read: " + "; ".join(reasons)), []


def _meters(boundary: str, devices: Sequence[str], root: Path) -> dict[str, Iterable[Counter]]:
    """In the order in which they are tried; pm_counters are of the whole node, whoever uses it."""
    cray = root / "sys/cray/pm_counters"
    if boundary == "nodes":
        return {"Cray pm_counters, whole nodes": map(_file, cray.glob("energy"))}
    if devices[0]:
        modules = {"Cray pm_counters, modules of accelerators": map(_file, cray.glob("accel*_energy"))}
        return {**modules, "NVML, boards": _nvml(devices), "amdgpu, modules": _amdgpu(devices, root)}
    cpu = map(_file, [*cray.glob("cpu_energy"), *cray.glob("memory_energy")])
    return {"Cray pm_counters, processors and memory": cpu, "RAPL, processors and memory": _rapl(root)}


def _file(path: Path, unit: float = 1.0, range_j: float = math.inf) -> Counter:
    return Counter(lambda: float(path.read_text().split()[0]) * unit, range_j)


def _rapl(root: Path) -> Iterator[Counter]:
    for zone in (root / "sys/class/powercap").glob("intel-rapl:*"):
        if (zone / "name").read_text().startswith(("package", "dram")):  # cores lie within packages, psys around them
            yield _file(zone / "energy_uj", 1e-6, float((zone / "max_energy_range_uj").read_text()) / 1e6)


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
    """The driver's table gpu_metrics (linux: kgd_pp_interface.h); a GCD whose module another counts stands at 0."""

    def read_j(path: Path) -> float:
        kind, version = (table := path.read_bytes())[2:4]
        at = {5: 88, 6: 16}.get(version, 24)
        units = int.from_bytes(table[at : at + 8], "little")
        if kind != 1 or not 1 <= version <= 8 or units == 2**64 - 1:
            raise ValueError(f"{path} has version {kind}.{version}, or no energy")
        return units / 2**16

    for address in devices:
        yield Counter(partial(read_j, root / "sys/bus/pci/devices" / address / "gpu_metrics"))
