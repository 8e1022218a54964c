"""One leg of the way from tokens to their experts: every token once to each rank of a group that has experts of its own.

Legend: T tokens here, D hidden, K experts per token, S rows sent, A rows received, G ranks of the group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.permute import Permutation, count_by_expert, sort_some, with_rows
from dsv3.ops.tiles import Tiles, dequantize_rows, empty_scale, quantize_rows
from dsv3.parallel.group import Group


@dataclass(frozen=True)
class Leg:
    """The plan of one leg for one pass; made once, used there, back, and in backward."""

    group: Group
    to: Permutation
    """Where each token's row lies among those sent: ranks take the place of experts. Of a token's experts on one rank, the
    first alone has a row."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""

    def there(self, rows_SD: Tensor, fp8: bool = False) -> Tensor:
        """[S, D] -> [A, D], ordered by the rank they came from. `fp8`: sent as E4M3 with scales that are powers of two. The
        backward pass is `back` in the rows' dtype."""
        return Exchange.apply(rows_SD, self.group, self.sent, self.received, fp8, False)

    def back(self, rows_AD: Tensor, fp8: bool = False) -> Tensor:
        """[A, D] -> [S, D]. Backward is `there`, in FP8 if `fp8`."""
        return Exchange.apply(rows_AD, self.group, self.received, self.sent, False, fp8)


def plan_leg(expert_TK: Tensor, span: int, group: Group) -> tuple[Leg, Tensor, int]:
    """The leg of tokens to the ranks of `group`, each of which has `span` experts: expert e (-1: none) is with rank e // span.

    With it the experts of each row that arrived (int64 [A, K], counted from this rank's first, -1 for those elsewhere), and how many
    of these are not -1. Waits for the device, to learn how many rows go where; all ranks of the group must call it together.
    """
    rank_TK = expert_TK.div(span, rounding_mode="floor")
    first_TK = first_on_rank(rank_TK)
    # Without those that are -1.
    rows, assignments = (count_by_expert(each.flatten() + 1, group.size + 1)[1:] for each in (first_TK, rank_TK))
    counts = torch.stack([rows, assignments], dim=1)
    arriving = group.exchange(counts, [1] * group.size, [1] * group.size)
    sent, received, assigned = torch.stack([counts[:, 0], arriving[:, 0], arriving[:, 1]]).tolist()
    to = sort_some(first_TK, group.size, sum(sent))
    expert_AK = group.exchange(expert_TK.index_select(0, to.token_R).int(), sent, received)
    return Leg(group, to, sent, received), on_this_rank(expert_AK, span, group), sum(assigned)


def plan_bounded_leg(expert_TK: Tensor, span: int, group: Group) -> tuple[Leg, Tensor]:
    """The same without waiting: every rank is sent as many rows as there are tokens here, the most it can be due.

    Those due come first, in the order of the exact leg; the others hold anything, and have no experts. All ranks of the group must
    have equally many tokens, as in training they do. With it the experts of each row to be sent (int32 [S, K]).
    """
    tokens, ranks = len(expert_TK), group.size
    first_TK = first_on_rank(expert_TK.div(span, rounding_mode="floor"))
    due_TG = (first_TK.unsqueeze(2) == torch.arange(ranks, device=first_TK.device)).any(1).long()
    place_TK = (due_TG.cumsum(0) - 1).gather(1, first_TK.clamp(min=0))
    row_TK = (first_TK * tokens + place_TK).masked_fill(first_TK < 0, -1)
    to = with_rows(row_TK, ranks * tokens, due_TG.sum(0))
    assert to.real_R is not None
    expert_SK = expert_TK.index_select(0, to.token_R).masked_fill(~to.real_R.unsqueeze(1), -1)
    return Leg(group, to, [tokens] * ranks, [tokens] * ranks), expert_SK.int()


def first_on_rank(rank_TK: Tensor) -> Tensor:
    """Each token's ranks, every one once, where it stands first; -1 elsewhere."""
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    return rank_TK.masked_fill(same_TKK.tril(-1).any(2), -1)


def on_this_rank(expert_AK: Tensor, span: int, group: Group) -> Tensor:
    """int64: the experts counted from this rank's first, -1 for those of others."""
    own_AK = expert_AK.long() - group.rank * span
    return own_AK.masked_fill((own_AK < 0) | (own_AK >= span), -1)


class Exchange(torch.autograd.Function):
    """`Group.exchange` of rows [S, D], forward or backward in FP8."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Group, sent: list[int], received: list[int], fp8: bool, backward_fp8: bool
    ) -> Tensor:
        """[A, D]."""
        ctx.group, ctx.sent, ctx.received, ctx.backward_fp8 = group, sent, received, backward_fp8
        return payload(rows, group, sent, received, fp8)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same way back."""
        return payload(grad, ctx.group, ctx.received, ctx.sent, ctx.backward_fp8), None, None, None, None, None


def payload(rows: Tensor, group: Group, sent: list[int], received: list[int], fp8: bool) -> Tensor:
    """The rows received, in the dtype of those sent. Rows sent in FP8 can be quantised again on the way without further loss,
    because their scales are powers of two."""
    if not fp8 or group.size == 1:
        return group.exchange(rows, sent, received)
    tiles = quantize_rows(rows, True)
    values = group.exchange(tiles.values, sent, received)
    scale = empty_scale(len(values), values.shape[1], values.device)
    scale.copy_(group.exchange(tiles.scale, sent, received))
    return dequantize_rows(Tiles(values, scale), rows.dtype)
