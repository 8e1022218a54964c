"""Exchanges within a node by copy engines: every rank writes its slabs into shared memory, and copies its own out of the others'.

Beside a product that fills the GPU, NCCL's all-to-all has to wait for multiprocessors, and hides nothing. Copies need none; they
need slabs of one size, which bounded exchanges have. `dsv3 bench train --gpus 2` measures both.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3.errors import RunError
from dsv3.parallel.group import Group


@dataclass(frozen=True)
class Window:
    """Memory of the same size on every rank of a group, readable by all of them."""

    everyone: Sequence[Tensor]
    """uint8 [n] by rank, this one's own among them."""
    barrier: Callable[[], None]
    """Orders this stream's later work after the earlier work of all ranks' streams."""


Open = Callable[[Group, int, torch.device], Window]
"""Makes a window of so many bytes; all ranks of the group call it together."""


def symmetric(group: Group, size: int, device: torch.device) -> Window:
    """By torch's symmetric memory; `RunError` where the GPUs cannot read each other's."""
    import torch.distributed._symmetric_memory as symmetric_memory

    assert group.handle is not None
    # Nothing here is sent to several ranks at once; multicast would take resources of the switches.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    try:
        own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(own, group.handle)
    except RuntimeError as error:
        raise RunError(
            f"the GPUs of {group.name} do not see each other's memory ({str(error).splitlines()[0]}): use parallel.transport = "
            "'nccl'"
        ) from error
    everyone = [
        own if rank == group.rank else handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size)
    ]
    return Window(everyone, handle.barrier)


@dataclass
class Windows:
    """Two windows in turn: before a rank writes to one again, all have passed the other's barrier, after they read the first."""

    open: Open = symmetric
    both: list[Window] = field(default_factory=list)
    size: int = -1
    next: int = 0
    done: torch.cuda.Event | None = None
    """The end of the exchange before, which may have been on another stream."""

    def exchange(self, group: Group, flat: Tensor) -> Tensor:
        """uint8 [ranks x n] -> the same: slab i goes to rank i, and slab i comes from it."""
        if len(flat) > self.size:
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)  # the old windows may still be in use
            self.both, self.size = [self.open(group, len(flat), flat.device) for _ in range(2)], len(flat)
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        window, out, slab = self.both[self.next], torch.empty_like(flat), len(flat) // group.size
        self.next = 1 - self.next
        window.everyone[group.rank][: len(flat)].copy_(flat)
        window.barrier()
        # Each begins with the next rank, so that no rank is read by all at once.
        for distance in range(1, group.size + 1):
            rank = (group.rank + distance) % group.size
            theirs = window.everyone[rank][group.rank * slab : (group.rank + 1) * slab]
            out[rank * slab : (rank + 1) * slab].copy_(theirs)
        if flat.is_cuda:
            self.done = torch.cuda.current_stream().record_event()
        return out


@dataclass(frozen=True)
class CopyingGroup(Group):
    """A group within a node whose `exchange` takes slabs of one size."""

    windows: Windows = field(default_factory=Windows)

    @classmethod
    def of(cls, group: Group, open_window: Open = symmetric) -> "CopyingGroup":
        """The same ranks."""
        return cls(**vars(group), windows=Windows(open_window))

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See `Group`; `RunError` where the slabs differ in size, as those of exact exchanges do."""
        if self.handle is None:
            return rows
        if len({*sent, *received}) != 1:
            raise RunError(
                f"copies over {self.name} take slabs of one size, not {list(sent)} and {list(received)} rows"
            )
        flat = rows.contiguous().view(-1).view(torch.uint8)
        self.traffic["sent"] += len(flat) - len(flat) // self.size
        with self.activity.communicating(f"exchange over {self.name}"):
            out = self.windows.exchange(self, flat)
        return out.view(rows.dtype).view(rows.shape)
