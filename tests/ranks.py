"""Several processes of one group on this machine, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported what takes seconds to import, from which workers are forked.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kfade", "kfade.fit", "kfade.unlearn", "rank_work"])


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def _work(
    connection: Any,
    function: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    port: int | None,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        if port is not None:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            connection.send(function(*arguments))
            return
        # Long beyond any test: what ends a test in time is the library.
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(minutes=10)
        )
        connection.send(function(dist.group.WORLD, *arguments))
    except BaseException as error:
        connection.send(error)


def run_ranks(
    function: Callable[..., Any],
    size: int,
    folder: Path,
    *arguments: Any,
    launched: bool = False,
    seconds: float = 300.0,
) -> list[Any]:
    """Call `function(group, *arguments)` in so many processes with one thread each.

    Args:
        function: of a module, importable by name.
        size: number of processes.
        folder: for the group's store; a new file is made in it.
        arguments: of the function.
        launched: call `function(*arguments)` without a group, in the environment that a launcher makes.
        seconds: after which the processes are killed, and the test fails.

    Returns:
        What each rank returned, the exception that it raised, or the negative number of the signal that killed it.
    """
    store = str(folder / f"store.{len(list(folder.iterdir()))}")
    port = free_port() if launched else None
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    workers = [
        _CONTEXT.Process(target=_work, args=(pipes[rank][1], function, rank, size, store, port, arguments))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for _, end in pipes:
        end.close()
    results = []
    try:
        for worker, (end, _) in zip(workers, pipes, strict=True):
            if not end.poll(seconds):
                raise TimeoutError(f"{worker.name} has hung")
            try:
                results.append(end.recv())
            except EOFError:
                worker.join()
                results.append(worker.exitcode)
        for worker in workers:
            worker.join(seconds)
            assert worker.exitcode is not None, f"{worker.name} does not end"
    finally:
        for worker in workers:
            worker.kill()
    return results
