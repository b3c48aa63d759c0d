"""Meters: read where they are there, in order, once; turns and resets of counters told apart; a GAP where there is none."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ledger.energy import Counter, Meter, record

GCDS = ["0000:c1:00.0", "0000:c6:00.0"]
NOWHERE = "GAP: no meter can be read: "


def rapl(root, name, uj, range_uj=65_532_610_987, zone="intel-rapl:0"):
    folder = root / "sys/class/powercap" / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{content}\n")
    return folder / "energy_uj"


def cray(root, **joules):
    folder = root / "sys/cray/pm_counters"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in joules.items():
        (folder / name).write_text(f"{value} J 1670000000000000 us\n")


def amdgpu(root, address, joules, version=3, at=24, units=None):
    table = bytearray(b"\xab" * 120)
    table[:4] = (120).to_bytes(2, "little") + bytes([1, version])
    table[at : at + 8] = (int(joules * 2**16) if units is None else units).to_bytes(8, "little")
    path = root / "sys/bus/pci/devices" / address / "gpu_metrics"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(table)


def gained(meter):
    return dict(zip(("devices", "nodes"), meter.read()[1], strict=True))


def test_a_machine_without_a_meter_says_which_were_looked_for(tmp_path):
    on_cpu, with_gpu = Meter([""], tmp_path), Meter(["GPU-0"], tmp_path)
    assert all(source.startswith(NOWHERE) for source in (*on_cpu.sources.values(), *with_gpu.sources.values()))
    assert "RAPL" in on_cpu.sources["devices"] and "NVML" not in on_cpu.sources["devices"]
    assert all(name in with_gpu.sources["devices"] for name in ("NVML, boards: ", "amdgpu, modules: "))
    assert "RAPL" not in with_gpu.sources["devices"], "a processor is no accelerator"
    assert all(math.isnan(joules) for joules in on_cpu.read()[1])
    assert Meter([], tmp_path).read()[1] == [0.0, 0.0], "a process that reads nothing adds nothing"


def test_cray_counts_nodes_and_modules_and_comes_first(tmp_path):
    cray(tmp_path, energy=1000, cpu_energy=100, memory_energy=50, accel0_energy=300, accel1_energy=400, power=9)
    rapl(tmp_path, "package-0", 5)
    amdgpu(tmp_path, GCDS[0], 7.0)
    accelerators, processors = Meter(GCDS, tmp_path), Meter([""], tmp_path)
    cray(tmp_path, energy=1010, cpu_energy=103, memory_energy=52, accel0_energy=301, accel1_energy=403, power=9)
    assert gained(accelerators) == {"devices": 4.0, "nodes": 10.0}
    assert gained(processors) == {"devices": 5.0, "nodes": 10.0}
    assert gained(processors) == {"devices": 0.0, "nodes": 0.0}
    assert "Cray" in accelerators.sources["devices"] and "whole nodes" in accelerators.sources["nodes"]


def test_rapl_counts_packages_and_memory_through_every_turn(tmp_path):
    rapl(tmp_path, "core", 5, zone="intel-rapl:0:0")
    rapl(tmp_path, "psys", 5, zone="intel-rapl:1")
    dram = rapl(tmp_path, "dram", 3_000_000, zone="intel-rapl:0:1")
    energy = rapl(tmp_path, "package-0", 19_900_000, range_uj=20_000_000)
    meter, total_uj, joules = Meter([""], tmp_path), 19_900_000, 0.0
    for path in (tmp_path / "sys/class/powercap/intel-rapl:0:0", tmp_path / "sys/class/powercap/intel-rapl:1"):
        (path / "energy_uj").write_text("9000000000\n")
    dram.write_text("4000000\n")
    for step_uj in (300_000, 7_000_000, 12_800_000, 19_999_999, 1) * 2:
        total_uj += step_uj
        energy.write_text(f"{total_uj % 20_000_000}\n")
        joules += gained(meter)["devices"]
    assert joules == pytest.approx(1 + total_uj / 1e6 - 19.9)


@pytest.mark.parametrize("range_j", [math.inf, 262_144.0])
def test_a_reset_is_not_known_and_what_comes_after_is(range_j):
    now_j = [1000.0]
    counter = Counter(lambda: now_j[0], range_j)
    for now_j[0], expected in ((1004.0, 4.0), (5.0, math.nan), (7.0, 2.0)):
        assert counter.gained_j() == pytest.approx(expected, nan_ok=True)


def test_a_counter_that_cannot_be_read_for_a_while_is_not_known_for_that_while(tmp_path):
    energy = rapl(tmp_path, "package-0", 1_000_000)
    meter = Meter([""], tmp_path)
    energy.rename(energy.with_suffix(".away"))
    assert math.isnan(gained(meter)["devices"])
    energy.with_suffix(".away").rename(energy)
    assert math.isnan(gained(meter)["devices"]), "nobody knows where it stood in between"
    energy.write_text("3000000\n")
    assert gained(meter)["devices"] == pytest.approx(2.0)


@contextlib.contextmanager
def as_a_user():
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_counter_for_root_alone_is_a_gap_that_says_so():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder hides the path as well
        os.chmod(folder, 0o755)
        os.chmod(rapl(Path(folder), "package-0", 1), 0o400 if os.geteuid() == 0 else 0)
        with as_a_user():
            source = Meter([""], Path(folder)).sources["devices"]
    assert source.startswith(NOWHERE) and "RAPL" in source and "Permission denied" in source


@pytest.mark.parametrize(("version", "at"), [(1, 24), (3, 24), (4, 24), (5, 88), (6, 16), (7, 24), (8, 24)])
def test_amd_counts_a_module_of_two_gcds_once(tmp_path, version, at):
    amdgpu(tmp_path, GCDS[0], 500.0, version, at)
    amdgpu(tmp_path, GCDS[1], 0.0, version, at)
    meter = Meter(GCDS, tmp_path)
    amdgpu(tmp_path, GCDS[0], 512.5, version, at)
    assert meter.sources["devices"] == "amdgpu, modules"
    assert gained(meter)["devices"] == pytest.approx(12.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 9}, "version 1.9"),
        ({"units": 2**64 - 1}, "no energy"),
        ({"joules": 0.0}, "stands at 0"),  # the second GCD of an MI250X alone
    ],
)
def test_amd_without_energy_is_a_gap(tmp_path, change, reason):
    amdgpu(tmp_path, GCDS[1], **{"joules": 5.0, **change})
    assert reason in Meter([GCDS[1]], tmp_path).sources["devices"]


NVML = """
#include <stdlib.h>
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)(0x7f0000000000 + (uuid[4] - '0'));
    return strncmp(uuid, "GPU-", 4) ? 2 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    static unsigned long long ticks = 0;
    if (getenv("TOO_OLD")) return 3;
    *millijoules = 5000000000000ULL + 1000 * ++ticks + ((unsigned long long)device - 0x7f0000000000);
    return 0;
}
"""
ASK = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
from ledger.energy import Meter
meter = Meter(["GPU-1", "GPU-2"])
print(meter.sources["devices"], meter.read()[1][0], sep="|")
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("variables", [{}, {"TOO_OLD": "1"}], ids=["read", "not supported"])
def test_nvml_is_called_as_its_header_says(tmp_path, variables):
    library, source = tmp_path / "libnvidia-ml.so.1", tmp_path / "nvml.c"
    source.write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", library, source], check=True)
    told = subprocess.check_output([sys.executable, "-c", ASK, library], text=True, env={**os.environ, **variables})
    meter, joules = told.strip().split("|")
    if variables:
        assert "nvmlDeviceGetTotalEnergyConsumption returns 3" in meter and joules == "nan"
    else:
        assert (meter, float(joules)) == ("NVML, boards", 4.0)  # two boards, each two calls further


def test_the_record_has_three_boundaries_and_no_guess():
    meters = {"devices": "NVML, boards", "nodes": "Cray pm_counters, whole nodes"}
    found = record([7.2e6, 7.2e6], [100.0, 50.0, 100.0], 1000, meters, pue=1.5)
    assert found["devices"]["kwh"] == 2 and found["devices"]["joules_per_token"] == pytest.approx(7200)
    assert found["nodes"]["kwh"] == 2 and found["nodes"]["metered_share"] == 0.5
    assert found["nodes"]["joules_per_token"] == pytest.approx(14400), "half of the tokens were metered"
    assert found["facility"]["kwh"] == pytest.approx(3)
    no_pue = record([1.0, 1.0], [9.0, 9.0, 9.0], 1000, meters, pue=0)
    assert no_pue["facility"] == {"kwh": "GAP: the cluster's YAML states no PUE"}
    unread = record([0.0, 0.0], [0.0, 0.0, 9.0], 1000, {"devices": "GAP: no driver", "nodes": "GAP: none"}, pue=1.5)
    assert unread == {
        "devices": {"kwh": "GAP: no driver"},
        "nodes": {"kwh": "GAP: none"},
        "facility": {"kwh": "GAP: none"},
    }
