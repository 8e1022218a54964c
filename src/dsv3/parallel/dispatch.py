"""Experts on many ranks: tokens go to the ranks that hold theirs, and the weighted sums come back (report, section 3.2.2).

A token travels once to every rank that has an expert of its, however many there are; with experts on several nodes it goes
once to each node, to the rank with the sender's place there, and from that one to the ranks that hold its experts. The ranks
that compute weight what experts compute and add it up, so that one row comes back for each that went. No token is dropped.

Legend: T tokens here, D hidden, K experts per token, A rows that arrived, R rows sorted by expert.
"""

import logging
from dataclasses import dataclass

from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.feed_forward import Dispatched, Routing
from dsv3.ops.permute import Permutation, permute, sort_some, unpermute
from dsv3.parallel.copies import CopyingGroup, Open
from dsv3.parallel.leg import Leg, plan_bounded_leg, plan_leg
from dsv3.parallel.mesh import Mesh

log = logging.getLogger(__name__)
CROWDED = 4.0
"""Times its share of the rows from which on a rank says how many it has."""


@dataclass(frozen=True)
class Journey:
    """Where the tokens of one pass went."""

    legs: list[Leg]
    local: Permutation
    """The rows that arrived to the experts here."""


class ExpertParallel:
    """The `model.feed_forward.Dispatcher` of one rank of `mesh.expert`; its twin is the `LocalDispatcher`.

    `fp8` sends tokens, and in backward the gradients of the experts' outputs, in E4M3 with scales of tiles that are powers of
    two; sums and the tokens' gradients travel in the activations' own dtype and are added up in FP32 (report, sections 3.3.3 and 3.4).
    `bounded` sends as many rows as there could be, so that the host need not learn how many there are (`parallel.bounded_exchange`).
    Then windows, where it is said how to open them, carry them within a node (`parallel.transport`).
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

    def dispatch(self, x_TD: Tensor, routing: Routing, alignment: int = 0) -> Dispatched:
        """See `Dispatcher`."""
        rows, weight, expert, span = x_TD, routing.weight, routing.expert, routing.num_experts
        legs: list[Leg] = []
        for group in self.groups:
            span //= group.size
            leg = (plan_bounded_leg if self.bounded else plan_leg)(expert, span, group)
            rows, weight, expert = leg.carry(rows, self.fp8), leg.carry(weight), leg.expert_AK
            legs.append(leg)
        if not self.bounded:
            self.watch(legs[-1].assignments, routing.expert.numel())
        local = sort_some(expert, span, legs[-1].assignments, alignment, self.bounded)
        return Dispatched(permute(rows, local), local.by_row(weight), local.counts_E, Journey(legs, local))

    def combine(self, rows_RD: Tensor, handle: Journey) -> Tensor:
        """See `Dispatcher`."""
        y = unpermute(rows_RD, handle.local)
        for leg in reversed(handle.legs):
            y = leg.bring_back(y, self.fp8)
        return y

    def watch(self, rows: int, share: int) -> None:
        """Says, the first time, that a rank has far more rows than one of as many tokens and even loads would."""
        if rows > CROWDED * share > 0 and not self.crowded:
            self.crowded = True
            log.warning(
                "rank %d of parallel.expert got %d rows, %.0f times its share: experts are chosen unevenly. No token is "
                "dropped; the step is slow, and its memory grows with the rows", self.expert.rank, rows, rows / share,
            )  # fmt: skip
