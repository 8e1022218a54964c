"""Experts on many ranks, always sending the largest number of rows there could be, so that the host need not read the counts.

Its twin is the exact `ExpertParallel`, with the same results to the bit. Beside products that fill a GPU every kernel has to wait
for its turn, so the communicating phases do nothing but exchange: rows are laid out before them and sorted after them.

Legend: as in `dsv3.parallel.leg`.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from dsv3.model.feed_forward import Dispatched, Routing
from dsv3.ops.permute import permute, sort_some, unpermute
from dsv3.parallel.copies import CopyingGroup, Open
from dsv3.parallel.dispatch import ExpertParallel, Journey
from dsv3.parallel.leg import Leg, on_this_rank, plan_bounded_leg
from dsv3.parallel.mesh import Mesh


@dataclass(frozen=True)
class Slabs:
    """Tokens on a leg, before its exchange or after it."""

    rows: Tensor
    """[S, D], then [A, D]."""
    weight: Tensor
    """FP32 [S, K], then [A, K]."""
    expert: Tensor
    """int32 [S, K], then [A, K]: counted as the senders do; -1 for none."""
    legs: list[Leg]
    """This one is the last."""
    span: int
    """Experts that each rank of its group has."""
    alignment: int
    """See `Dispatcher.pack`."""


class BoundedExpertParallel(ExpertParallel):
    """`parallel.bounded_exchange`. With `open_window`, slabs within a node go through windows (`parallel.transport = "copy"`)."""

    def __init__(self, mesh: Mesh, fp8: bool = False, open_window: Open | None = None):
        node = mesh.node if open_window is None else CopyingGroup.of(mesh.node, open_window)
        super().__init__(replace(mesh, node=node), fp8)

    def pack(self, x_TD: Tensor, routing: Routing, alignment: int = 0) -> Slabs:
        """See `Dispatcher`: the slabs of the first leg."""
        whole = Slabs(x_TD, routing.weight, routing.expert, [], routing.num_experts, alignment)
        return self.next_leg(whole, whole.expert)

    def next_leg(self, slabs: Slabs, expert_TK: Tensor) -> Slabs:
        """The rows received, laid out for the next leg."""
        group = self.groups[len(slabs.legs)]
        span = slabs.span // group.size
        leg, expert = plan_bounded_leg(expert_TK, span, group)
        rows, weight = permute(slabs.rows, leg.to), permute(slabs.weight, leg.to)
        return Slabs(rows, weight, expert, [*slabs.legs, leg], span, slabs.alignment)

    def send(self, parcel: Slabs) -> Slabs:
        """See `Dispatcher`: all legs."""
        for number, group in enumerate(self.groups):
            if number:
                parcel = self.next_leg(parcel, here(parcel))
            leg = parcel.legs[-1]
            expert = group.exchange(parcel.expert, leg.sent, leg.received)
            parcel = replace(
                parcel, rows=leg.there(parcel.rows, self.fp8), weight=leg.there(parcel.weight), expert=expert
            )
        return parcel

    def unpack(self, parcel: Slabs) -> Dispatched:
        """See `Dispatcher`: rows sorted by expert, those without one last."""
        expert = here(parcel)
        room = len(expert) * min(expert.shape[1], parcel.span)
        local = sort_some(expert, parcel.span, room, parcel.alignment, bounded=True)
        rows, weight = permute(parcel.rows, local), local.by_row(parcel.weight)
        return Dispatched(rows, weight, local.counts_E, Journey(parcel.legs, local))

    def pack_back(self, rows_RD: Tensor, handle: Journey) -> Tensor:
        """See `Dispatcher`: one row for each that arrived."""
        return unpermute(rows_RD, handle.local)

    def send_back(self, rows: Tensor, handle: Journey) -> Tensor:
        """See `Dispatcher`: all legs, the last one first."""
        first, *others = handle.legs
        for leg in reversed(others):
            rows = unpermute(leg.back(rows, self.fp8), leg.to)
        return first.back(rows, self.fp8)

    def unpack_back(self, rows: Tensor, handle: Journey) -> Tensor:
        """See `Dispatcher`."""
        return unpermute(rows, handle.legs[0].to)


def here(slabs: Slabs) -> Tensor:
    """int64 [A, K]: the experts of the rows received, counted from this rank's first; -1 for those elsewhere."""
    return on_this_rank(slabs.expert, slabs.span, slabs.legs[-1].group)
