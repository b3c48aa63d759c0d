"""Does the ledger say as many joules as the meter that it used? Trains for a while and integrates the meter beside it.

    nice python benchmarks/energy.py [--seconds 300]

Where this machine has no meter, files of RAPL's form stand in for it: a thread counts up a power that changes every
second, and the counter begins again several times. Then the figure is about the ledger's sums alone, and says so.
The independent integration reads the same files or the same library 20 times a second, by code of its own.
"""

import argparse
import ctypes
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from configs.compose import compose
from data.pipeline import prepare
from ledger.energy import Meter
from train import job
from train.metrics import meter_name
from train.run import run

RANGE_UJ = 5_000_000_000
"""50 seconds at 100 W."""


def simulate(root: Path, stop: threading.Event) -> None:
    """RAPL's files for one package, which ticks a hundred times a second with 20 to 180 W."""
    zone = root / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    counter_uj = RANGE_UJ // 2

    def write() -> None:
        beside = zone / "energy_uj.tmp"
        beside.write_text(f"{int(counter_uj) % RANGE_UJ}\n")
        os.replace(beside, zone / "energy_uj")

    def tick() -> None:
        nonlocal counter_uj
        rng, last_s = random.Random(1), time.monotonic()
        while not stop.is_set():
            watts = rng.uniform(20, 180)
            for _ in range(100):
                time.sleep(0.01)
                now_s = time.monotonic()
                counter_uj, last_s = counter_uj + watts * (now_s - last_s) * 1e6, now_s
                write()

    write()
    threading.Thread(target=tick, daemon=True).start()


class Beside(threading.Thread):
    """Integrates the first meter that it knows, 20 times a second."""

    def __init__(self, root: Path, source: str, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.root, self.joules, self.stop = root, 0.0, threading.Event()
        self.range_j, self.read = math.inf, self._rapl
        if source.startswith("NVML"):
            self.library, self.handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
            self.library.nvmlInit_v2()
            self.library.nvmlDeviceGetHandleByUUID(meter_name(device).encode(), ctypes.byref(self.handle))
            self.read = self._nvml
        elif source.startswith("RAPL"):
            zones = self.root.glob("sys/class/powercap/intel-rapl:*")
            self.zones = [z for z in zones if (z / "name").read_text().split("-")[0].strip() in ("package", "dram")]
            self.range_j = sum(int((z / "max_energy_range_uj").read_text()) for z in self.zones) / 1e6
            if len(self.zones) > 1:
                sys.exit("this script integrates RAPL with one zone alone")
        else:
            sys.exit(f"this script has no integration of its own for {source}")

    def _rapl(self) -> float:
        return sum(int((zone / "energy_uj").read_text()) for zone in self.zones) / 1e6

    def _nvml(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def run(self) -> None:
        last = self.read()
        while not self.stop.wait(0.05):
            now = self.read()
            self.joules += now - last if now >= last else now + self.range_j - last
            last = now


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=300)
    given = arguments.parse_args()
    has_gpu, stop = torch.cuda.is_available(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["cluster.device=cuda", "cluster.peak_tflops=989"] if has_gpu else []
        cfg = compose(
            [
                "experiment=smoke",
                f"cluster.scratch={folder}",
                "cluster.devices_per_node=1",
                "mixture.max_epochs=1e9",
                f"train.tokens={4096 * 10_000_000}",
                "train.log_every_steps=5",
                "train.validate_every_steps=40",
                "train.save_every_steps=30",
                "train.keep_checkpoints=1",
                *overrides,
            ]
        )
        root, device = Path("/"), torch.device("cuda" if has_gpu else "cpu")
        here = Meter([meter_name(device)]).sources["devices"]
        print(f"this machine: {here}")
        if here.startswith("GAP"):
            root = Path(folder) / "simulated"
            simulate(root, stop)
            print("SIMULATED: files that a thread counts up stand in for a meter; no energy was measured")
        source = Meter([meter_name(device)], root).sources["devices"]
        beside = Beside(root, source, device)

        # The run's own meter, but for where sysfs lies; and it ends when the time is over.
        job.Meter = partial(Meter, root=root)  # type: ignore[misc, assignment]
        ends_s = time.monotonic() + given.seconds
        job.JobClock.is_over = lambda _: time.monotonic() > ends_s  # type: ignore[method-assign]
        run_dir = Path(folder) / "runs/energy"
        corpus = prepare(cfg)
        (run_dir / "logs").mkdir(parents=True)
        ends_s = time.monotonic() + given.seconds
        beside.start()
        run(cfg, run_dir, corpus)
        beside.stop.set()
        stop.set()
        time.sleep(0.1)
        lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
        found = next(line["energy"]["devices"] for line in lines if line["event"] in ("train_stop", "train_end"))
    joules = found["kwh"] * 3.6e6
    print(f"meter: {found['meter']}, read for {found['metered_share']:.1%} of the time")
    print(
        f"ledger {joules:,.1f} J, integrated beside it {beside.joules:,.1f} J: off by {joules / beside.joules - 1:+.2%}"
    )
    print(f"{found['joules_per_token']:.3g} J a token, {'simulated' if root != Path('/') else 'measured'}")


if __name__ == "__main__":
    main()
