"""Runs the steps that prepare a corpus: on this machine, or as arrays of Slurm jobs, with the same result.

A step has units: input files, languages, shards. Each leaves files that are complete or absent, so a step begun again
does just the units that lack, and neither the number of tasks nor who was killed can be seen in what comes out.
The only file that imports datatrove, whose executors start the tasks.
"""

import multiprocessing
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from configs.errors import UserError
from configs.text import MAX_TASKS, TasksConfig
from ledger.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
TASKS_A_WORKER = 8
"""Units differ in size: with several tasks for each worker, none waits long for the last."""

logger.disable("datatrove")  # it would print a page a task; steps speak for themselves


@dataclass(frozen=True)
class Step:
    """One step. All that is in it has to be picklable: methods of an object, not closures."""

    name: str
    units: Callable[[], Sequence[str]]
    """Names of the units; asked when the steps before are complete."""
    is_done: Callable[[str], bool]
    run: Callable[[str], None]
    has_one_unit: bool = False

    def is_complete(self) -> bool:
        """Whether all units are done; asked when the steps before are complete."""
        return all(map(self.is_done, self.units()))


class Share(PipelineStep):  # type: ignore[misc]
    """One task: every so-many-th unit of a step, those that lack."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.name = step, step.name

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Does the task; the arguments are what datatrove gives."""
        for unit in self.step.units()[rank::world_size]:
            if not self.step.is_done(unit):
                self.step.run(unit)
        return iter(())


def run_here(steps: Iterable[Step], cfg: TasksConfig, logs: Path) -> None:
    """Does the steps with processes of this machine, one after the other; returns when all units are done.

    Raises what a unit raised, and `UserError` where a process was killed.
    """
    with _pool(cfg) as pool:
        for step in steps:
            units = step.units()
            n_lacking = sum(not step.is_done(unit) for unit in units)
            if min(pool.workers, n_lacking) <= 1:
                for unit in units:
                    if not step.is_done(unit):
                        step.run(unit)
            else:
                with _progress(step, units):
                    _Here([Share(step)], min(len(units), pool.workers * TASKS_A_WORKER), pool, logs / step.name).run()


def submit(steps: Iterable[Step], cfg: TasksConfig, logs: Path, name: str) -> str:
    """Submits the steps as arrays of jobs, each held until the one before is complete; returns the last job's id.

    Where one fails, Slurm removes those behind it. Raises `UserError` where Slurm refuses one: those before it go on.
    """
    before: _Array | None = None
    for step in steps:
        array = _Array(
            [Share(step)],
            tasks=1 if step.has_one_unit else cfg.tasks,
            time=cfg.time,
            partition=cfg.partition,
            mem_per_cpu_gb=cfg.gib,
            job_name=f"{name}-{step.name}",
            qos="",
            logging_dir=str(logs / step.name),
            skip_completed=False,  # by units, which do not depend on the number of tasks
            depends=before,
            env_command=f"source {shlex.quote(str(ROOT / 'slurm/array.sh'))} {shlex.quote(sys.executable)}",
            with_srun=False,
            max_array_size=MAX_TASKS,
            requeue_signals=None,  # its handler asks scontrol, which a container does not have
            sbatch_args={
                "open-mode": "append",
                "kill-on-invalid-dep": "yes",
                **({"account": cfg.account} if cfg.account else {}),
            },
        )
        try:
            array.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"the array of the step {step.name}: {_reason(error)}",
                "tasks.runner=slurm submits from a login node, to a partition and project of yours, within limits",
                "run it there; correct tasks.partition, tasks.account, tasks.time, tasks.tasks; or tasks.runner=local",
            ) from None
        before = array
    assert before is not None
    return str(before.job_id)


def queued(name: str) -> int:
    """Jobs of arrays that are still queued or running; raises `UserError` where Slurm does not tell."""
    try:
        shown = subprocess.run(["squeue", "-h", "-r", "--me", "-o", "%j"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            _reason(error),
            "tasks.runner=slurm asks Slurm whether it is at the corpus already",
            "run it on a login node, again in a minute where Slurm did not answer; or tasks.runner=local",
        ) from None
    return sum(line.startswith(f"{name}-") for line in shown.stdout.splitlines())


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"{error.cmd[0]} refused: {(error.stderr or 'it says above why').strip()}"


class _Pool:
    """Worker processes, started when they are first needed and kept for the steps that follow."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def map(self, task: Callable[[int], Any], n: int) -> None:
        """Does a task n times; raises `BrokenProcessPool` where a worker was killed."""
        if self._executor is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "data.pipeline"])
            self._executor = ProcessPoolExecutor(self.workers, context, _end_with_parent)
        for _ in self._executor.map(task, range(n)):
            pass

    def close(self) -> None:
        """Waits for what is running and leaves the rest."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def _pool(cfg: TasksConfig) -> Iterator[_Pool]:
    pool = _Pool(cfg.workers or len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.close()


class _Here(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's own pool waits for ever for a worker that was killed; this one ends."""

    def __init__(self, pipeline: list[Any], tasks: int, pool: _Pool, logs: Path) -> None:
        super().__init__(pipeline, tasks, pool.workers, str(logs), skip_completed=False)
        self._pool: _Pool | None = pool

    def run(self) -> None:
        pool, self._pool = self._pool, None  # which tasks take with them what they are methods of
        assert pool is not None
        try:
            pool.map(self._run_for_rank, self.tasks)
        except BrokenProcessPool:
            raise UserError(
                f"a process of the step {self.pipeline[0].name} was killed",
                "most often the memory was not enough",
                f"tasks.workers={max(self.workers // 2, 1)}, or a machine with more memory; what is done is kept",
            ) from None


class _Array(SlurmPipelineExecutor):  # type: ignore[misc]
    def launch_merge_stats(self) -> None:
        """Nothing: the steps keep their own counts."""

    def _set_distributed_environment(self, node_rank: int) -> None:
        """Nothing: tasks do not talk, and a container has no scontrol to ask for their nodes."""


def _end_with_parent() -> None:
    """A killed command would leave workers that wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _progress(step: Step, units: Sequence[str]) -> Iterator[None]:
    done = threading.Event()

    def watch(progress: Progress) -> None:
        while not done.wait(2.0):
            progress.advance(sum(map(step.is_done, units)) - progress.done)

    with Progress(step.name, "units", len(units)) as progress:
        watcher = threading.Thread(target=watch, args=(progress,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
