"""One leg of the way from tokens to their experts: every token once to each rank of a group that has experts of its own.

Legend: T tokens here, D hidden, K experts per token, S rows that could be sent, A rows received, G ranks of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.permute import Permutation, with_rows
from dsv3.ops.tiles import Tiles, dequantize_rows, empty_scale, quantize_rows
from dsv3.parallel.group import Group


@dataclass(frozen=True)
class Leg:
    """The plan of one leg for one pass; made once, used there, back, and in backward."""

    group: Group
    to: Permutation
    """Where each token's row lies among those sent: ranks take the place of experts. Of a token's experts on one rank, the
    first alone has a row."""
    due_G2: Tensor
    """int64: rows that go to each rank, and assignments to its experts."""
    sent: Sequence[int] = ()
    received: Sequence[int] = ()
    """Rows to each rank and from it: of a bounded leg from the beginning, of an exact one once it is `measured`."""
    assigned: int = 0
    """Assignments to this rank's experts, of an exact leg."""

    def measured(self) -> "Leg":
        """With the sizes of an exact leg. Waits for the device, to learn how many rows go where; all ranks of the group must call
        it together."""
        arriving_G2 = self.group.exchange(self.due_G2, [1] * self.group.size, [1] * self.group.size)
        sent, received, assigned = torch.stack([self.due_G2[:, 0], *arriving_G2.t()]).tolist()
        return replace(self, sent=sent, received=received, assigned=sum(assigned))

    def there(self, rows_SD: Tensor, slip_S: Tensor, fp8: bool = False) -> tuple[Tensor, Tensor]:
        """[S, D], [S, n] -> [A, D], [A, n], ordered by the rank they came from. `fp8`: rows are sent as E4M3 with scales that are
        powers of two. The backward pass is `back` in the rows' dtype."""
        rows_AD, slip_A = Carried.apply(self, True, fp8, rows_SD, slip_S)
        return rows_AD, slip_A

    def back(self, rows_AD: Tensor, fp8: bool = False) -> Tensor:
        """[A, D] -> [S, D], where rows behind those that come back hold anything. Backward is `there`, in FP8 if `fp8`."""
        (rows_SD,) = Carried.apply(self, False, fp8, rows_AD)
        return rows_SD

    def carry(self, there: bool, fp8: bool, rows: Tensor, *others: Tensor) -> list[Tensor]:
        """Either way without graph. Scales are powers of two: FP8 rows may be quantised again on the way without further loss."""
        if not there:
            return self.group.exchange_all([rows, *others], self.received, self.sent, len(self.to.assignment_R))
        if not fp8:
            return self.group.exchange_all([rows, *others], self.sent, self.received)
        tiles = quantize_rows(rows, True)
        sent = [tiles.values, tiles.scale, *others]
        values, arrived, *others_there = self.group.exchange_all(sent, self.sent, self.received)
        scale = empty_scale(len(values), values.shape[1], values.device)
        return [dequantize_rows(Tiles(values, scale.copy_(arrived)), rows.dtype), *others_there]


class Carried(torch.autograd.Function):
    """`Leg.carry`, whose backward pass is the other way."""

    @staticmethod
    def forward(ctx: Any, leg: Leg, there: bool, fp8: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Rows, and what goes with them."""
        ctx.leg, ctx.there, ctx.fp8 = leg, there, fp8
        return tuple(leg.carry(there, fp8, *tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Their gradients."""
        return None, None, None, *ctx.leg.carry(not ctx.there, ctx.fp8, *grads)


def plan_leg(expert_TK: Tensor, span: int, group: Group, bounded: bool) -> tuple[Leg, Tensor]:
    """The leg of tokens to the ranks of `group`, each of which has `span` experts: expert e (-1: none) is with rank e // span.

    With it the experts of each row that could be sent (int64 [S, K]; -1 for none). Nobody waits: there is room for as many rows as
    there could be. A `bounded` leg sends each rank as many as there are tokens here; all ranks of the group must have equally many.
    """
    (tokens, chosen), ranks = expert_TK.shape, group.size
    rank_TK = expert_TK.div(span, rounding_mode="floor")
    first_TK = first_on_rank(rank_TK)
    each_G11 = torch.arange(ranks, device=expert_TK.device).view(-1, 1, 1)
    due_GT = (first_TK == each_G11).any(2).long()
    rows_G, assignments_G = due_GT.sum(1), (rank_TK == each_G11).sum((1, 2))
    start_G = each_G11.flatten() * tokens if bounded else rows_G.cumsum(0) - rows_G
    place_TG = (start_G.unsqueeze(1) + due_GT.cumsum(1) - 1).t()
    row_TK = place_TG.gather(1, first_TK.clamp(min=0)).masked_fill(first_TK < 0, -1)
    to = with_rows(row_TK, tokens * (ranks if bounded else min(ranks, chosen)), rows_G)
    assert to.real_R is not None
    expert_SK = expert_TK.index_select(0, to.token_R).masked_fill(~to.real_R.unsqueeze(1), -1)
    sizes = [tokens] * ranks if bounded else []
    return Leg(group, to, torch.stack([rows_G, assignments_G], dim=1), sizes, sizes), expert_SK


def first_on_rank(rank_TK: Tensor) -> Tensor:
    """Each token's ranks, every one once, where it stands first; -1 elsewhere."""
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    return rank_TK.masked_fill(same_TKK.tril(-1).any(2), -1)
