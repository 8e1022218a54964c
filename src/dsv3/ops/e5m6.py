"""Activations in 12 bits: E5M6 values with one power-of-two scale a tile of 128 elements (report, section 3.3.3).

The report keeps the input of the product after attention so, for its weight gradient: 6 bits of mantissa where E4M3 has 3.
A value is a half-precision number (E5M10) without its last four bits; two values share three bytes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel
from dsv3.ops.tiles import TILE, empty_scale, scale_of

DROPPED = 4
"""Bits of half precision's mantissa that E5M6 has not."""


@dataclass(frozen=True)
class PackedTiles:
    """A matrix [R, K] in 12 bits an element."""

    packed: Tensor
    """uint8 [R, 3 ceil(K / 2)]: of two values, the first's upper eight bits, both values' other four, the second's lower eight."""
    scale: Tensor
    """FP32 [R, ceil(K / 128)], powers of two, laid out as `Tiles.scale`."""
    columns: int
    """K."""


def pack_reference(x_RK: Tensor) -> PackedTiles:
    """The definition. Scales are those of E4M3, so that the largest magnitude of a tile lies between 224 and 448."""
    rows, columns = x_RK.shape
    tiles = F.pad(x_RK.float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    found = scale_of(tiles.abs().amax(-1), power_of_two=True)
    half = (tiles / found.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0).half().flatten(1)[:, : columns + columns % 2]
    bits = half.contiguous().view(torch.int16).int() & 0xFFFF
    # To the nearest, ties to the even one: what carries over from the mantissa raises the exponent, as it should.
    bits = (bits + (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1)) >> DROPPED
    first, second = bits[:, ::2], bits[:, 1::2]
    packed = torch.stack((first >> 4, (first & 0xF) << 4 | second >> 8, second & 0xFF), dim=-1)
    scale = empty_scale(rows, columns, x_RK.device)
    scale.copy_(found)
    return PackedTiles(packed.flatten(1).to(torch.uint8), scale, columns)


def unpack_reference(tiles: PackedTiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The definition."""
    high, middle, low = tiles.packed.int().unflatten(1, (-1, 3)).unbind(-1)
    bits = torch.stack((high << 4 | middle >> 4, (middle & 0xF) << 8 | low), dim=-1).flatten(1) << DROPPED
    half = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.float16)
    factor = tiles.scale.repeat_interleave(TILE, dim=1)[:, : tiles.columns]
    return (half[:, : tiles.columns].float() * factor).to(dtype)


def pack_triton_serves(x_RK: Tensor) -> str | None:
    """Why it does not."""
    if x_RK.stride(1) != 1 or x_RK.shape[1] % 8 or not x_RK.numel():
        return "needs elements, and adjacent columns, a multiple of eight"
    return no_triton(x_RK)


def unpack_triton_serves(tiles: PackedTiles, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why it does not."""
    if tiles.columns % 8 or not tiles.packed.numel() or not tiles.packed.is_contiguous():
        return "needs contiguous rows of a multiple of eight elements"
    return no_triton(tiles.packed)


pack_e5m6 = Operation(
    "pack_e5m6",
    [
        Implementation("triton", kernel("e5m6", "pack"), pack_triton_serves),
        Implementation("reference", pack_reference, anything),
    ],
)
"""`pack_e5m6(x [R, K] BF16 or FP32) -> PackedTiles`. BF16 is rounded once; FP32 passes through half precision."""

unpack_e5m6 = Operation(
    "unpack_e5m6",
    [
        Implementation("triton", kernel("e5m6", "unpack"), unpack_triton_serves),
        Implementation("reference", unpack_reference, anything),
    ],
)
"""`unpack_e5m6(tiles, dtype=bfloat16) -> [R, K]`."""
