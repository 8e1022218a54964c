"""Zeros in the rows behind the last group, and nowhere else."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = (64, 256)
"""Rows of a program, columns that it clears at once."""


@triton.jit
def clear_kernel(out, counts, rows, columns, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert = tl.arange(0, EXPERTS)
    used = tl.sum(tl.load(counts + expert, expert < E, other=0).to(tl.int64))
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start + ROWS > used:
        row = start + tl.arange(0, ROWS)
        nobodys = (row >= used) & (row < rows)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            place = out + row[:, None] * columns + column[None, :]
            tl.store(place, 0.0, nobodys[:, None] & (column < columns)[None, :])


def clear_behind(out_RN: Tensor, counts_E: Tensor) -> Tensor:
    """`out_RN`, contiguous, with zeros in the rows that no expert's counts reach."""
    (rows, columns), (block, width) = out_RN.shape, BLOCK
    clear_kernel[(triton.cdiv(rows, block),)](
        out_RN, counts_E, rows, columns, len(counts_E), triton.next_power_of_2(len(counts_E)), block, width
    )
    return out_RN
