"""Packing to 12 bits an element and back: one program for some rows of one tile, whose bytes move as 48 words: eight elements are three.

A pair's three bytes are the lower 24 bits of an integer, in the order of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.e5m6 import DROPPED, PackedTiles
from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE, empty_scale

CONFIG = (8, 4)
"""Rows of a program's tile, warps."""


@triton.jit
def shortened(x, DROPPED: tl.constexpr):
    """The upper bits of half precision, rounded to the nearest, ties to the even one: int32."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED


@triton.jit
def pack_kernel(
    x, packed, scale, rows, columns, x_stride, packed_stride, scale_stride,
    DROPPED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    factor = scale_of(tl.max(magnitude_bits(wide), axis=1), True)
    tl.store(scale + tile.to(tl.int64) * scale_stride + row, factor, row < rows)
    bits = shortened(quotient(wide, factor[:, None], True, False), DROPPED)
    first, second = tl.split(tl.reshape(bits, (ROWS, TILE // 2, 2)))
    pair = first >> 4 | ((first & 0xF) << 4 | second >> 8) << 8 | (second & 0xFF) << 16
    even, odd = tl.split(tl.reshape(pair, (ROWS, TILE // 4, 2)))
    pair0, pair2 = tl.split(tl.reshape(even, (ROWS, TILE // 8, 2)))
    pair1, pair3 = tl.split(tl.reshape(odd, (ROWS, TILE // 8, 2)))
    eight = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    inside = (row < rows)[:, None] & (8 * eight < columns)[None, :]
    place = packed + row[:, None] * packed_stride + 3 * eight[None, :]
    tl.store(place, pair0 | pair1 << 24, inside)
    tl.store(place + 1, pair1 >> 8 | pair2 << 16, inside)
    tl.store(place + 2, pair2 >> 16 | pair3 << 8, inside)


@triton.jit
def unpack_kernel(
    packed, scale, out, rows, columns, packed_stride, scale_row_stride, scale_stride,
    DROPPED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    eight = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    inside = (row < rows)[:, None] & (8 * eight < columns)[None, :]
    place = packed + row[:, None] * packed_stride + 3 * eight[None, :]
    word0 = tl.load(place, inside, other=0)
    word1 = tl.load(place + 1, inside, other=0)
    word2 = tl.load(place + 2, inside, other=0)
    pair1 = word0 >> 24 & 0xFF | (word1 & 0xFFFF) << 8
    pair2 = word1 >> 16 & 0xFFFF | (word2 & 0xFF) << 16
    pair = tl.join(tl.join(word0 & 0xFFFFFF, pair2), tl.join(pair1, word2 >> 8 & 0xFFFFFF))
    pair = tl.reshape(pair, (ROWS, TILE // 2))
    middle = pair >> 8 & 0xFF
    bits = tl.join((pair & 0xFF) << 4 | middle >> 4, (middle & 0xF) << 8 | pair >> 16)
    bits = tl.reshape(bits, (ROWS, TILE)) << DROPPED
    half = bits.to(tl.int16).to(tl.float16, bitcast=True)
    factor = tl.load(scale + row * scale_row_stride + tile.to(tl.int64) * scale_stride, row < rows, other=0.0)
    wide = half.to(tl.float32) * factor[:, None]
    column = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], wide.to(out.dtype.element_ty), inside)


def pack(x: Tensor, config: tuple[int, int] = CONFIG) -> PackedTiles:
    """[R, K] with adjacent columns, a multiple of eight, of any row stride; see `dsv3.ops.e5m6`."""
    (rows, columns), (block, warps) = x.shape, config
    packed = torch.empty(rows, 3 * (columns // 8), dtype=torch.int32, device=x.device)
    scale = empty_scale(rows, columns, x.device)
    pack_kernel[(triton.cdiv(rows, block) * triton.cdiv(columns, TILE),)](
        x, packed, scale, rows, columns, x.stride(0), packed.stride(0), scale.stride(1),
        DROPPED=DROPPED, ROWS=block, TILE=TILE, num_warps=warps,
    )  # fmt: skip
    return PackedTiles(packed.view(torch.uint8), scale, columns)


def unpack(tiles: PackedTiles, dtype: torch.dtype = torch.bfloat16, config: tuple[int, int] = CONFIG) -> Tensor:
    """[R, K]; see `dsv3.ops.e5m6`."""
    (rows, columns), (block, warps) = (len(tiles.packed), tiles.columns), config
    packed = tiles.packed.view(torch.int32)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    unpack_kernel[(triton.cdiv(rows, block) * triton.cdiv(columns, TILE),)](
        packed, tiles.scale, out, rows, columns, packed.stride(0), *tiles.scale.stride(),
        DROPPED=DROPPED, ROWS=block, TILE=TILE, num_warps=warps,
    )  # fmt: skip
    return out
