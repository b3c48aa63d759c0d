"""Kills a training run again and again, and compares what it ends with to a run that nobody touched.

    python benchmarks/chaos.py [--kills 100] [--seed 1]        as root, on Debian; `make chaos KILLS=100 SEED=1`

A job of two nodes is submitted once to the Slurm of tests/cluster. A schedule drawn from the seed then kills, at
random moments: one rank (SIGKILL), a rank while a checkpoint is being written, the batch script, or a whole node with
its daemon, which comes back a moment later. Nobody submits anything again. At the end the weights have to be those of
the undisturbed run bit by bit, and the hash over consumed samples too.

Of two kills in a row, one lets the run get further than it was: two starts without any progress are, by the rule of
marathon/stages.py, a run that stops.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.weights import list_checkpoints, read_manifest
from tests.cluster.rig import Rig, Shape

CHECKOUT = Path(__file__).parents[1]
SAVE_EVERY_STEPS = 4
MAX_STEPS_A_KILL = 9
"""The run has so many steps for each kill. A kill took 3.5 on average: the schedule asks for one to six beyond the
furthest, a checkpoint may be three away, and a moment's delay lets one or two through."""
KINDS = {"rank": 5, "checkpoint": 4, "start": 2, "batch": 1, "node": 1}
"""What is killed, and how often in proportion: a rank in mid-training, a rank in mid-checkpoint, a rank that is
starting, the batch script, a node."""
PATIENCE_S = 180.0
SMALL = Shape(
    name="small",
    nodes=("nid005001", "nid005002"),  # names that install.sh leads to this machine
    other_nodes="nid[005003-005004]",
    node="CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:none:1",
    devices_per_node=1,
    partitions=("PartitionName=small Nodes=ALL Default=YES MaxTime=1-00:00:00",),
    accounting=("add account project", "add user root account=project"),
)


