"""Runs the steps that prepare a corpus with processes of this machine; data/arrays.py does it with jobs of Slurm.

A step has units: input files, languages, shards. Each leaves files that are complete or absent, so a step begun again
does just the units that lack, and neither the number of tasks nor who was killed can be seen in what comes out.
"""

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver

from configs.enums import Runner
from configs.errors import UserError
from configs.text import TasksConfig
from ledger.progress import Progress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
CHUNKS_A_WORKER = 100
"""Units differ in size: with many chunks of them for each worker, none waits long for the last."""


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


class _Together:
    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.name: step for step in steps}

    def units(self) -> list[str]:
        return [f"{name} {unit}" for name, step in self._steps.items() for unit in step.units()]

    def is_done(self, unit: str) -> bool:
        name, _, unit = unit.partition(" ")
        return self._steps[name].is_done(unit)

    def run(self, unit: str) -> None:
        name, _, unit = unit.partition(" ")
        self._steps[name].run(unit)


def together(*steps: Step) -> Step:
    """Steps that do not wait for each other as one, with the name of the last; units of the first come first."""
    both = _Together(steps)
    return Step(steps[-1].name, both.units, both.is_done, both.run, all(step.has_one_unit for step in steps[1:]))


def run_here(steps: Iterable[Step], cfg: TasksConfig) -> None:
    """Does the steps, one after the other; returns when all units are done.

    Raises what a unit raised, and `UserError` where a process was killed.
    """
    n_workers = _n_workers(cfg)
    warm_up(cfg)
    with ExitStack() as stack:
        workers: ProcessPoolExecutor | None = None
        for step in steps:
            units = [unit for unit in step.units() if not step.is_done(unit)]
            if min(n_workers, len(units)) <= 1:
                for unit in units:
                    step.run(unit)
                continue
            workers = workers or stack.enter_context(_workers(n_workers))
            chunk = -(-len(units) // (n_workers * CHUNKS_A_WORKER))
            try:
                with Progress(step.name, "units", len(units)) as progress:
                    for _ in workers.map(partial(_do, step), units, chunksize=chunk):
                        progress.advance()
            except BrokenProcessPool:
                raise UserError(
                    f"a process of the step {step.name} was killed",
                    "most often the memory was not enough",
                    f"tasks.workers={max(n_workers // 2, 1)}, or a machine with more memory; what is done is kept",
                ) from None


def _do(step: Step, unit: str) -> None:
    if not step.is_done(unit):  # by another machine, meanwhile
        step.run(unit)


def warm_up(cfg: TasksConfig) -> None:
    """Starts the process that workers are forked from; it imports what they need while this one goes on."""
    if cfg.runner is Runner.local and _n_workers(cfg) > 1:
        forkserver.set_forkserver_preload([__name__, "data.pipeline", "awkward", "gigatoken"])
        forkserver.ensure_running()


def _n_workers(cfg: TasksConfig) -> int:
    return cfg.workers or len(os.sched_getaffinity(0))


@contextmanager
def _workers(n: int) -> Iterator[ProcessPoolExecutor]:
    workers = ProcessPoolExecutor(n, multiprocessing.get_context("forkserver"), _begin)
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


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
