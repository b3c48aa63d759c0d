"""Runs a function as several gloo ranks, each a real process."""

import multiprocessing
import os
import socket
import traceback


def run_ranks(function, world_size, *arguments):
    """Calls `function(*arguments)` in `world_size` processes and returns what rank 0 returned.

    `function` has to stand at the top of a module. A rank that raises fails the test with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    answers = [results.get(timeout=240) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    failures = [text for _, text, failed in answers if failed]
    assert not failures, "\n".join(failures)
    return next(value for rank, value, _ in answers if rank == 0)


def _rank(function, rank, world_size, port, results, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        results.put((rank, function(*arguments), False))
    except BaseException:
        results.put((rank, traceback.format_exc(), True))
