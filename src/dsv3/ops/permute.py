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
    """int64 [R]: the assignment of each row; a padding row repeats assignment 0."""
    row_TK: Tensor
    """int64 [T, K]: the row of each assignment."""
    counts_E: Tensor
    """int64 [E]: rows of each expert, its padding included."""
    real_R: Tensor | None = None
    """bool [R]: False at padding rows; None where there are none."""

    @property
    def token_R(self) -> Tensor:
        """int64 [R]: the token of each row."""
        return self.assignment_R // self.row_TK.shape[1]


def count_by_expert(expert_A: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how many of the assignments (int64 [A]) go to each expert."""
    if expert_A.device.type == "cpu":
        return torch.bincount(expert_A, minlength=num_experts)
    # On a GPU, bincount waits for it, to learn the largest number.
    return expert_A.new_zeros(num_experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))


def sort_by_expert(expert_TK: Tensor, num_experts: int, equal_groups: int = 0) -> Permutation:
    """The permutation that brings the rows of one expert together, tokens in order within it (a stable sort).

    With `equal_groups` = n > 0, every group is padded to the same number of rows, a multiple of n, so that one batched
    product serves all experts.
    """
    expert_A = expert_TK.flatten()
    counts = count_by_expert(expert_A, num_experts)
    assignment_R = torch.argsort(expert_A, stable=True)
    numbers = torch.arange(len(assignment_R), device=assignment_R.device)
    row_A = torch.empty_like(assignment_R)
    if not equal_groups:
        row_A[assignment_R] = numbers
        return Permutation(assignment_R, row_A.view_as(expert_TK), counts)
    capacity = -(-int(counts.max()) // equal_groups) * equal_groups
    within_group = numbers - (counts.cumsum(0) - counts).repeat_interleave(counts)
    row_A[assignment_R] = expert_A[assignment_R] * capacity + within_group
    real_R = torch.zeros(num_experts * capacity, dtype=torch.bool, device=row_A.device)
    real_R[row_A] = True
    padded_R = torch.zeros(num_experts * capacity, dtype=torch.int64, device=row_A.device)
    padded_R[row_A] = numbers
    return Permutation(padded_R, row_A.view_as(expert_TK), torch.full_like(counts, capacity), real_R)


def permute_reference(x_TD: Tensor, to: Permutation) -> Tensor:
    """The definition."""
    return x_TD[to.token_R]


def unpermute_reference(rows_RD: Tensor, weight_TK: Tensor, to: Permutation) -> Tensor:
    """The definition, summed in FP32."""
    return (rows_RD[to.row_TK].float() * weight_TK.unsqueeze(-1)).sum(1).to(rows_RD.dtype)


class Gather(torch.autograd.Function):
    """Backward gathers the K rows of a token and sums them, where autograd of indexing would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        return x_TD.index_select(0, to.token_R)

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
        grad_RD = grad_TD.index_select(0, to.token_R)
        grad_weight_R = torch.linalg.vecdot(grad_RD, rows_RD).to(weight_TK.dtype)
        weight_R = weight_TK.flatten().index_select(0, to.assignment_R)
        if to.real_R is not None:
            weight_R = weight_R * to.real_R
        return grad_RD.mul_(weight_R.unsqueeze(1).to(grad_RD.dtype)), grad_weight_R[to.row_TK], None


permute = Operation(
    "permute",
    [Implementation("gather", Gather.apply, anything), Implementation("reference", permute_reference, anything)],
)
"""`permute(x [T, D], permutation) -> [R, D]`: every token once for each of its experts. Padding rows repeat token 0."""

unpermute = Operation(
    "unpermute",
    [
        Implementation("weighted_sum", WeightedSum.apply, anything),
        Implementation("reference", unpermute_reference, anything),
    ],
)
"""`unpermute(rows [R, D], weight [T, K], permutation) -> [T, D]`: the weighted sum of each token's rows.

Padding rows are read by nobody, and get gradients of zero."""
