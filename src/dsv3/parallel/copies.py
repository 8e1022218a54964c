"""Exchanges within a node by copy engines: every rank writes its slabs into shared memory, and copies its own out of the others'.

Beside a product that fills the GPU, NCCL's all-to-all has to wait for multiprocessors, and hides nothing. Copies need none; they
need slabs of one size, which bounded exchanges have. `dsv3 bench train --gpus 2` measures both.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dsv3.errors import RunError
from dsv3.parallel.group import Group, as_bytes

ALIGNMENT = 256
"""Bytes at multiples of which parts of a window begin."""


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
    flags_at = -(-size // ALIGNMENT) * ALIGNMENT
    try:
        own = symmetric_memory.empty(flags_at + 4 * group.size, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)  # nobody writes flags before all have met here, with theirs cleared
        handle = symmetric_memory.rendezvous(own, group.handle)
    except RuntimeError as error:
        raise RunError(
            f"the GPUs of {group.name} do not see each other's memory ({str(error).splitlines()[0]}): use parallel.transport = "
            "'nccl'"
        ) from error
    everyone = [
        own if rank == group.rank else handle.get_buffer(rank, own.shape, torch.uint8) for rank in range(group.size)
    ]
    flags = Flags([each[flags_at:] for each in everyone], group.rank, handle)
    return Window([each[:size] for each in everyone], flags)


class Flags:
    """A barrier of streams without kernels, which would hold multiprocessors: each rank writes the meeting's number to every other's
    memory, and waits for theirs."""

    def __init__(self, everyone: Sequence[Tensor], rank: int, handle: object):
        self.everyone, self.rank, self.meetings = everyone, rank, 0
        self.handle = handle
        """What keeps the others' memory in sight."""
        self.driver = ctypes.CDLL("libcuda.so.1")

    def __call__(self) -> None:
        """On the current stream. What it did before is seen by whoever has passed."""
        self.meetings += 1
        stream, (own, place) = torch.cuda.current_stream().cuda_stream, (self.everyone[self.rank], 4 * self.rank)
        others = [(rank, each) for rank, each in enumerate(self.everyone) if rank != self.rank]
        # A write comes after all before it, and a wait ends at this number or a larger one.
        calls = [("cuStreamWriteValue32_v2", theirs.data_ptr() + place) for _, theirs in others]
        calls += [("cuStreamWaitValue32_v2", own.data_ptr() + 4 * rank) for rank, _ in others]
        for name, address in calls:
            number, none = ctypes.c_uint32(self.meetings), ctypes.c_uint(0)
            if error := getattr(self.driver, name)(ctypes.c_void_p(stream), ctypes.c_uint64(address), number, none):
                raise RunError(f"{name} failed with error {error} of the CUDA driver: use parallel.transport = 'nccl'")


@dataclass
class Windows:
    """Two windows in turn: before a rank writes to one again, all have passed the other's barrier, after they read the first."""

    open: Open = symmetric
    both: list[Window] = field(default_factory=list)
    size: int = -1
    next: int = 0
    done: torch.cuda.Event | None = None
    """The end of the exchange before, which may have been on another stream."""

    def exchange(self, group: Group, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each uint8 [ranks x n] -> the same: slab i goes to rank i, and slab i comes from it. All with one barrier."""
        ends = list(accumulate(-(-len(each) // ALIGNMENT) * ALIGNMENT for each in parts))
        device = parts[0].device
        if ends[-1] > self.size:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the old windows may still be in use
            self.both, self.size = [self.open(group, ends[-1], device) for _ in range(2)], ends[-1]
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        window, places = self.both[self.next], list(zip(parts, [0, *ends], strict=False))
        self.next = 1 - self.next
        for part, start in places:
            window.everyone[group.rank][start : start + len(part)].copy_(part)
        window.barrier()
        found = []
        for part, start in places:
            out, slab = torch.empty_like(part), len(part) // group.size
            # Each begins with the next rank, so that no rank is read by all at once.
            for distance in range(1, group.size + 1):
                rank = (group.rank + distance) % group.size
                theirs = window.everyone[rank][start + group.rank * slab :][:slab]
                out[rank * slab :][:slab].copy_(theirs)
            found.append(out)
        if device.type == "cuda":
            self.done = torch.cuda.current_stream().record_event()
        return found


@dataclass(frozen=True)
class CopyingGroup(Group):
    """A group within a node whose `exchange_all` takes slabs of one size."""

    windows: Windows = field(default_factory=Windows)

    @classmethod
    def of(cls, group: Group, open_window: Open = symmetric) -> "CopyingGroup":
        """The same ranks."""
        return cls(**vars(group), windows=Windows(open_window))

    def exchange_all(
        self, tensors: Sequence[Tensor], sent: Sequence[int], received: Sequence[int], room: int = 0
    ) -> list[Tensor]:
        """See `Group`; `RunError` where the slabs differ in size, as those of exact exchanges do."""
        if self.handle is None:
            return list(tensors)
        if len({*sent, *received}) != 1:
            raise RunError(
                f"copies over {self.name} take slabs of one size, not {list(sent)} and {list(received)} rows"
            )
        parts = [as_bytes(each) for each in tensors]
        self.traffic["sent"] += sum(len(each) - len(each) // self.size for each in parts)
        with self.activity.communicating(f"exchange over {self.name}"):
            found = self.windows.exchange(self, parts)
        return [out.view(each.dtype).view(each.shape) for out, each in zip(found, tensors, strict=True)]
