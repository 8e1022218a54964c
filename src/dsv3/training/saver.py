"""Checkpoints written while training goes on: the step waits for a copy in CPU memory, a thread writes that to disk.

saver.prepare(tensors)                         has the thread allocate the copy
saver.save(directory, tensors, state, files)   copies, and returns
saver.check()                                  raises the error of a save that has ended
saver.finish()                                 waits for the last save, and raises its error
"""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.parallel.group import Group
from dsv3.training.timing import timed
from dsv3.weights.checkpoint import flatten, prune_checkpoints, save_checkpoint
from dsv3.weights.parts import Place

log = logging.getLogger(__name__)


class Saver:
    """One save at a time: a second one waits for the first. A context manager that leaves no save unfinished.

    `keep_last` and `keep_every_steps` are the recipe's. The CPU copy is allocated once. The ranks of `group` save together.
    """

    def __init__(self, keep_last: int | None = None, keep_every_steps: int | None = None, group: Group | None = None):
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.group = group or Group("saving")
        self.copy: dict[str, Tensor] = {}
        self.worker = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.spent: dict[str, float] = {}
        """Seconds so far: of the steps, `waiting` for the thread; on the GPU between two steps, `copying`; in the thread,
        `preparing` the copy's memory, `writing`, and the `processor` time of that."""

    def prepare(self, tensors: Mapping[str, Any]) -> None:
        """Has the thread allocate the copy of tensors like these, the first time: pinning it for a GPU takes seconds."""
        if not self.copy and self.pending is None:
            self.pending = self.worker.submit(self.make_room, flatten(tensors))

    def make_room(self, given: Mapping[str, Tensor]) -> None:
        """Allocates the copy of tensors like these."""
        with timed(self.spent, "preparing"):
            self.copy = {
                name: torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for name, each in given.items()
            }

    def save(
        self,
        directory: Path,
        tensors: Mapping[str, Any],
        state: Mapping[str, Any],
        files: Mapping[str, Path | bytes],
        places: Mapping[str, Place] | None = None,
    ) -> None:
        """`save_checkpoint` in a thread; raises what went wrong in the save before."""
        with timed(self.spent, "waiting"):
            self.finish()
        given = flatten(tensors)
        if self.copy.keys() != given.keys():
            self.make_room(given)
        begun = copied = None
        if any(each.is_cuda for each in given.values()):
            begun, copied = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
        for name, each in given.items():
            self.copy[name].copy_(each, non_blocking=True)
        if copied is not None:
            copied.record()

        def work() -> None:
            if begun is not None and copied is not None:
                copied.synchronize()
                self.spent["copying"] = self.spent.get("copying", 0.0) + begun.elapsed_time(copied) / 1000
            with timed(self.spent, "writing"), timed(self.spent, "processor", time.thread_time):
                save_checkpoint(directory, self.copy, state, files, places, self.group.rank, self.group.objects)
                if self.keep_last is not None and self.group.rank == 0:
                    prune_checkpoints(directory.parent, self.keep_last, self.keep_every_steps)

        self.pending = self.worker.submit(work)

    def check(self) -> None:
        """Raises the error of a save that has ended, once; does not wait."""
        if self.pending is not None and self.pending.done():
            self.finish()

    def wait(self) -> None:
        """Waits for the save under way, and ignores its errors."""
        if self.pending is not None:
            wait([self.pending])

    def finish(self) -> None:
        """Waits for the save under way; raises its error."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
        elif self.pending is not None and (failure := self.pending.exception()) is not None:
            log.warning("while the run ended: %s", failure)
