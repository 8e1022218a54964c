"""Ranks that act together, and their collective operations, which do nothing for one rank alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.activity import Activity


@dataclass(frozen=True)
class Group:
    """Some ranks of a job, in order. Every one of them must call the same operations in the same order."""

    name: str
    ranks: tuple[int, ...] = (0,)
    """Their numbers in the whole job."""
    rank: int = 0
    """This process's place among them, from 0."""
    handle: dist.ProcessGroup | None = None
    """None where there is one rank alone."""
    activity: Activity = field(default_factory=Activity)
    traffic: Counter[str] = field(default_factory=Counter)
    """`sent`: bytes that `exchange` has sent to other ranks so far."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.handle is not None:
            with self.activity.communicating(f"sum over {self.name}"):
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], room: int = 0) -> Tensor:
        """[S, ...] -> [sum(received), ...]: `sent[i]` rows, in order, go to rank i, and `received[i]` come from it.

        Rows behind those sent stay here; with a larger `room`, the result has so many, of which the last hold anything.
        """
        if self.handle is None:
            return rows
        width = rows.element_size() * prod(rows.shape[1:])
        flat = as_bytes(rows)[: sum(sent) * width].view(sum(sent), width)
        self.traffic["sent"] += (sum(sent) - sent[self.rank]) * width
        out = flat.new_empty(max(room, sum(received)), width)
        with self.activity.communicating(f"exchange over {self.name}"):
            dist.all_to_all_single(out[: sum(received)], flat, list(received), list(sent), group=self.handle)
        return out.view(rows.dtype).view(len(out), *rows.shape[1:])

    def exchange_all(
        self, tensors: Sequence[Tensor], sent: Sequence[int], received: Sequence[int], room: int = 0
    ) -> list[Tensor]:
        """`exchange` of several that have as many rows."""
        return [self.exchange(each, sent, received, room) for each in tensors]

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """[ranks, n] -> [n]: the sum over the ranks of what is this rank's row."""
        if self.handle is None:
            return parts[0]
        out = torch.empty_like(parts[0])
        # The name is another from torch 2.13 on.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self.activity.communicating(f"scattered sum over {self.name}"):
            scatter(out, parts.flatten(), group=self.handle)
        return out

    def gather(self, part: Tensor) -> Tensor:
        """[n] -> [ranks, n]: every rank's part."""
        if self.handle is None:
            return part.unsqueeze(0)
        out = part.new_empty(self.size, *part.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self.activity.communicating(f"gathering over {self.name}"):
            gather(out.flatten(), part, group=self.handle)
        return out

    def copy_from(self, tensor: Tensor, source: int) -> None:
        """Overwrites the tensor with that of one rank."""
        with self.activity.communicating(f"copying from rank {source} of {self.name}"):
            dist.broadcast(tensor, group=self.handle, group_src=source)

    def post(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> list[Any]:
        """Starts sending tensors to ranks, and receiving others from ranks, in the order given; the works for `wait`."""
        calls = [(dist.isend, *each) for each in sent] + [(dist.irecv, *each) for each in received]
        return dist.batch_isend_irecv(
            [dist.P2POp(call, tensor, group=self.handle, group_peer=peer) for call, tensor, peer in calls]
        )

    def wait(self, works: list[Any], what: str) -> None:
        """Waits for what `post` started; only once, as with gloo a second wait never returns."""
        while works:
            with self.activity.communicating(what):
                works.pop().wait()

    def swap(self, tensor: Tensor, peer: int) -> Tensor:
        """Exchanges a tensor with another rank, which calls this as well; the other's."""
        other = torch.empty_like(tensor)
        self.wait(self.post([(tensor, peer)], [(other, peer)]), f"swapping with rank {peer} of {self.name}")
        return other

    def objects(self, own: Any) -> list[Any]:
        """Every rank's object, in order: anything that can be pickled."""
        if self.handle is None:
            return [own]
        found: list[Any] = [None] * self.size
        with self.activity.communicating(f"talking over {self.name}"):
            dist.all_gather_object(found, own, group=self.handle)
        return found


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [n]: gloo knows fewer dtypes than torch. Through one dimension: that of size one may have any stride."""
    return tensor.contiguous().view(-1).view(torch.uint8)
