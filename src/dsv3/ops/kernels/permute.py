"""Rows of tokens to rows of experts and back. Every row is read once and written once, in whole lines of memory; assignments
without a row (-1) are passed over.

Legend: as in `dsv3.ops.permute`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_WARPS = {"copy": (1024, 4), "sum": (1024, 4)}
"""Columns that a block takes at a time, and its warps, for each kernel: eight BF16 elements a thread."""
PADDING_ROWS = 8
"""Rows that a block looks at for padding."""


def block(kind: str, columns: int, config: tuple[int, int] | None) -> tuple[int, int]:
    """(columns of a block, warps); narrow rows take fewer."""
    wanted, warps = config or COLUMNS_WARPS[kind]
    size = min(wanted, triton.next_power_of_2(columns))
    return size, max(1, min(warps, size // 256))


@triton.jit
def clear_padding(out, real, first, rows, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    padding = tl.load(real + row, mask=row < rows, other=1) == 0
    start = out + row[:, None].to(tl.int64) * columns
    zeros = tl.zeros([ROWS, COLUMNS], out.dtype.element_ty)
    for begin in range(tl.program_id(1) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        tl.store(start + column[None, :], zeros, mask=padding[:, None] & (column < columns)[None, :])


@triton.jit
def copy_kernel(
    x, row, real, out, tokens, rows, columns,
    K: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if token < tokens:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        values = tl.load(x + token.to(tl.int64) * columns + column, mask=inside)
        for k in tl.static_range(K):
            to = tl.load(row + token.to(tl.int64) * K + k)
            tl.store(out + to * columns + column, values, mask=inside & (to >= 0))
    elif PADDED:
        clear_padding(out, real, (token - tokens) * ROWS, rows, columns, COLUMNS, ROWS)


@triton.jit
def sum_kernel(rows, row, out, columns, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        at = tl.load(row + token * K + k)
        total += tl.load(rows + at * columns + column, mask=inside & (at >= 0), other=0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def padding_blocks(real_R: Tensor | None) -> int:
    """Blocks that look for padding rows."""
    return 0 if real_R is None else triton.cdiv(len(real_R), PADDING_ROWS)


def bytes_of(real_R: Tensor | None) -> Tensor | None:
    """As a kernel reads it."""
    return None if real_R is None else real_R.view(torch.uint8)


def copy_rows(
    x_TD: Tensor, row_TK: Tensor, num_rows: int, real_R: Tensor | None, config: tuple[int, int] | None = None
) -> Tensor:
    """[R, D]: row `row_TK[t, k]` is token t's, those that are not real are zeros."""
    (tokens, columns), chosen = x_TD.shape, row_TK.shape[1]
    out_RD = torch.empty(num_rows, columns, dtype=x_TD.dtype, device=x_TD.device)
    size, warps = block("copy", columns, config)
    if grid := tokens + padding_blocks(real_R):
        copy_kernel[(grid, triton.cdiv(columns, size))](
            x_TD.contiguous(), row_TK.contiguous(), bytes_of(real_R), out_RD, tokens, num_rows, columns,
            K=chosen, COLUMNS=size, PADDED=real_R is not None, ROWS=PADDING_ROWS, num_warps=warps,
        )  # fmt: skip
    return out_RD


def sum_rows(rows_RD: Tensor, row_TK: Tensor, config: tuple[int, int] | None = None) -> Tensor:
    """[T, D] in the rows' dtype: the sum of each token's rows in FP32."""
    (tokens, chosen), columns = row_TK.shape, rows_RD.shape[1]
    out_TD = torch.empty(tokens, columns, dtype=rows_RD.dtype, device=rows_RD.device)
    size, warps = block("sum", columns, config)
    if tokens:
        sum_kernel[(tokens, triton.cdiv(columns, size))](
            rows_RD.contiguous(), row_TK.contiguous(), out_TD, columns, K=chosen, COLUMNS=size, num_warps=warps,
        )  # fmt: skip
    return out_TD
