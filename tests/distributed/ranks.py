"""Ranks on this machine: processes that stay for many checks, joined by gloo."""

import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def serve(rank: int, size: int, pipe: Connection) -> None:
    """One rank: calls what it is sent, and sends back what came of it.

    Groups last for one call: each has threads of gloo's that wake all the time, and a hundred calls' would take the machine.
    """
    torch.set_num_threads(1)
    while True:
        meeting, function, arguments = pipe.recv()
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # whatever it is, the test shall show it
            pipe.send((False, traceback.format_exc()))
        pipe.recv()  # all have answered
        dist.destroy_process_group()
        gc.collect()


class Ranks:
    """`size` processes, started when they are needed; a context manager that ends them."""

    def __init__(self, size: int):
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        """New processes, that know nothing of earlier ones."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "dsv3.training.trainer"])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.size, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on every rank; where one fails, the tracebacks of all that do soon."""
        if not self.processes:
            self.start()
        meeting = tempfile.mktemp()
        for pipe in self.pipes:
            pipe.send((meeting, function, arguments))
        answers: dict[int, Any] = {}
        failed: list[str] = []
        while len(answers) < self.size:
            ready = wait([p for i, p in enumerate(self.pipes) if i not in answers], timeout=5 if failed else 240)
            if not ready:
                failed = failed or [f"only ranks {sorted(answers)} answered in time"]
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                good, answers[rank] = pipe.recv()
                if not good:
                    failed.append(f"rank {rank}: {answers[rank]}")
        if failed:
            self.end()
            raise AssertionError("\n".join(failed))
        for pipe in self.pipes:
            pipe.send(None)
        return [answers[rank] for rank in range(self.size)]

    def end(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        self.processes, self.pipes = [], []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
