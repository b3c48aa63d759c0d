"""Runs a function as several gloo ranks, each a real process.

Ranks are forked from a server that has imported what they need: the imports take five seconds, a tiny run less. So
they have the environment in which the first of them was started; what a test wants to set it passes as an argument.
"""

import functools
import gc
import multiprocessing
import os
import socket
import traceback
from multiprocessing import forkserver

PRELOADED = ["train.run", "torch._inductor.compile_fx"]
"""The second brings what PyTorch imports when the first optimizer is made, or the first model compiled."""


def run_ranks(function, world_size, *arguments):
    """Calls `function(*arguments)` in `world_size` processes and returns what rank 0 returned.

    `function` has to stand at the top of a module. A rank that raises fails the test with its traceback.
    """
    ranks, results = start_ranks(function, world_size, *arguments)
    answers = [results.get(timeout=240) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    failures = [text for _, text, failed in answers if failed]
    assert not failures, "\n".join(failures)
    return next(value for rank, value, _ in answers if rank == 0)


def start_ranks(function, world_size, *arguments):
    """Starts the processes, and returns them with a queue of (rank, what it returned or its traceback, has raised)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = _server()
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks, results


@functools.cache
def _server():
    # The tests of data/loader.py may have started one that has imported less; Python has one a process.
    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank(function, rank, world_size, port, results, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    gc.freeze()  # DeepSpeed collects garbage thirty times while it starts, and what was imported is none
    try:
        results.put((rank, function(*arguments), False))
    except BaseException:
        results.put((rank, traceback.format_exc(), True))
