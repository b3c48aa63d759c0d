"""Runs the steps that prepare a corpus with processes of this machine; data/arrays.py does it with jobs of Slurm.

A step has units: input files, languages, shards. Each leaves files that are complete or absent, so a step begun again
does just the units that lack, and neither the number of tasks nor who was killed can be seen in what comes out.
"""

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import forkserver

from configs.enums import Runner
from configs.errors import UserError
from configs.text import TasksConfig
from ledger.progress import Progress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
CHUNKS_A_WORKER = 100  # units differ in size: with many chunks of them for each worker, none waits long for the last


def whole() -> list[str]:
    """The one unit of a step that is not divided."""
    return ["all"]


@dataclass(frozen=True)
class Step:
    """One step. All that is in it has to be picklable: methods of an object, not closures."""

    name: str
    units: Callable[[], Sequence[str]]  # names of the units; asked when the steps before are complete
    is_done: Callable[[str], bool]
    run: Callable[[str], None]
    beside: "Step | None" = None  # done at the same time: neither waits for the other, and its units come first

    def tasks(self) -> list[tuple["Step", str]]:
        """Its units, done or not, each with its step; asked when the steps before are complete."""
        return [*(self.beside.tasks() if self.beside else []), *((self, unit) for unit in self.units())]

    def is_complete(self) -> bool:
        """Whether all units are done; asked when the steps before are complete."""
        return all(step.is_done(unit) for step, unit in self.tasks())


def run_here(steps: Iterable[Step], cfg: TasksConfig) -> None:
    """Does the steps one after the other; raises what a unit raised, and `UserError` where a process was killed."""
    n_workers = _n_workers(cfg)
    warm_up(cfg)
    with ExitStack() as stack:
        workers: ProcessPoolExecutor | None = None
        for step in steps:
            tasks = [(of, unit) for of, unit in step.tasks() if not of.is_done(unit)]
            if min(n_workers, len(tasks)) <= 1:
                for task in tasks:
                    do(task)
                continue
            if workers is None:
                workers = ProcessPoolExecutor(n_workers, multiprocessing.get_context("forkserver"), _begin)
                stack.callback(workers.shutdown, cancel_futures=True)
            chunk = -(-len(tasks) // (n_workers * CHUNKS_A_WORKER))
            try:
                with Progress(step.name, "units", len(tasks)) as progress:
                    for _ in workers.map(do, tasks, chunksize=chunk):
                        progress.advance()
            except BrokenProcessPool:
                found, rule = f"a process of the step {step.name} was killed", "most often the memory was not enough"
                fewer = f"tasks.workers={max(n_workers // 2, 1)}"
                repair = f"{fewer}, or a machine with more memory; what is done is kept"
                raise UserError(found, rule, repair) from None


def do(task: tuple[Step, str]) -> None:
    """Does a unit of a step, unless another machine has done it meanwhile."""
    step, unit = task
    if not step.is_done(unit):
        step.run(unit)


def warm_up(cfg: TasksConfig) -> None:
    """Starts the process that workers are forked from; it imports what they need while this one goes on."""
    if cfg.runner is Runner.local and _n_workers(cfg) > 1:
        # glibc reads it when a process begins: memory in pages of 2 MB, which takes 8 % off the time of encoding.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        forkserver.set_forkserver_preload([__name__, "data.pipeline", "awkward", "gigatoken"])
        forkserver.ensure_running()


def _n_workers(cfg: TasksConfig) -> int:
    return cfg.workers or len(os.sched_getaffinity(0))


def _begin() -> None:
    """What a worker does first: it ends with its parent, where a killed command would leave it waiting for ever."""
    gc.set_threshold(100_000)  # documents hold no cycles, and there are many of them
    # Memory that is given back is zeroed by the kernel when it is asked for again: 8 % of the time of encoding.
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
