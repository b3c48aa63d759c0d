"""Starts the processes of a stage on this machine, as srun or torchrun do on a cluster."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from configs.schema import RunConfig
from marathon.stages import ON_ALL_DEVICES, inputs_of, is_done

GRACE_S = 15
"""Time for the other processes to end by themselves once one has failed, and again after being asked."""
LAST_LINES = 20
Process = subprocess.Popen[bytes]


def launch(stage: str, cfg: RunConfig, run_dir: Path) -> int:
    """Runs a stage to its end, unless it is complete, and returns its exit status: the first that is not 0.

    Rank 0 speaks on this terminal; the others write to RUN/logs, and what one of them said last is shown
    when it fails. SIGINT and SIGTERM are passed on, and the stage is waited for.
    """
    if is_done(stage, inputs_of(stage, cfg, run_dir), run_dir):
        print(f"{stage}: complete, skipped")
        return 0
    n_processes = cfg.cluster.devices_per_node if stage in ON_ALL_DEVICES else 1
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    logs = [run_dir / "logs" / f"{stage}-rank-{rank}.log" for rank in range(n_processes)]
    command = [sys.executable, "-m", "marathon.stage", stage, str(run_dir)]
    told = {"WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes, "OMP_NUM_THREADS": cfg.cluster.cpus_per_device}
    told |= {"MASTER_PORT": _free_port(), "PYTHONSAFEPATH": 1}
    processes = [_start(command, {**told, "RANK": rank, "LOCAL_RANK": rank}, log) for rank, log in enumerate(logs)]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for rank, process in enumerate(processes):
        if process.returncode == status < 0:
            name = signal.Signals(-status).name
            print(f"rank {rank} was ended by {name}: the same line goes on from the last checkpoint", file=sys.stderr)
        if rank and (process.returncode not in (0, status) or (status and not processes[0].returncode)):
            last_lines = logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            if last_lines:
                print(f"--- end of {logs[rank]}", *last_lines, sep="\n", file=sys.stderr)
    return status


def _start(command: list[str], told: dict[str, int], log: Path) -> Process:
    variables = {name: str(value) for name, value in told.items()}
    with nullcontext() if told["RANK"] == 0 else log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", **variables},
            stdout=output,
            stderr=output,
            # The terminal's Ctrl-C goes to us alone; we pass it on once.
            start_new_session=True,
            preexec_fn=_asked_to_stop_with_parent,
        )


def _asked_to_stop_with_parent() -> None:
    """Where the command is killed, its processes get SIGTERM: they save, and do not go on unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(processes: list[Process]) -> int:
    """Waits for all; once one fails, the rest get a moment, then a signal, then are killed."""
    deadline_s, harder = float("inf"), [Process.terminate, Process.kill]
    while running := [process for process in processes if process.poll() is None]:
        if deadline_s == float("inf") and any(process.returncode for process in processes):
            deadline_s = time.monotonic() + GRACE_S
        if time.monotonic() > deadline_s and harder:
            end = harder.pop(0)
            for process in running:
                end(process)
            deadline_s += GRACE_S
        time.sleep(0.05)
    return next((process.returncode for process in processes if process.returncode), 0)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
