"""Tokens to rooms of experts: places by counting, rows quantised once and written to each of their places.

Legend: as in `dsv3.ops.rooms`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE, Tiles, empty_tiles

ROWS = (8, 4)
"""Tiles of a token that a program quantises, warps."""


@triton.jit
def assign_kernel(expert, weight, row, weight_of_row, counts, assignments, room, BLOCK: tl.constexpr):
    own = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    chosen = tl.load(expert + number, mask=number < assignments, other=-1) == own
    ones = chosen.to(tl.int32)
    place = own.to(tl.int64) * room + tl.cumsum(ones) - 1
    tl.store(row + number, place, mask=chosen)
    tl.store(weight_of_row + place, tl.load(weight + number, mask=chosen), mask=chosen)
    tl.store(counts + own, tl.sum(ones).to(tl.int64))


@triton.jit
def rows_kernel(
    x, row, values, scale, columns, x_stride, scale_stride,
    K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = column < columns
    wide = tl.load(x + token * x_stride + column, inside, other=0.0).to(tl.float32)
    factor = scale_of(tl.max(magnitude_bits(wide), axis=1), False)
    out = quotient(wide, factor[:, None], False, x.dtype.element_ty == tl.bfloat16).to(values.dtype.element_ty)
    for k in tl.static_range(K):
        to = tl.load(row + token * K + k)
        tl.store(values + to * columns + column, out, inside)
        tl.store(scale + tile.to(tl.int64) * scale_stride + to, factor, tile * TILE < columns)


def assign(expert_TK: Tensor, weight_TK: Tensor, experts: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv3.ops.rooms.assign_rooms`. One program an expert looks at all assignments."""
    row_TK = torch.empty_like(expert_TK)
    weight_R = torch.empty(experts * room, dtype=torch.float32, device=expert_TK.device)
    counts_E = torch.empty(experts, dtype=torch.int64, device=expert_TK.device)
    assignments = expert_TK.numel()
    assign_kernel[(experts,)](
        expert_TK, weight_TK, row_TK, weight_R, counts_E, assignments, room,
        BLOCK=triton.next_power_of_2(assignments), num_warps=4,
    )  # fmt: skip
    return row_TK, weight_R, counts_E


def quantize(
    x: Tensor,
    row_TK: Tensor,
    rows: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
    config: tuple[int, int] = ROWS,
) -> Tiles:
    """[T, D] with columns that lie together -> tiles of [rows, D]: see `dsv3.ops.rooms.quantize_to_rooms`."""
    (tokens, columns), (tiles, warps) = x.shape, config
    out = empty_tiles(rows, columns, x.device, dtype)
    rows_kernel[(tokens, triton.cdiv(columns, tiles * TILE))](
        x, row_TK, out.values, out.scale, columns, x.stride(0), out.scale.stride(1),
        row_TK.shape[1], tiles, TILE, num_warps=warps,
    )  # fmt: skip
    return out
