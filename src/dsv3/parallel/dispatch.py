"""Experts on many ranks: tokens go to the ranks that hold theirs, and the weighted sums come back (report, section 3.2.2).

A token is sent once to every rank that holds any of its experts. With experts on several nodes it is sent once to each node,
to the rank with the sender's place there, which forwards it to the ranks that hold its experts. These weight and sum their
experts' outputs, so that one row comes back for each row sent. No token is dropped.

Legend: T tokens here, D hidden, K experts per token, A rows received, R rows sorted by expert.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.feed_forward import Dispatched, Dispatcher
from dsv3.ops.permute import Permutation, permute, sort_some, unpermute
from dsv3.parallel.leg import Leg, plan_leg
from dsv3.parallel.mesh import Mesh

log = logging.getLogger(__name__)
CROWDED = 4.0
"""A rank with more rows than so many times its share warns of it."""


@dataclass(frozen=True)
class Journey:
    """Where the tokens of one pass went."""

    legs: list[Leg]
    local: Permutation
    """The rows that arrived to the experts here."""


class ExpertParallel(Dispatcher):
    """The `model.feed_forward.Dispatcher` of one rank of `mesh.expert`; its twin is the `LocalDispatcher`.

    `fp8` sends tokens, and in backward the gradients of the experts' outputs, in E4M3 with scales of tiles that are powers of
    two; sums and the tokens' gradients travel in the activations' own dtype and are added up in FP32 (report, sections 3.3.3 and 3.4).
    """

    def __init__(self, mesh: Mesh, fp8: bool = False):
        self.expert, self.fp8 = mesh.expert, fp8
        self.groups = [group for group in (mesh.rail, mesh.node) if group.size > 1]
        self.crowded = False

    def held(self, experts: int) -> range:
        """See `Dispatcher`."""
        each = experts // self.expert.size
        if each * self.expert.size != experts:
            raise UserError(f"{experts} experts cannot be divided over parallel.expert = {self.expert.size} ranks")
        return range(self.expert.rank * each, (self.expert.rank + 1) * each)

    def send(self, parcel: Any) -> Any:
        """See `Dispatcher`."""
        rows, routing, alignment = parcel
        weight, expert, span = routing.weight, routing.expert, routing.num_experts
        legs, assignments = list[Leg](), 0
        for group in self.groups:
            span //= group.size
            leg, expert, assignments = plan_leg(expert, span, group)
            rows, weight = leg.there(permute(rows, leg.to), self.fp8), leg.there(permute(weight, leg.to))
            legs.append(leg)
        self.watch(assignments, routing.expert.numel())
        local = sort_some(expert, span, assignments, alignment)
        return Dispatched(permute(rows, local), local.by_row(weight), local.counts_E, Journey(legs, local))

    def send_back(self, rows: Tensor, handle: Journey) -> Tensor:
        """See `Dispatcher`."""
        rows = unpermute(rows, handle.local)
        for leg in reversed(handle.legs):
            rows = unpermute(leg.back(rows, self.fp8), leg.to)
        return rows

    def watch(self, rows: int, share: int) -> None:
        """Warns once when this rank has far more rows than with even loads."""
        if rows > CROWDED * share > 0 and not self.crowded:
            self.crowded = True
            log.warning(
                "rank %d of parallel.expert got %d rows, %.0f times its share: experts are chosen unevenly. No token is "
                "dropped; the step is slow, and its memory grows with the rows", self.expert.rank, rows, rows / share,
            )  # fmt: skip
