"""Starts the processes of a stage on this machine, as srun or torchrun do on a cluster."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from configs.schema import RunConfig
from marathon.stages import ON_ALL_DEVICES

GRACE_S = 15
"""Time for the other processes to end by themselves once one has failed, and again after being asked."""
LAST_LINES = 20


def launch(stage: str, cfg: RunConfig, run_dir: Path) -> int:
    """Runs a stage to its end and returns its exit status: the first that is not 0.

    Rank 0 speaks on this terminal; the others write to RUN/logs, and what one of them said last is shown
    when it fails. SIGINT and SIGTERM are passed on, and the stage is waited for.
    """
    n_processes = cfg.cluster.devices_per_node if stage in ON_ALL_DEVICES else 1
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    port, threads = _free_port(), cfg.cluster.cpus_per_device
    processes = [_start(stage, run_dir, rank, n_processes, threads, port) for rank in range(n_processes)]

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
        if (rank and process.returncode not in (0, status)) or (rank and status and not processes[0].returncode):
            _show_end(_log_path(run_dir, stage, rank))
    return status


def _start(stage: str, run_dir: Path, rank: int, world_size: int, threads: int, port: int) -> "subprocess.Popen[bytes]":
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    told |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": 1}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}}
    output: IO[bytes] | None = None if rank == 0 else open(_log_path(run_dir, stage, rank), "wb")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-m", "marathon.stage", stage, str(run_dir)],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        # The terminal's Ctrl-C goes to us alone; we pass it on once.
        start_new_session=True,
        preexec_fn=_asked_to_stop_with_parent,
    )


def _asked_to_stop_with_parent() -> None:
    """Where the command is killed, its processes get SIGTERM: they save, and do not go on unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(processes: list["subprocess.Popen[bytes]"]) -> int:
    """Waits for all; once one fails, the rest get a moment, then a signal, then are killed."""
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            _end([process for process in processes if process.returncode is None])
        time.sleep(0.05)
    return next((process.returncode for process in processes if process.returncode), 0)


def _end(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _log_path(run_dir: Path, stage: str, rank: int) -> Path:
    return run_dir / "logs" / f"{stage}-rank-{rank}.log"


def _show_end(path: Path) -> None:
    if path.exists() and (lines := path.read_text(encoding="utf-8", errors="replace").splitlines()):
        print(f"--- end of {path}", *lines[-LAST_LINES:], sep="\n", file=sys.stderr)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
