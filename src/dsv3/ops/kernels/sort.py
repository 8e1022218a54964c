"""A stable counting sort of assignments by expert: the parts' counts, their prefix sums, every assignment's row.

Legend: as in `dsv3.ops.permute`; a part is a block of consecutive assignments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 128
"""Assignments of a part. Ranks within it are counted by comparing all with all."""
PARTS, EXPERTS = 256, 8
"""Parts at a time, and experts, of a block that sums prefixes."""


@triton.jit
def count_kernel(expert, count, assignments, experts, PART: tl.constexpr, EXPERTS: tl.constexpr):
    part = tl.program_id(0)
    number = part * PART + tl.arange(0, PART)
    own = tl.load(expert + number, mask=number < assignments, other=-1).to(tl.int32)
    each = tl.arange(0, EXPERTS)
    counted = tl.sum((own[:, None] == each[None, :]).to(tl.int32), axis=0)
    tl.store(count + part * experts + each, counted, mask=each < experts)


@triton.jit
def prefix_kernel(count, before, total, parts, experts, PARTS: tl.constexpr, EXPERTS: tl.constexpr):
    each = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    seen = tl.zeros([EXPERTS], tl.int32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (each < experts)[None, :]
        at = part[:, None] * experts + each[None, :]
        counted = tl.load(count + at, mask=inside, other=0)
        tl.store(before + at, seen[None, :] + tl.cumsum(counted, axis=0) - counted, mask=inside)
        seen += tl.sum(counted, axis=0)
    tl.store(total + each, seen, mask=each < experts)


@triton.jit
def place_kernel(
    expert, before, total, assignment, row, real, counts, assignments, experts, aligned,
    PART: tl.constexpr, EXPERTS: tl.constexpr, ALIGNED: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    size = tl.load(total + each, mask=each < experts, other=0)
    if ALIGNED:
        size = (size + aligned - 1) // aligned * aligned
    if part == 0:
        tl.store(counts + each, size.to(tl.int64), mask=each < experts)
    number = part * PART + tl.arange(0, PART)
    inside = number < assignments
    own = tl.load(expert + number, mask=inside, other=-1).to(tl.int32)
    sorted = own >= 0
    # What is summed over lies along the first axis, so that it stays within a thread.
    start = tl.sum(tl.where(each[:, None] < own[None, :], size[:, None], 0), axis=0)
    earlier = (own[:, None] == own[None, :]) & (number[:, None] < number[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=0)
    place = start + rank + tl.load(before + part * experts + own, mask=sorted, other=0)
    tl.store(row + number, tl.where(sorted, place, -1).to(tl.int64), mask=inside)
    tl.store(assignment + place, number.to(tl.int64), mask=sorted)
    if MARKED:
        tl.store(real + place, tl.full([PART], 1, tl.uint8), mask=sorted)


def sort_assignments(
    expert_A: Tensor, num_experts: int, aligned: int, rows: int, marked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(assignment of each row [R], row of each assignment [A], rows of each expert [E], all int64; where `marked`, which rows are
    real [R], bool), for experts int64 [A], -1 for none. Where not `marked`, every row must be some assignment's."""
    device, assignments = expert_A.device, len(expert_A)
    parts, padded = triton.cdiv(assignments, PART), triton.next_power_of_2(num_experts)
    row_A = torch.empty(assignments, dtype=torch.int64, device=device)
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    real_R = torch.zeros(rows, dtype=torch.bool, device=device) if marked else None
    new = torch.zeros if marked else torch.empty
    assignment_R = new(rows, dtype=torch.int64, device=device)
    if not assignments:
        return assignment_R, row_A, counts_E.zero_(), real_R
    count, before = torch.empty(2, parts, num_experts, dtype=torch.int32, device=device)
    total = torch.empty(num_experts, dtype=torch.int32, device=device)
    count_kernel[(parts,)](expert_A, count, assignments, num_experts, PART=PART, EXPERTS=padded, num_warps=4)
    prefix_kernel[(triton.cdiv(num_experts, EXPERTS),)](
        count, before, total, parts, num_experts, PARTS=PARTS, EXPERTS=EXPERTS, num_warps=4
    )
    place_kernel[(parts,)](
        expert_A, before, total, assignment_R, row_A, None if real_R is None else real_R.view(torch.uint8), counts_E,
        assignments, num_experts, aligned, PART=PART, EXPERTS=padded, ALIGNED=aligned > 0, MARKED=marked, num_warps=4,
    )  # fmt: skip
    return assignment_R, row_A, counts_E, real_R
