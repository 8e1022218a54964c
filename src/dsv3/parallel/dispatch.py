"""Experts on many ranks: tokens go to the ranks that hold theirs, and the weighted sums come back (report, section 3.2.2).

A token is sent once to every rank that holds any of its experts. With experts on several nodes it is sent once to each node,
to the rank with the sender's place there, which forwards it to the ranks that hold its experts. These weight and sum their
experts' outputs, so that one row comes back for each row sent. No token is dropped.

Beside products that fill a GPU every kernel has to wait for its turn, so the communicating phases do little but exchange: rows
are laid out before them and sorted after them.

Legend: T tokens here, D hidden, K experts per token, S rows that could be sent, A rows received, R rows sorted by expert.
"""

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.feed_forward import Dispatched, Dispatcher, Routing
from dsv3.ops.permute import Permutation, permute, sort_by_expert, unpermute
from dsv3.parallel.copies import CopyingGroup, Open
from dsv3.parallel.leg import Leg, plan_leg
from dsv3.parallel.mesh import Mesh

log = logging.getLogger(__name__)
CROWDED = 4.0
"""A rank with more rows than so many times its share warns of it."""


@dataclass(frozen=True)
class Parcel:
    """Tokens on a leg, before its exchange or after it."""

    rows: Tensor
    """[S, D], then [A, D]."""
    slip: Tensor
    """FP32 [S, 2 K], then [A, 2 K]: each row's weights and experts, counted as on the leg; -1 for those elsewhere."""
    legs: list[Leg]
    """This one is the last."""
    span: int
    """Experts that each rank of its group has."""
    alignment: int
    """See `Dispatcher.pack`."""

    @property
    def weight(self) -> Tensor:
        """FP32 [.., K]."""
        return self.slip.chunk(2, dim=1)[0]

    @property
    def expert(self) -> Tensor:
        """int64 [A, K]: the experts of the rows received, counted from this rank's first; -1 for those elsewhere."""
        own = self.slip.detach().chunk(2, dim=1)[1].long() - self.legs[-1].group.rank * self.span
        return own.masked_fill((own < 0) | (own >= self.span), -1)


class Journey(NamedTuple):
    """Where the tokens of one pass went."""

    legs: list[Leg]
    local: Permutation
    """The rows that arrived to the experts here."""


class ExpertParallel(Dispatcher):
    """The `model.feed_forward.Dispatcher` of one rank of `mesh.expert`, which are several; its twin is the `LocalDispatcher`.

    `fp8` sends tokens, and in backward the gradients of the experts' outputs, in E4M3 with scales of tiles that are powers of
    two; sums and the tokens' gradients travel in the activations' own dtype and are added up in FP32 (report, sections 3.3.3 and 3.4).

    `bounded` (`parallel.bounded_exchange`) always sends the largest number of rows there could be, so that the host need not read the
    counts; results are the same to the bit. With `open_window`, which needs it, rows within a node go through windows
    (`parallel.transport = "copy"`).
    """

    def __init__(self, mesh: Mesh, fp8: bool = False, bounded: bool = False, open_window: Open | None = None):
        self.expert, self.fp8, self.bounded = mesh.expert, fp8, bounded
        node = mesh.node if open_window is None else CopyingGroup.of(mesh.node, open_window)
        self.groups = [group for group in (mesh.rail, node) if group.size > 1]
        self.crowded = False

    def held(self, experts: int) -> range:
        """See `Dispatcher`."""
        each = experts // self.expert.size
        if each * self.expert.size != experts:
            raise UserError(f"{experts} experts cannot be divided over parallel.expert = {self.expert.size} ranks")
        return range(self.expert.rank * each, (self.expert.rank + 1) * each)

    def pack(self, x_TD: Tensor, routing: Routing, alignment: int = 0) -> Parcel:
        """See `Dispatcher`: rows laid out for the first leg."""
        whole = Parcel(x_TD, routing.weight, [], routing.num_experts, alignment)
        return self.next_leg(whole, routing.weight, routing.expert)

    def next_leg(self, parcel: Parcel, weight_TK: Tensor, expert_TK: Tensor) -> Parcel:
        """The rows here laid out for the next leg. Of one behind the first, room is made only for what is sent."""
        group = self.groups[len(parcel.legs)]
        span = parcel.span // group.size
        leg, expert_SK = plan_leg(expert_TK, span, group, self.bounded)
        if parcel.legs and not self.bounded:
            leg = leg.measured()
            expert_SK = expert_SK[: sum(leg.sent)]
            leg = replace(leg, to=replace(leg.to, assignment_R=leg.to.assignment_R[: len(expert_SK)], real_R=None))
        slip = torch.cat((permute(weight_TK, leg.to), expert_SK.float()), dim=1)
        return replace(parcel, rows=permute(parcel.rows, leg.to), slip=slip, legs=[*parcel.legs, leg], span=span)

    def send(self, parcel: Parcel) -> Parcel:
        """See `Dispatcher`: all legs."""
        if not self.bounded:
            parcel = replace(parcel, legs=[parcel.legs[0].measured()])
        for number in range(len(self.groups)):
            if number:
                parcel = self.next_leg(parcel, parcel.weight, parcel.expert)
            rows, slip = parcel.legs[-1].there(parcel.rows, parcel.slip, self.fp8)
            parcel = replace(parcel, rows=rows, slip=slip)
        return parcel

    def unpack(self, parcel: Parcel) -> Dispatched:
        """See `Dispatcher`: rows sorted by expert; of a bounded exchange, those without one last."""
        expert, assignments = parcel.expert, parcel.legs[-1].assigned
        if self.bounded:
            assignments = len(expert) * min(expert.shape[1], parcel.span)
        else:
            self.watch(assignments, parcel.legs[0].to.row_TK.numel())
        local = sort_by_expert(expert, parcel.span, aligned=parcel.alignment, some=assignments, bounded=self.bounded)
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

    def watch(self, rows: int, share: int) -> None:
        """Warns once when this rank has far more rows than with even loads."""
        if rows > CROWDED * share > 0 and not self.crowded:
            self.crowded = True
            log.warning(
                "rank %d of parallel.expert got %d rows, %.0f times its share: experts are chosen unevenly. No token is "
                "dropped; the step is slow, and its memory grows with the rows", self.expert.rank, rows, rows / share,
            )  # fmt: skip
