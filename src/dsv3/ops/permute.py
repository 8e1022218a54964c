"""Rows of tokens to rows of experts and back.

Legend: T tokens, K experts per token, E experts, R = T K rows sorted by expert, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything


@dataclass(frozen=True)
class Permutation:
    """Which assignment (token t, its k-th expert; numbered t K + k) each row holds."""

    assignment_R: Tensor
    """int64 [R]: the assignment of each row."""
    row_TK: Tensor
    """int64 [T, K]: the row of each assignment; the inverse of `assignment_R`."""
    counts_E: Tensor
    """int64 [E]: rows of each expert."""


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> Permutation:
    """The permutation that brings the rows of one expert together, tokens in order within it (a stable sort)."""
    expert_A = expert_TK.flatten()
    assignment_R = torch.argsort(expert_A, stable=True)
    row_A = torch.empty_like(assignment_R)
    row_A[assignment_R] = torch.arange(len(assignment_R), device=assignment_R.device)
    return Permutation(assignment_R, row_A.view_as(expert_TK), torch.bincount(expert_A, minlength=num_experts))


def permute_reference(x_TD: Tensor, to: Permutation) -> Tensor:
    """The definition."""
    return x_TD[to.assignment_R // to.row_TK.shape[1]]


def unpermute_reference(rows_RD: Tensor, weight_TK: Tensor, to: Permutation) -> Tensor:
    """The definition, summed in FP32."""
    return (rows_RD[to.row_TK].float() * weight_TK.unsqueeze(-1)).sum(1).to(rows_RD.dtype)


class Gather(torch.autograd.Function):
    """Backward gathers the K rows of a token and sums them, where autograd of indexing would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        return x_TD.index_select(0, to.assignment_R // to.row_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        row_TK: Tensor = ctx.to.row_TK
        grad_TD = grad_RD.index_select(0, row_TK[:, 0])
        for k in range(1, row_TK.shape[1]):
            grad_TD += grad_RD.index_select(0, row_TK[:, k])
        return grad_TD, None


class WeightedSum(torch.autograd.Function):
    """A token's K rows gathered one k at a time, so that no [T, K, D] copy is made."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, to: Permutation) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_TK)
        ctx.to = to
        weights = weight_TK.to(rows_RD.dtype)
        y_TD = rows_RD.index_select(0, to.row_TK[:, 0]).mul_(weights[:, 0:1])
        for k in range(1, weights.shape[1]):
            y_TD.addcmul_(rows_RD.index_select(0, to.row_TK[:, k]), weights[:, k : k + 1])
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weight_TK = ctx.saved_tensors
        to: Permutation = ctx.to
        grad_RD = grad_TD.index_select(0, to.assignment_R // weight_TK.shape[1])
        grad_weight_R = torch.linalg.vecdot(grad_RD, rows_RD).to(weight_TK.dtype)
        weight_R = weight_TK.flatten().index_select(0, to.assignment_R)
        return grad_RD.mul_(weight_R.unsqueeze(1).to(grad_RD.dtype)), grad_weight_R[to.row_TK], None


permute = Operation(
    "permute",
    [Implementation("gather", Gather.apply, anything), Implementation("reference", permute_reference, anything)],
)
"""`permute(x [T, D], permutation) -> [R, D]`: every token once for each of its experts."""

unpermute = Operation(
    "unpermute",
    [
        Implementation("weighted_sum", WeightedSum.apply, anything),
        Implementation("reference", unpermute_reference, anything),
    ],
)
"""`unpermute(rows [R, D], weight [T, K], permutation) -> [T, D]`: the weighted sum of each token's rows."""
