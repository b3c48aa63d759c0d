"""The processes of a stage, `python -m marathon.stage STAGE RUN`: each of them, and `launch`, which starts them here.

Job scripts start them in the same way, once in all or once a device, so a run is the same wherever it runs.
"""

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

from configs.compose import load
from configs.errors import EXIT_MISTAKE, EXIT_UNFINISHED, UserError
from configs.schema import RunConfig
from data.files import write_whole
from ledger.record import Ledger
from marathon.choices import commands
from marathon.stages import CHECKPOINTS, inputs_of, is_done, mark_done, note_start, prepared_corpus

GRACE_S = 15  # for the other processes to end by themselves once one has failed, and again after being asked
DISK_TROUBLE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota (lfs quota, saldo, lumi-workspaces)",
    errno.EROFS: "have the file system made writable",
}
"""What only a person can mend, and how; any other failure of a file system may pass with a new start."""


def launch(stage: str, cfg: RunConfig, run_dir: Path) -> int:
    """Runs a stage to its end, unless it is complete, and returns its exit status: the first that is not 0.

    Rank 0 speaks on this terminal; the others write to RUN/logs, whose end is shown when they fail.
    """
    if is_done(stage, inputs_of(stage, cfg, run_dir), run_dir):
        print(f"{stage}: complete, skipped", flush=True)
        return 0
    n_processes = cfg.cluster.devices_per_node if stage in ("train", "eval") else 1
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    logs = [run_dir / "logs" / f"{stage}-rank-{rank}.log" for rank in range(n_processes)]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # a free one
    told = {"MASTER_PORT": port, "OMP_NUM_THREADS": cfg.cluster.cpus_per_device, "PYTHONSAFEPATH": 1}
    told |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), n_processes)
    processes = []
    for rank, log in enumerate(logs):
        variables = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with log.open("wb") if rank else nullcontext() as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "marathon.stage", stage, str(run_dir)],
                env={**os.environ, "MASTER_ADDR": "127.0.0.1", **variables},
                stdout=output,
                stderr=output,
                # The terminal's Ctrl-C goes to us alone; we pass it on once.
                start_new_session=True,
                # PR_SET_PDEATHSIG: where we are killed, our processes get SIGTERM, save, and do not go on unseen.
                preexec_fn=partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM),
            )
        processes.append(process)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in processes:
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
        is_untold = rank and (process.returncode not in (0, status) or (status and not processes[0].returncode))
        if is_untold and (lines := logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()):
            print(f"--- end of {logs[rank]}", *lines[-20:], sep="\n", file=sys.stderr)
    return status


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; once one fails, the rest get a moment, then a signal, then are killed."""
    deadline_s, harder = float("inf"), [signal.SIGTERM, signal.SIGKILL]
    while running := [process for process in processes if process.poll() is None]:
        if deadline_s == float("inf") and any(process.returncode for process in processes):
            deadline_s = time.monotonic() + GRACE_S
        if time.monotonic() > deadline_s and harder:
            for process in running:
                process.send_signal(harder[0])
            harder, deadline_s = harder[1:], deadline_s + GRACE_S
        time.sleep(0.05)
    return next((process.returncode for process in processes if process.returncode), 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs a stage unless it is done; returns the exit status."""
    stage, run = sys.argv[1:] if arguments is None else arguments
    run_dir, is_first = Path(run), _rank() == 0
    try:
        cfg = load(run_dir / "config.yaml")
        inputs = inputs_of(stage, cfg, run_dir)
        if is_done(stage, inputs, run_dir):
            if is_first:
                print(f"{stage}: complete, skipped", flush=True)
            return 0
        if is_first:
            print(f"{stage}: {commands()[stage]['line']}", flush=True)
            note_start(stage, run_dir)
        outputs = run_stage(stage, cfg, run_dir)
        if is_first and outputs is not None:
            mark_done(stage, inputs, run_dir, outputs)
        if is_first:
            from marathon.report import write_report

            try:
                write_report(run_dir)
            except Exception:  # a rendering of the run: that it cannot be drawn must not fail what it is about
                print(f"the report could not be written:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return EXIT_UNFINISHED if outputs is None else 0
    except UserError as error:
        mistake = error
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        found = f"{error.filename or run_dir}: {error.strerror}"
        rule = f"a run writes under {run_dir}; what it has saved is whole"
        mistake = UserError(found, rule, DISK_TROUBLE[error.errno] + ", then start the same line again")
    # The first rank tells it whole; of the others a line each, since the error may be theirs alone.
    told = f"error in {stage}: {mistake}" if is_first else f"[rank {_rank()}] {mistake.found}"
    print(told, file=sys.stderr, flush=True)
    return EXIT_MISTAKE


def run_stage(stage: str, cfg: RunConfig, run_dir: Path) -> list[Path] | None:
    """Works as one rank; returns what has to be there for the stage to count as done, or None where it is to go on."""
    if stage == "data":
        from data.engine import warm_up

        warm_up(cfg.tasks)
        from data.manifest import MANIFEST, Manifest
        from data.pipeline import prepare

        if (corpus_dir := prepare(cfg)) is None:
            return None
        Ledger(run_dir).append("corpus", path=str(corpus_dir), **Manifest.load(corpus_dir).facts())
        return [prepared_corpus(run_dir)["path"] / MANIFEST]
    corpus = prepared_corpus(run_dir)
    if stage == "train":
        _tell_rank(run_dir)
        from train.run import run

        status = run(cfg, run_dir, corpus["path"])
        return None if status else [run_dir / CHECKPOINTS / f"step-{cfg.train.steps:09d}" / "manifest.json"]
    if stage == "eval":
        from data.heldout import valid_documents
        from eval.run import evaluate

        documents, tokenizer_dir = valid_documents(corpus["path"]), corpus["path"] / "tokenizer"
        evaluate(cfg, run_dir, documents=documents, tokenizer_dir=tokenizer_dir, corpus_hash=corpus["corpus_hash"])
        return sorted((run_dir / "eval").glob("step-*.json"))
    from release.run import release

    release(cfg, run_dir, corpus["path"])
    return [run_dir / "release" / "verified.json"]


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _tell_rank(run_dir: Path) -> None:
    """Leaves what this rank was given, for whoever has to find out why one of many behaves unlike the others."""
    facts = {
        "rank": _rank(),
        "local_rank": int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0),
        "world_size": int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1),
        "host": os.environ.get("SLURMD_NODENAME") or platform.node(),
        "master_addr": os.environ.get("MASTER_ADDR"),
        "master_port": os.environ.get("MASTER_PORT"),
        "cpu_bind_list": os.environ.get("SLURM_CPU_BIND_LIST"),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    write_whole(run_dir / "logs" / f"rank-{facts['rank']}.json", json.dumps(facts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
