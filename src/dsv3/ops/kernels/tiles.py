"""Quantisation to E4M3 with one scale a tile, along rows, along columns, and along both from one reading."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE, Tiles, empty_tiles

ROWS = (32, 4)
"""Of kernels that go along rows: rows of a program's tiles, warps."""
TRANSPOSING = (64, 4)
"""Of kernels that transpose: columns of a program's 128 rows, warps."""
BOTH = (4, None)
"""Warps of a program that makes both kinds of tiles, of 128 rows of 128 columns; most registers a thread, None for no limit."""


@triton.jit
def rows_kernel(
    x, values, scale, rows, columns, x_stride, scale_stride,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    factor = scale_of(tl.max(magnitude_bits(wide), axis=1), POWER_OF_TWO)
    tl.store(scale + tile.to(tl.int64) * scale_stride + row, factor, row < rows)
    out = quotient(wide, factor[:, None], POWER_OF_TWO, x.dtype.element_ty == tl.bfloat16).to(values.dtype.element_ty)
    tl.store(values + row[:, None] * columns + column[None, :], out, inside)


@triton.jit
def dequantize_kernel(
    values, scale, out, rows, columns, values_stride, scale_row_stride, scale_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    factor = tl.load(scale + row * scale_row_stride + tile.to(tl.int64) * scale_stride, row < rows, other=0.0)
    wide = tl.load(values + row[:, None] * values_stride + column[None, :], inside, other=0.0).to(tl.float32)
    wide = wide * factor[:, None]
    tl.store(out + row[:, None] * columns + column[None, :], wide.to(out.dtype.element_ty), inside)


@triton.jit
def read_rows(
    x, x_scale, row, column, rows, columns, x_stride, x_scale_row_stride, FROM_TILES: tl.constexpr,
):  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    if FROM_TILES:
        factor = tl.load(x_scale + row * x_scale_row_stride, row < rows, other=0.0)
        # What lies beyond the last column is no part of a tile, even where a scale is NaN.
        wide = tl.where(inside, wide * factor[:, None], 0.0)
    return wide


@triton.jit
def write_rows(
    wide, values, scale, row, column, rows, columns, POWER_OF_TWO: tl.constexpr, SHORT: tl.constexpr
):  # fmt: skip
    factor = scale_of(tl.max(magnitude_bits(wide), axis=1), POWER_OF_TWO)
    tl.store(scale + row, factor, row < rows)
    out = quotient(wide, factor[:, None], POWER_OF_TWO, SHORT).to(values.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(values + row[:, None] * columns + column[None, :], out, inside)


@triton.jit
def in_byte(wide, factor, number: tl.constexpr, POWER_OF_TWO: tl.constexpr, SHORT: tl.constexpr):
    out = quotient(wide, factor[None, :], POWER_OF_TWO, SHORT).to(tl.float8e4nv)
    return out.to(tl.uint8, bitcast=True).to(tl.uint32) << 8 * number


@triton.jit
def write_columns(
    wide, factor, turned, row, column, columns, words, POWER_OF_TWO: tl.constexpr, SHORT: tl.constexpr
):  # fmt: skip
    out = quotient(wide, factor[None, :], POWER_OF_TWO, SHORT).to(turned.dtype.element_ty)
    place = turned + column.to(tl.int64)[None, :] * words * 4 + row[:, None]
    tl.store(place, out, (column < columns)[None, :])


@triton.jit
def transposing_kernel(
    x, x_scale, values, scale, turned, turned_scale, rows, columns, words,
    x_stride, x_scale_row_stride, x_scale_stride, scale_stride, turned_scale_stride,
    FROM_TILES: tl.constexpr, WITH_ROWS: tl.constexpr, IN_WORDS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    short: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    across = tl.cdiv(columns, COLUMNS)
    part = tl.program_id(0) % across
    tile = (tl.program_id(0) // across).to(tl.int64)
    # Every fourth row four times: a thread has four of a column, which become one word before threads exchange them.
    four = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    row = four * 4
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    if FROM_TILES:
        x_scale += (part * COLUMNS // TILE).to(tl.int64) * x_scale_stride
    wide0 = read_rows(x, x_scale, row, column, rows, columns, x_stride, x_scale_row_stride, FROM_TILES)
    wide1 = read_rows(x, x_scale, row + 1, column, rows, columns, x_stride, x_scale_row_stride, FROM_TILES)
    wide2 = read_rows(x, x_scale, row + 2, column, rows, columns, x_stride, x_scale_row_stride, FROM_TILES)
    wide3 = read_rows(x, x_scale, row + 3, column, rows, columns, x_stride, x_scale_row_stride, FROM_TILES)
    bits = tl.maximum(
        tl.maximum(magnitude_bits(wide0), magnitude_bits(wide1)),
        tl.maximum(magnitude_bits(wide2), magnitude_bits(wide3)),
    )
    factor = scale_of(tl.max(bits, axis=0), POWER_OF_TWO)
    tl.store(turned_scale + tile * turned_scale_stride + column, factor, column < columns)
    if WITH_ROWS:
        scale += part.to(tl.int64) * scale_stride
        write_rows(wide0, values, scale, row, column, rows, columns, POWER_OF_TWO, short)
        write_rows(wide1, values, scale, row + 1, column, rows, columns, POWER_OF_TWO, short)
        write_rows(wide2, values, scale, row + 2, column, rows, columns, POWER_OF_TWO, short)
        write_rows(wide3, values, scale, row + 3, column, rows, columns, POWER_OF_TWO, short)
    if IN_WORDS:
        word = in_byte(wide0, factor, 0, POWER_OF_TWO, short) | in_byte(wide1, factor, 1, POWER_OF_TWO, short)
        word |= in_byte(wide2, factor, 2, POWER_OF_TWO, short) | in_byte(wide3, factor, 3, POWER_OF_TWO, short)
        place = (
            turned.to(tl.pointer_type(tl.uint32), bitcast=True) + column.to(tl.int64)[None, :] * words + four[:, None]
        )
        tl.store(place, word, (column < columns)[None, :])
    else:
        write_columns(wide0, factor, turned, row, column, columns, words, POWER_OF_TWO, short)
        write_columns(wide1, factor, turned, row + 1, column, columns, words, POWER_OF_TWO, short)
        write_columns(wide2, factor, turned, row + 2, column, columns, words, POWER_OF_TWO, short)
        write_columns(wide3, factor, turned, row + 3, column, columns, words, POWER_OF_TWO, short)


def quantize_rows(
    x: Tensor, power_of_two: bool = False, dtype: torch.dtype = torch.float8_e4m3fn, config: tuple[int, int] = ROWS
) -> Tiles:
    """[R, K] with columns that lie together -> its tiles; values in FP32 are the quotients before their rounding."""
    rows, columns = x.shape
    block, warps = config
    out = empty_tiles(rows, columns, x.device, dtype)
    grid = (triton.cdiv(rows, block) * triton.cdiv(columns, TILE),)
    rows_kernel[grid](
        x, out.values, out.scale, rows, columns, x.stride(0), out.scale.stride(1), power_of_two, block, TILE,
        num_warps=warps,
    )  # fmt: skip
    return out


def dequantize_rows(tiles: Tiles, dtype: torch.dtype = torch.bfloat16, config: tuple[int, int] = ROWS) -> Tensor:
    """Tiles -> [R, K]."""
    (rows, columns), (block, warps) = tiles.values.shape, config
    out = torch.empty(rows, columns, dtype=dtype, device=tiles.values.device)
    grid = (triton.cdiv(rows, block) * triton.cdiv(columns, TILE),)
    dequantize_kernel[grid](
        tiles.values, tiles.scale, out, rows, columns, tiles.values.stride(0), *tiles.scale.stride(), block, TILE,
        num_warps=warps,
    )  # fmt: skip
    return out


def quantize_columns(
    x: Tensor,
    power_of_two: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    config: tuple[int, int] = TRANSPOSING,
) -> Tiles:
    """[R, K] -> the tiles of its transpose."""
    rows, columns = x.shape
    turned = whole_tiles(columns, rows, x.device, dtype)
    launch_transposing(x, None, None, turned, power_of_two, config)
    return turned


def quantize_both(
    x: Tensor,
    power_of_two: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    config: tuple[int, int | None] = BOTH,
) -> tuple[Tiles, Tiles]:
    """[R, K] -> its tiles and those of its transpose."""
    rows, columns = x.shape
    if columns % 16 or x.stride(0) % 16:
        # Triton 3.6 compiles the kernel for such sizes to one that writes wrong words (tests/gpu/test_tiles.py has them).
        return quantize_rows(x, power_of_two, dtype), quantize_columns(x, power_of_two, dtype)
    out, turned = empty_tiles(rows, columns, x.device, dtype), whole_tiles(columns, rows, x.device, dtype)
    launch_transposing(x, None, out, turned, power_of_two, (TILE, config[0]), config[1])
    return out, turned


def transpose_tiles(
    tiles: Tiles,
    power_of_two: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    config: tuple[int, int] = TRANSPOSING,
) -> Tiles:
    """Tiles of a matrix -> tiles of its transpose."""
    rows, columns = tiles.values.shape
    turned = whole_tiles(columns, rows, tiles.values.device, dtype)
    launch_transposing(tiles.values, tiles.scale, None, turned, power_of_two, config)
    return turned


def whole_tiles(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tiles:
    """Room for tiles whose last one of a row is as long as the others."""
    return empty_tiles(rows, -(-columns // TILE) * TILE, device, dtype)


def launch_transposing(
    x: Tensor,
    x_scale: Tensor | None,
    out: Tiles | None,
    turned: Tiles,
    power_of_two: bool,
    config: tuple[int, int],
    registers: int | None = None,
) -> None:
    """Fills `turned`, and `out` where there is one, from x (times the scale of its row's tile where there are scales)."""
    (rows, columns), (block, warps) = x.shape, config
    values, scale, scale_stride = (None, None, 0) if out is None else (out.values, out.scale, out.scale.stride(1))
    strides = (0, 0) if x_scale is None else x_scale.stride()
    grid = (triton.cdiv(rows, TILE) * triton.cdiv(columns, block),)
    transposing_kernel[grid](
        x, x_scale, values, scale, turned.values, turned.scale, rows, columns, turned.values.shape[1] // 4,
        x.stride(0), *strides, scale_stride, turned.scale.stride(1),
        x_scale is not None, out is not None, turned.values.element_size() == 1, power_of_two, block, TILE,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip
