"""The steps that prepare a corpus as arrays of Slurm jobs. The only file that imports datatrove, which submits them."""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from configs.errors import UserError
from configs.text import MAX_TASKS, TasksConfig
from data.engine import Step, do, whole
from data.files import PACKAGE_ROOT

logger.disable("datatrove")  # it would print a page a task; steps speak for themselves


class Share(PipelineStep):  # type: ignore[misc]
    """One task: every so-many-th unit of a step, those that lack."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.name = step, step.name

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Does the task; the arguments are what datatrove gives."""
        for task in self.step.tasks()[rank::world_size]:
            do(task)
        return iter(())


def submit(steps: Iterable[Step], cfg: TasksConfig, logs: Path, name: str) -> str:
    """Submits the steps as arrays of jobs, each held until the one before is complete; returns the last job's id.

    Where one fails, Slurm removes those behind it. Raises `UserError` where Slurm refuses one: those before it go on.
    """
    before: _Array | None = None
    account = {"account": cfg.account} if cfg.account else {}
    for step in steps:
        array = _Array(
            [Share(step)],
            tasks=1 if step.units is whole else cfg.tasks,
            time=cfg.time,
            partition=cfg.partition,
            mem_per_cpu_gb=cfg.gib,
            job_name=f"{name}-{step.name}",
            qos="",
            logging_dir=str(logs / step.name),
            skip_completed=False,  # by units, which do not depend on the number of tasks
            depends=before,
            env_command=f"source {shlex.quote(str(PACKAGE_ROOT / 'slurm/array.sh'))} {shlex.quote(sys.executable)}",
            with_srun=False,
            max_array_size=MAX_TASKS,
            requeue_signals=None,  # its handler asks scontrol, which a container does not have
            sbatch_args={"open-mode": "append", "kill-on-invalid-dep": "yes", **account},
        )
        try:
            array.run()
        except (OSError, subprocess.CalledProcessError) as error:
            rule = "tasks.runner=slurm submits from a login node, to a partition and project of yours, within limits"
            settings = "tasks.partition, tasks.account, tasks.time, tasks.tasks"
            repair = f"run it there; correct {settings}; or tasks.runner=local"
            raise UserError(f"the array of the step {step.name}: {_reason(error)}", rule, repair) from None
        before = array
    assert before is not None
    return str(before.job_id)


def queued(name: str) -> int:
    """Jobs of arrays that are still queued or running; raises `UserError` where Slurm does not tell."""
    try:
        shown = subprocess.run(["squeue", "-h", "-r", "--me", "-o", "%j"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rule = "tasks.runner=slurm asks Slurm whether it is at the corpus already"
        repair = "run it on a login node, again in a minute where Slurm did not answer; or tasks.runner=local"
        raise UserError(_reason(error), rule, repair) from None
    return sum(line.startswith(f"{name}-") for line in shown.stdout.splitlines())


def last_mistake(logs: Path) -> str:
    """What a task of a step last could not go on for, and the log that says so; empty where none did."""
    for log in sorted(logs.rglob("slurm_logs/**/*.out"), key=lambda path: -path.stat().st_mtime):
        _, found, told = log.read_text(encoding="utf-8", errors="replace").rpartition(f"{UserError.__name__}: ")
        if found:
            return f"{told.strip()}\n  in:     {log}"
    return ""


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"{error.cmd[0]} refused: {(error.stderr or 'it says above why').strip()}"


class _Array(SlurmPipelineExecutor):  # type: ignore[misc]
    def launch_merge_stats(self) -> None:
        """Nothing: the steps keep their own counts."""

    def _set_distributed_environment(self, node_rank: int) -> None:
        """Nothing: tasks do not talk, and a container has no scontrol to ask for their nodes."""
