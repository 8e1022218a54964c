"""SwiGLU's gate, its tiles, and its backward pass. All in FP32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE, Tiles

QUANTISING = (16, 4)
"""Rows of a program's tiles, warps."""
ALONE = (2048, 8)
"""Of what goes along one row: elements at a time, warps."""


@triton.jit
def tiles_kernel(
    gate_up, weight, counts, values, scale, rows, columns, room, stride, scale_stride,
    WEIGHTED: tl.constexpr, IN_ROOMS: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * ROWS
    if IN_ROOMS:  # rows that nobody has are neither read nor written
        rows = first // room * room + tl.load(counts + first // room).to(tl.int32)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * stride + column[None, :]
    gate = tl.load(gate_up + offset, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + columns + offset, inside, other=0.0).to(tl.float32)
    act = gate / (1 + tl.exp(-gate)) * up
    if WEIGHTED:
        act *= tl.load(weight + row, row < rows, other=0.0)[:, None]
    factor = scale_of(tl.max(magnitude_bits(act), axis=1), POWER_OF_TWO)
    tl.store(scale + tile.to(tl.int64) * scale_stride + row, factor, row < rows)
    out = quotient(act, factor[:, None], POWER_OF_TWO, True).to(values.dtype.element_ty)
    tl.store(values + row[:, None] * columns + column[None, :], out, inside)


@triton.jit
def forward_kernel(gate_up, weight, out, columns, stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    parts = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_up + row * stride + column, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + columns + column, inside, other=0.0).to(tl.float32)
    act = gate / (1 + tl.exp(-gate)) * up
    if WEIGHTED:
        act *= tl.load(weight + row)
    tl.store(out + row * columns + column, act.to(out.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    grad, gate_up, weight, grad_gate_up, grad_weight, act, columns, grad_stride, stride,
    WEIGHTED: tl.constexpr, WITH_ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if WEIGHTED:
        factor = tl.load(weight + row)
        inner = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        of_out = tl.load(grad + row * grad_stride + column, inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * stride + column, inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * stride + columns + column, inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        out = silu * up
        if WEIGHTED:
            inner += of_out * out
            of_out *= factor
            out *= factor
        of_gate = of_out * up * (sigmoid + silu * (1 - sigmoid))
        of_up = of_out * silu
        to = grad_gate_up + row * 2 * columns + column
        tl.store(to, of_gate.to(grad_gate_up.dtype.element_ty), inside)
        tl.store(to + columns, of_up.to(grad_gate_up.dtype.element_ty), inside)
        if WITH_ACT:
            tl.store(act + row * columns + column, out.to(act.dtype.element_ty), inside)
    if WEIGHTED:
        tl.store(grad_weight + row, tl.sum(inner))


def quantise(
    gate_up: Tensor,
    weight: Tensor | None,
    tiles: Tiles,
    power_of_two: bool,
    counts: Tensor | None = None,
    config: tuple[int, int] = QUANTISING,
) -> None:
    """(gate_up [R, 2I], weight FP32 [R]) -> fills the tiles of [R, I]; with counts [E], those of the rooms' first rows alone.

    A room of R / E rows is a multiple of what a program takes.
    """
    (rows, columns), (block, warps) = tiles.values.shape, config
    grid = (triton.cdiv(rows, block) * triton.cdiv(columns, TILE),)
    room = rows if counts is None else rows // len(counts)
    tiles_kernel[grid](
        gate_up, weight, counts, tiles.values, tiles.scale, rows, columns, room, gate_up.stride(0),
        tiles.scale.stride(1), weight is not None, counts is not None, power_of_two, block, TILE,
        num_warps=warps,
    )  # fmt: skip


def forward(gate_up: Tensor, weight: Tensor | None = None, config: tuple[int, int] = ALONE) -> Tensor:
    """(gate_up [R, 2I], weight FP32 [R]) -> [R, I]."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    block, warps = config
    grid = (rows * triton.cdiv(columns, block),)
    forward_kernel[grid](gate_up, weight, out, columns, gate_up.stride(0), weight is not None, block, num_warps=warps)
    return out


def backward(
    grad: Tensor, gate_up: Tensor, weight: Tensor | None, with_act: bool = True, config: tuple[int, int] = ALONE
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad [R, I], gate_up [R, 2I], weight FP32 [R]) -> gradients of gate_up and of weight, and the result again."""
    rows, columns = grad.shape
    grad_gate_up = torch.empty(rows, 2 * columns, dtype=gate_up.dtype, device=grad.device)
    grad_weight = None if weight is None else torch.empty_like(weight)
    act = torch.empty(rows, columns, dtype=gate_up.dtype, device=grad.device) if with_act else None
    block, warps = config
    backward_kernel[(rows,)](
        grad, gate_up, weight, grad_gate_up, grad_weight, act, columns, grad.stride(0), gate_up.stride(0),
        weight is not None, with_act, block,
        num_warps=warps,
    )  # fmt: skip
    return grad_gate_up, grad_weight, act
