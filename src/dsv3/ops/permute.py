"""Rows of tokens to rows of experts and back.

Legend: T tokens, K experts per token, A = T K assignments, E experts, R rows sorted by expert (A, and padding where asked
for), D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, on_gpu


@dataclass(frozen=True)
class Permutation:
    """Which assignment (token t, its k-th expert; numbered t K + k) each row holds."""

    assignment_R: Tensor
    """int64 [R]: the assignment of each row; a row that is not real repeats assignment 0."""
    row_TK: Tensor
    """int64 [T, K]: the row of each assignment; -1 for one that has none, in a partial permutation."""
    counts_E: Tensor
    """int64 [E]: rows of each expert, its padding included; groups follow one another from row 0."""
    real_R: Tensor | None = None
    """bool [R]: False at padding rows, and at those behind the last group; None where there are none."""
    partial: bool = False
    """Whether some assignments have no row."""

    @property
    def token_R(self) -> Tensor:
        """int64 [R]: the token of each row."""
        return self.assignment_R // self.row_TK.shape[1]

    def by_row(self, weight_TK: Tensor) -> Tensor:
        """[R]: each row's own of a value an assignment; zeros for rows that are not real."""
        weight_R: Tensor = ByRow.apply(weight_TK, self)
        return weight_R


def count_by_expert(expert_A: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how many of the assignments (int64 [A]) go to each expert."""
    if expert_A.device.type == "cpu":
        return torch.bincount(expert_A, minlength=num_experts)
    # On a GPU, bincount waits for it, to learn the largest number.
    return expert_A.new_zeros(num_experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))


def sort_reference(
    expert_TK: Tensor, num_experts: int, equal_groups: int = 0, aligned: int = 0, some: int | None = None,
    bounded: bool = False,
) -> Permutation:  # fmt: skip
    """The definition, by a stable sort of numbers that are the experts'; those without one are a last group."""
    expert_A, partial = expert_TK.flatten(), some is not None
    if partial:
        expert_A = expert_A % (num_experts + 1)
    counts = count_by_expert(expert_A, num_experts + partial)
    order = torch.argsort(expert_A, stable=True)[:some]
    padded, rows = counts, len(order)
    if equal_groups:
        capacity = -(-int(counts.max()) // equal_groups) * equal_groups
        padded, rows = torch.full_like(counts, capacity), num_experts * capacity
    elif aligned:
        padded, rows = (counts + aligned - 1) // aligned * aligned, aligned_rows(rows, num_experts, aligned)
    row_R = torch.arange(len(order), device=order.device)
    if padded is not counts:
        row_R += ((padded.cumsum(0) - padded) - (counts.cumsum(0) - counts))[expert_A[order]]
    row_A = torch.empty_like(expert_A)
    row_A[order] = row_R
    row_TK = row_A.view_as(expert_TK)
    if partial:
        row_TK.masked_fill_(expert_TK < 0, -1)
    if padded is counts and not bounded:
        return Permutation(order, row_TK, counts[:num_experts], partial=partial)
    return with_rows(row_TK, rows, padded[:num_experts], partial)


def with_rows(row_TK: Tensor, rows: int, counts_E: Tensor, partial: bool = True) -> Permutation:
    """The permutation of assignments whose rows are known (int64 [T, K], -1: none), of so many rows; nobody waits."""
    row_A = row_TK.flatten()
    # What has no row is written behind the last one.
    at_A = row_A.masked_fill(row_A < 0, rows)
    assignment_R = row_A.new_zeros(rows + 1).scatter_(0, at_A, torch.arange(len(row_A), device=row_A.device))
    real_R = torch.zeros(rows + 1, dtype=torch.bool, device=row_A.device).scatter_(0, at_A, True)
    return Permutation(assignment_R[:rows], row_TK, counts_E, real_R[:rows], partial)


def aligned_rows(assignments: int, num_experts: int, aligned: int) -> int:
    """Rows that hold any distribution of the assignments over experts whose groups start at multiples of `aligned`."""
    return -(-assignments // aligned) * aligned + num_experts * aligned


def counting_sort(
    expert_TK: Tensor, num_experts: int, equal_groups: int = 0, aligned: int = 0, some: int | None = None,
    bounded: bool = False,
) -> Permutation:  # fmt: skip
    """By counts of parts and their prefix sums: three kernels, and nothing that the host would have to wait for."""
    from dsv3.ops.kernels.sort import sort_assignments

    rows, marked = expert_TK.numel() if some is None else some, aligned > 0 or bounded
    room = aligned_rows(rows, num_experts, aligned) if aligned else rows
    assignment_R, row_A, counts_E, real_R = sort_assignments(expert_TK.flatten(), num_experts, aligned, room, marked)
    return Permutation(assignment_R, row_A.view_as(expert_TK), counts_E, real_R, some is not None)


def sorts_on_gpu(
    expert_TK: Tensor, num_experts: int, equal_groups: int = 0, *others: object, **named: object
) -> str | None:
    """Groups of equal size are the CPU's."""
    return "sorts without equal groups" if equal_groups else no_triton(expert_TK)


def permute_reference(x_TD: Tensor, to: Permutation) -> Tensor:
    """The definition."""
    return x_TD[to.token_R]


def unpermute_reference(rows_RD: Tensor, to: Permutation) -> Tensor:
    """The definition, summed in FP32."""
    rows_TKD = torch.stack([row_of(rows_RD, to, k) for k in range(to.row_TK.shape[1])], dim=1)
    return rows_TKD.float().sum(1).to(rows_RD.dtype)


def row_of(rows_RD: Tensor, to: Permutation, k: int) -> Tensor:
    """[T, D]: the row of every token's k-th assignment; zeros where it has none."""
    row_T = to.row_TK[:, k]
    if not to.partial:
        return rows_RD.index_select(0, row_T)
    return rows_RD.index_select(0, row_T.clamp(min=0)).masked_fill((row_T < 0).unsqueeze(1), 0)


def sum_of_rows(rows_RD: Tensor, to: Permutation) -> Tensor:
    """[T, D]: a token's K rows gathered one k at a time, so that no [T, K, D] copy is made."""
    y_TD = row_of(rows_RD, to, 0)
    for k in range(1, to.row_TK.shape[1]):
        y_TD += row_of(rows_RD, to, k)
    return y_TD


class ByRow(torch.autograd.Function):
    """Backward reads the one row of each assignment, where autograd of indexing would add to it with atomics."""

    @staticmethod
    def forward(ctx: Any, weight_TK: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        weight_R = weight_TK.flatten().index_select(0, to.assignment_R)
        return weight_R if to.real_R is None else weight_R * to.real_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None]:
        to: Permutation = ctx.to
        grad_TK = grad_R[to.row_TK]
        return grad_TK.masked_fill(to.row_TK < 0, 0) if to.partial else grad_TK, None


class Gather(torch.autograd.Function):
    """Backward sums a token's K rows, where autograd of indexing would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        return x_TD.index_select(0, to.token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return sum_of_rows(grad_RD, ctx.to), None


class Sum(torch.autograd.Function):
    """`sum_of_rows`, and back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        return sum_of_rows(rows_RD, to)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        to: Permutation = ctx.to
        grad_RD = grad_TD.index_select(0, to.token_R)
        return grad_RD if to.real_R is None else grad_RD.masked_fill_(~to.real_R.unsqueeze(1), 0), None


class Copied(torch.autograd.Function):
    """Kernels that read a token once and write it to its K rows, and that sum the K rows' gradients in FP32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Permutation) -> Tensor:
        from dsv3.ops.kernels.permute import copy_rows

        ctx.row_TK = to.row_TK
        return copy_rows(x_TD, to.row_TK, len(to.assignment_R), to.real_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        from dsv3.ops.kernels.permute import sum_rows

        return sum_rows(grad_RD, ctx.row_TK), None


class Summed(torch.autograd.Function):
    """The same kernels the other way round."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, to: Permutation) -> Tensor:
        from dsv3.ops.kernels.permute import sum_rows

        ctx.to = to
        return sum_rows(rows_RD, to.row_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        from dsv3.ops.kernels.permute import copy_rows

        to: Permutation = ctx.to
        return copy_rows(grad_TD, to.row_TK, len(to.assignment_R), to.real_R), None


sort_by_expert = Operation(
    "sort_by_expert",
    [
        Implementation("counting_sort", counting_sort, sorts_on_gpu),
        Implementation("reference", sort_reference, anything),
    ],
)
"""`sort_by_expert(expert [T, K] int64, num_experts, equal_groups=0, aligned=0, some=None, bounded=False) -> Permutation`: it brings the
rows of one expert together, tokens in order within it (a stable sort).

With `equal_groups` = n > 0, every group is padded to the same number of rows, a multiple of n, so that one batched product
serves all experts; their number is read back from the device.
With `aligned` = n > 0, every group starts at a multiple of n, its padding counted with it, and there are
`round_up(T K, n) + E n` rows whatever the distribution, so that no host has to know it; those behind the last group are
nobody's. Products in FP8 need groups of whole tiles (n = 128).
With `some` = n, assignments whose expert is -1 have no row, and n are left, which the caller must know; or n at most, where `bounded`:
the rows behind the last group are nobody's then."""

permute = Operation(
    "permute",
    [
        Implementation("triton", Copied.apply, on_gpu),
        Implementation("gather", Gather.apply, anything),
        Implementation("reference", permute_reference, anything),
    ],
)
"""`permute(x [T, D], permutation) -> [R, D]`: every token once for each of its experts.

Rows that are not real hold finite values that mean nothing: zeros, or token 0. Backward reads only real rows."""

unpermute = Operation(
    "unpermute",
    [
        Implementation("triton", Summed.apply, on_gpu),
        Implementation("sum", Sum.apply, anything),
        Implementation("reference", unpermute_reference, anything),
    ],
)
"""`unpermute(rows [R, D], permutation) -> [T, D]`: the sum of each token's rows. Experts have weighted them: see `swiglu`.

Rows that are not real are read by nobody, and get gradients of zero."""
