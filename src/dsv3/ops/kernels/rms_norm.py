"""RMSNorm: forward with the tiles of its result, and backward. A program holds whole rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE, Tiles

FORWARD = (8192, 8)
"""Elements of a program, about: rows longer than that come one by one; warps."""
BACKWARD = (8192, 16, 3)
"""Elements that a program holds at a time; warps; how many such parts it loads ahead, itself included."""
PARTIAL_SUMS = 264
"""Programs of the backward pass, each with its part of the weight's gradient: two for each multiprocessor of an H200. Fixed, so
that the sum's order does not depend on the device."""


@triton.jit
def forward_kernel(
    x, weight, out, values, scale, rows, columns, x_stride, scale_stride, eps,
    QUANTISE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    wide = tl.load(x + row[:, None, None] * x_stride + column[None, :, :], inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, column < columns, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=2), axis=1) / columns + eps)
    normed = (wide * factor[:, None, None] * gain[None, :, :]).to(out.dtype.element_ty)
    offset = row[:, None, None] * columns + column[None, :, :]
    tl.store(out + offset, normed, inside)
    if QUANTISE:
        rounded = normed.to(tl.float32)
        factor_of_tile = scale_of(tl.max(magnitude_bits(rounded), axis=2), POWER_OF_TWO)
        used = (row < rows)[:, None] & (tile * TILE < columns)[None, :]
        tl.store(scale + tile.to(tl.int64)[None, :] * scale_stride + row[:, None], factor_of_tile, used)
        out_of_tile = quotient(rounded, factor_of_tile[:, :, None], POWER_OF_TWO, x.dtype.element_ty == tl.bfloat16)
        tl.store(values + offset, out_of_tile.to(values.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad, x, weight, grad_x, partial, rows, columns, grad_stride, x_stride, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    gain = tl.load(weight + column, column < columns, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wide = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
        of_out = tl.load(grad + row[:, None] * grad_stride + column[None, :], inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / columns + eps)
        of_unit = of_out * gain[None, :]
        # Of x rather than of the unit rows, so that the two sums need not wait for each other.
        inner = tl.sum(of_unit * wide, axis=1) * factor / columns
        unit = wide * factor[:, None]
        of_x = (of_unit - unit * inner[:, None]) * factor[:, None]
        tl.store(grad_x + row[:, None] * columns + column[None, :], of_x.to(grad_x.dtype.element_ty), inside)
        total += of_out * unit
    tl.store(partial + tl.program_id(0) * columns + column, tl.sum(total, axis=0), column < columns)


def rows_at_a_time(columns: int, elements: int) -> int:
    """Of rows padded to a power of two."""
    return max(1, elements // triton.next_power_of_2(columns))


def forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    tiles: Tiles | None = None,
    power_of_two: bool = False,
    config: tuple[int, int] = FORWARD,
) -> Tensor:
    """(x [R, D], weight [D]) -> the norm in x's dtype; fills its tiles where room for them is given."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    values, scale, scale_stride = (
        (None, None, 0) if tiles is None else (tiles.values, tiles.scale, tiles.scale.stride(1))
    )
    elements, warps = config
    block = triton.next_power_of_2(triton.cdiv(columns, TILE))
    together = rows_at_a_time(block * TILE, elements)
    forward_kernel[(triton.cdiv(rows, together),)](
        x, weight, out, values, scale, rows, columns, x.stride(0), scale_stride, eps,
        tiles is not None, power_of_two, together, block, TILE,
        num_warps=warps,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    config: tuple[int, int, int] = BACKWARD,
    programs: int = PARTIAL_SUMS,
) -> tuple[Tensor, Tensor]:
    """(grad [R, D], x [R, D], weight [D]) -> the gradients of x and of the weight, in their dtypes."""
    rows, columns = x.shape
    grad_x = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    elements, warps, stages = config
    together = rows_at_a_time(columns, elements)
    programs = min(programs, triton.cdiv(rows, together))
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        grad, x, weight, grad_x, partial, rows, columns, grad.stride(0), x.stride(0), eps,
        together, triton.next_power_of_2(columns), stages,
        num_warps=warps,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)