class Chaos:
    """One run under fire."""

    def __init__(self, rig: Rig, kills: int, seed: int) -> None:
        self.rig, self.random, self.kills = rig, random.Random(seed), kills
        self.run = rig.root / "scratch" / "runs" / "chaos"
        self.furthest = 0
        self.done: Counter[str] = Counter()

    def __call__(self) -> None:
        script = str(CHECKOUT / "benchmarks/chaos.sh")
        arguments = settings(self.kills, "chaos")
        self.rig.submit("--account=project", "--nodes=2", script, *arguments, **environment(self.rig))
        previous, began_s = "start", time.monotonic()
        for number in range(self.kills):
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            if kind == previous == "start":
                kind = "rank"
            if kind != "start":
                goal = self.furthest + self.random.randint(1, 6)
                self.rig.wait_for(f"step {goal}", lambda goal=goal: self.step() >= goal, PATIENCE_S)
            getattr(self, f"kill_{kind}")()
            self.done[kind] += 1
            self.furthest, previous = max(self.furthest, self.step()), kind
            self.rig.wait_for("the end of the killed", lambda: not self.ranks(), PATIENCE_S)
            print(
                f"{time.monotonic() - began_s:5.0f} s: kill {number + 1}, {kind}, at step {self.furthest}", flush=True
            )
        self.rig.wait_for("the end of the run", self.is_over, PATIENCE_S + self.kills * MAX_STEPS_A_KILL)

    def kill_rank(self) -> None:
        time.sleep(self.random.uniform(0, 0.3))
        self.kill_one_of(self.ranks())

    def kill_checkpoint(self) -> None:
        writing = self.run / "checkpoints"
        while not any(writing.glob(".writing-*")) and self.ranks():
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.03))
        self.kill_one_of(self.ranks())

    def kill_start(self) -> None:
        self.rig.wait_for("a start", lambda: bool(self.ranks()), PATIENCE_S)
        time.sleep(self.random.uniform(0, 3))
        self.kill_one_of(self.ranks())

    def kill_batch(self) -> None:
        for job in self.rig.run("squeue", "-h", "-t", "RUNNING", "-o", "%A").stdout.split():
            self.rig.kill_batch_script(job)

    def kill_node(self) -> None:
        node = self.random.choice(self.rig.shape.nodes)
        self.rig.kill_node(node)
        time.sleep(1)
        self.rig.start_node(node)

    def kill_one_of(self, processes: list[int]) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError):  # the run was quicker
            os.kill(self.random.choice(sorted(processes)), signal.SIGKILL)

    def ranks(self) -> list[int]:
        """Processes that train."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().split(b"\0")
                if command[1:4] == [b"-m", b"marathon.stage", b"train"] and str(self.run).encode() in command:
                    found.append(int(process.name))
        return found

    def step(self) -> int:
        metrics = self.run / "metrics.jsonl"
        if not metrics.exists():
            return 0
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        return max((line["step"] for line in lines if line["kind"] == "train"), default=0)

    def is_over(self) -> bool:
        return not self.rig.run("squeue", "-h", check=False).stdout.strip()


def settings(kills: int, name: str) -> list[str]:
    steps = kills * MAX_STEPS_A_KILL + 10
    return [
        "experiment=smoke",
        f"name={name}",
        "cluster.devices_per_node=1",
        "cluster.nodes=2",
        "suite=bpb",
        "corpus.languages=[de,el,mt]",
        "tokenizer.vocab_size=1000",
        "mixture.max_epochs=1e9",
        f"train.tokens={steps * 1024}",
        "train.tokens_per_step=1024",
        "train.seq_len=128",
        "train.log_every_steps=1",
        f"train.save_every_steps={SAVE_EVERY_STEPS}",
        f"train.validate_every_steps={steps}",
        "train.keep_checkpoints=2",
    ]


def environment(rig: Rig) -> dict[str, str]:
    return {
        "MARATHON_HOME": str(CHECKOUT),
        "MARATHON_SCRATCH": str(rig.root / "scratch"),
        "MARATHON_CONTAINER": "none",
        "MARATHON_PYTHON": sys.executable,
        "MASTER_PORT": str(free_port()),  # for two of these beside each other: both begin with job 1
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def undisturbed(rig: Rig, kills: int) -> Path:
    """The same run on two processes of this machine."""
    arguments = [*settings(kills, "whole"), "cluster.nodes=1", "cluster.devices_per_node=2"]
    for stage in ("data", "train"):
        command = [sys.executable, "-m", "marathon.cli", stage, *arguments]
        subprocess.run(command, env={**os.environ, **environment(rig)}, check=True, capture_output=True, cwd=CHECKOUT)
    return rig.root / "scratch" / "runs" / "whole"


def differences(run: Path, whole: Path) -> list[str]:
    found, expected = (read_manifest(list_checkpoints(path)[-1]) for path in (run, whole))
    wrong = [f"{key} differs" for key in ("files",) if found[key] != expected[key]]
    for key in ("step", "order_hash", "consumed"):
        if found["progress"][key] != expected["progress"][key]:
            wrong.append(f"{key}: {found['progress'][key]}, undisturbed {expected['progress'][key]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    subprocess.run([CHECKOUT / "tests/cluster/install.sh"], check=True, stdout=subprocess.DEVNULL)
    rig = Rig(SMALL)
    try:
        rig.start()
        whole = undisturbed(rig, given.kills)
        chaos, began = Chaos(rig, given.kills, given.seed), time.monotonic()
        try:
            chaos()
            wrong = differences(chaos.run, whole)
        except (RuntimeError, IndexError) as error:
            wrong = [str(error)]
        took_s = time.monotonic() - began
        log = "".join(path.read_text() for path in sorted((rig.root / "submit").glob("*.log")))
        starts = log.count("== marathon: job ")
        killed = ", ".join(f"{n} {kind}" for kind, n in chaos.done.items())
        print(f"{sum(chaos.done.values())} kills ({killed}), {starts} starts, {took_s:.0f} s, seed {given.seed}")
        if wrong:
            print("\n".join(wrong), f"--- end of the log\n{log[-4000:]}", sep="\n")
            return 1
        step = read_manifest(list_checkpoints(chaos.run)[-1])["progress"]
        print(f"final weights bit-identical, sample hash {step['order_hash']} equal, 0 manual steps")
        return 0
    finally:
        rig.stop()


if __name__ == "__main__":
    sys.exit(main())
