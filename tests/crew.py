"""Processes that stay up for several tests and run functions together, as torchrun's would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from typing import Any, Callable

import helpers

from mmsr.system.parallel import Ranks, distributed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int, node_size: int | None = None) -> dict[str, str]:
    """What torchrun sets."""
    node_size = node_size or size
    values = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank % node_size, LOCAL_WORLD_SIZE=node_size)
    return {k: str(v) for k, v in values.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _serve(rank: int, size: int, port: int, node_size: int | None, pipe) -> None:
    os.environ.update(environment(rank, size, port, node_size), OMP_NUM_THREADS="1")
    with distributed("cpu", timeout=60) as ranks:
        while job := pipe.recv():
            function, args, helpers.FAMILY = job
            try:
                pipe.send((True, function(ranks, *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))


def fresh_processes():
    """Processes that are not forks of this one, whose other threads may hold a lock at that moment: SQLite's, say.

    They start from a server that has torch imported, once for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmsr.update", "mmsr.engine"])
    return context


class Crew:
    """`size` processes; crew(function, *args) runs function(ranks, *args) on each and returns their results by rank."""

    def __init__(self, size: int, node_size: int | None = None):
        context, port = fresh_processes(), free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, node_size, theirs), daemon=True)
            process.start()
            self.pipes.append(ours), self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args, helpers.FAMILY))
        for pipe in self.pipes:
            assert pipe.poll(100), "a rank gives no answer: do they wait for each other?"
        results = [pipe.recv() for pipe in self.pipes]
        failures = [text for ok, text in results if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def stop(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass  # it is gone already
        for process in self.processes:
            process.join(5)
            process.kill()


def on_one(function: Callable[..., Any], *args) -> Any:
    """The same in this process, alone."""
    return function(Ranks(), *args)
