"""The processes of `dsv3 bench train --gpus N`, one a GPU: started, watched and ended here, without `torchrun`."""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.multiprocessing.spawn import ProcessException

from dsv3.bench.gpus.findings import Findings, Part
from dsv3.bench.gpus.overlap import measure_overlap
from dsv3.bench.gpus.pipeline import measure_pipeline
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.scaling import measure_scaling
from dsv3.bench.gpus.sizes import Sizes
from dsv3.bench.gpus.zero import measure_zero
from dsv3.bench.measure import Progress
from dsv3.errors import RunError, UserError
from dsv3.stages.machine import command, machine, versions

PARTS: dict[str, Callable[[Rank, Sizes], Sequence[Part]]] = {
    "overlap": measure_overlap,
    "pipeline": measure_pipeline,
    "zero": measure_zero,
    "scaling": measure_scaling,
}
"""In the order in which they are measured."""
TIMEOUT = timedelta(minutes=2)
"""How long one rank waits for another before the measurement ends."""


@dataclass(frozen=True)
class Job:
    """What every rank is told."""

    size: int
    meeting: str
    """A file that is not there yet."""
    parts: tuple[str, ...]
    sizes: Sizes


def bench_gpus(
    gpus: int, parts: Sequence[str] = tuple(PARTS), sizes: Sizes | None = None, progress: Progress = lambda **_: None,
    tell: Callable[[Part], None] = lambda _: None,
) -> Findings:  # fmt: skip
    """Measures on the first `gpus` GPUs of this machine; `tell` hears of each part when it is found, whatever becomes of the next.

    Raises `UserError` where there are fewer, and `RunError` with the rank, the part and the message of what failed.
    """
    sizes = sizes or Sizes()
    found = torch.cuda.device_count()
    if gpus < 2 or (sizes.device == "cuda" and found < gpus):
        raise UserError(
            f"dsv3 bench train --gpus {gpus} measures what GPUs do together: expected 2 or more, and this machine has {found}"
        )
    started, news = time.perf_counter(), multiprocessing.get_context("spawn").SimpleQueue()
    heard: dict[str, Any] = {}
    told: list[Part] = []

    def listen() -> None:
        while not news.empty():
            kind, content = news.get()
            if kind == "progress":
                progress(**content)
            elif kind == "part":
                told.append(content)
                tell(content)
            else:
                heard.setdefault(kind, content)

    with tempfile.TemporaryDirectory() as directory:
        job = Job(gpus, str(Path(directory) / "meeting"), tuple(parts), sizes)
        context = multiprocessing.start_processes(
            serve, (job, news), gpus, join=False, daemon=True, start_method="spawn"
        )
        try:
            while not context.join(timeout=0.1):
                listen()
        except ProcessException as error:
            listen()
            raise RunError(heard.get("failed") or f"a rank ended: {error}") from error
        listen()
    return Findings(gpus, told, heard["machine"], versions(), command(), time.perf_counter() - started)


def serve(number: int, job: Job, news: Any) -> None:
    """One process: rank `number`. What fails is told before it ends the others; so is what the first rank found."""
    try:
        at = "starting"
        if job.sizes.threads is not None:
            torch.set_num_threads(job.sizes.threads)
        device = torch.device(job.sizes.device)
        if device.type == "cuda":
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{job.meeting}", rank=number, world_size=job.size, timeout=TIMEOUT
        )
        for at in job.parts:
            tell = partial(show, news, at) if number == 0 else (lambda **_: None)
            found = measured(at, Rank(number, job.size, device, job.sizes.rounds, tell), job.sizes)
            for each in found if number == 0 else []:
                news.put(("part", each))
        if number == 0:
            news.put(("machine", dict(machine(device))))
        at = "the end"
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        message = f"rank {number} failed in {at}: {type(error).__name__}: {error}"
        news.put(("failed", message))
        raise


def show(news: Any, part: str, **figures: Any) -> None:
    """Progress for the process that started the ranks."""
    figures["stage"] = f"{part}: {figures['stage']}"
    news.put(("progress", figures))


def measured(part: str, rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """One part, and nothing of it left in memory."""
    found = PARTS[part](rank, sizes)
    rank.clear()
    rank.wait()
    return found
