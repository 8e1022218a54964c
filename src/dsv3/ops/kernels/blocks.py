"""Weights in blocks of 128 x 128: quantisation to E4M3, and their transposition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of

BLOCK = 128
WARPS = 8


@triton.jit
def quantize_kernel(weight, values, scale, rows, columns, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr):
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    block = tl.program_id(0)
    row = block // across % down * BLOCK + tl.arange(0, BLOCK)
    column = block % across * BLOCK + tl.arange(0, BLOCK)
    first = (block // across // down).to(tl.int64) * rows
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = (first + row)[:, None] * columns + column[None, :]
    wide = tl.load(weight + offset, inside, other=0.0).to(tl.float32)
    factor = scale_of(tl.max(magnitude_bits(wide)), POWER_OF_TWO)
    tl.store(scale + block, factor)
    tl.store(
        values + offset,
        quotient(wide, factor, POWER_OF_TWO, weight.dtype.element_ty == tl.bfloat16).to(values.dtype.element_ty),
        inside,
    )


@triton.jit
def transpose_kernel(values, scale, turned, turned_scale, rows, columns, BLOCK: tl.constexpr):
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK)
    block = tl.program_id(0)
    p, q, matrix = block // across % down, block % across, block // across // down
    row = p * BLOCK + tl.arange(0, BLOCK)
    column = q * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    first = matrix.to(tl.int64)
    part = tl.load(values + (first * rows + row)[:, None] * columns + column[None, :], inside)
    tl.store(turned + (first * columns + column)[None, :] * rows + row[:, None], part, inside)
    tl.store(turned_scale + (matrix * across + q) * down + p, tl.load(scale + block))


def quantize_blocks(
    weight: Tensor, power_of_two: bool = False, dtype: torch.dtype = torch.float8_e4m3fn, warps: int = WARPS
) -> tuple[Tensor, Tensor]:
    """[..., O, I], contiguous -> values and scales; values in FP32 are the quotients before their rounding."""
    *stack, rows, columns = weight.shape
    scale_shape = (*stack, triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    values = torch.empty_like(weight, dtype=dtype)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=weight.device)
    quantize_kernel[(scale.numel(),)](weight, values, scale, rows, columns, power_of_two, BLOCK, num_warps=warps)
    return values, scale


def transpose_blocks(values: Tensor, scale: Tensor, warps: int = WARPS) -> tuple[Tensor, Tensor]:
    """([..., O, I], [..., P, Q]), contiguous, values of any dtype -> both transposed."""
    *stack, rows, columns = values.shape
    turned = torch.empty(*stack, columns, rows, dtype=values.dtype, device=values.device)
    turned_scale = torch.empty(*stack, scale.shape[-1], scale.shape[-2], dtype=scale.dtype, device=scale.device)
    # As bytes: the kernel only moves them.
    source, target = (each.view(torch.uint8) if each.element_size() == 1 else each for each in (values, turned))
    transpose_kernel[(scale.numel(),)](
        source, scale.contiguous(), target, turned_scale, rows, columns, BLOCK, num_warps=warps
    )
    return turned, turned_scale
