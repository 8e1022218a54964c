"""The processes of `dsv3 bench train --gpus N`, one a GPU: started, watched and ended here, without `torchrun`."""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
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
from dsv3.bench.measure import Progress, about, clear
from dsv3.errors import RunError, UserError

PARTS: dict[str, Callable[[Rank, Sizes], Sequence[Part]]] = {
    "overlap": measure_overlap,
    "pipeline": measure_pipeline,
    "zero": measure_zero,
    "scaling": measure_scaling,
}
"""In the order in which they are measured."""
TIMEOUT = timedelta(minutes=2)
"""How long one rank waits for another before the measurement ends."""


def bench_gpus(
    gpus: int, parts: Sequence[str] = tuple(PARTS), sizes: Sizes | None = None, progress: Progress = lambda **_: None,
    tell: Callable[[Part], None] = lambda _: None,
) -> Findings:  # fmt: skip
    """Measures on the first `gpus` GPUs of this machine; `tell` gets each part as soon as it is measured.

    Raises `UserError` where there are fewer, and `RunError` with the rank, the part and the message of what failed.
    """
    sizes = sizes or Sizes()
    found = torch.cuda.device_count()
    if gpus < 2 or (sizes.device == "cuda" and found < gpus):
        raise UserError(
            f"dsv3 bench train --gpus {gpus} measures what GPUs do together: expected 2 or more, and this machine has {found}"
        )
    started, news = time.perf_counter(), multiprocessing.get_context("spawn").SimpleQueue()
    told, failures = list[Part](), list[str]()

    def listen() -> None:
        while not news.empty():
            kind, content = news.get()
            if kind == "progress":
                progress(**content)
            elif kind == "part":
                told.append(content)
                tell(content)
            else:
                failures.append(content)

    with tempfile.TemporaryDirectory() as directory:
        told_to_each = gpus, parts, sizes, f"file://{directory}/meeting", news
        context = multiprocessing.start_processes(
            serve, told_to_each, gpus, join=False, daemon=True, start_method="spawn"
        )
        try:
            while not context.join(timeout=0.1):
                listen()
        except ProcessException as error:
            listen()
            raise RunError(failures[0] if failures else f"a rank ended: {error}") from error
        listen()
    return Findings(gpus, told, **about(torch.device(sizes.device)), seconds=time.perf_counter() - started)


def serve(number: int, size: int, parts: Sequence[str], sizes: Sizes, meeting: str, news: Any) -> None:
    """One process: rank `number` of `size`, which meet at a file that is not there yet.

    What fails is told before it ends the others; so is what the first rank found.
    """
    at = "starting"
    try:
        if sizes.threads is not None:
            torch.set_num_threads(sizes.threads)
        device = torch.device(sizes.device)
        if device.type == "cuda":
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=number, world_size=size, timeout=TIMEOUT)
        for at in parts:
            tell = partial(show, news, at) if number == 0 else (lambda **_: None)
            for each in measured(at, Rank(number, size, device, sizes.rounds, tell), sizes):
                if number == 0:
                    news.put(("part", each))
        at = "the end"
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        news.put(("failed", f"rank {number} failed in {at}: {type(error).__name__}: {error}"))
        raise


def show(news: Any, part: str, **figures: Any) -> None:
    """Sends progress to the process that started the ranks."""
    figures["stage"] = f"{part}: {figures['stage']}"
    news.put(("progress", figures))


def measured(part: str, rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """Measures one part, then frees its memory."""
    found = PARTS[part](rank, sizes)
    clear()
    rank.clock()  # waits for all
    return found
