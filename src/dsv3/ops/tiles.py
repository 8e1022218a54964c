"""Activations and gradients in FP8 with one scale a tile of 128 elements (report, section 3.3.2): E4M3 values, FP32 scales.

A product over K needs its tiles along K. The forward and the input-gradient product read rows as they are (1 x 128 tiles);
the weight-gradient product sums over tokens, and needs tiles of 128 tokens of one channel: rows of the transposed matrix.

Legend: R rows (tokens), K columns (channels), Q = ceil(K / 128).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel

TILE = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below it, the quotient by a scale would overflow FP32."""


@dataclass(frozen=True)
class Tiles:
    """A matrix in FP8."""

    values: Tensor
    """E4M3 [R, K], contiguous."""
    scale: Tensor
    """FP32 [R, Q], what a tile's values are multiplied by to get the matrix back. Its columns lie together, each padded to a
    multiple of four rows (strides 1 and 4 ceil(R / 4)): so the GPU's bulk copies read them."""


def empty_scale(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uninitialised room for the scales of `rows` x `columns` elements, laid out as `Tiles.scale` says."""
    padded = -(-rows // 4) * 4
    return torch.empty(-(-columns // TILE), padded, dtype=torch.float32, device=device).t()[:rows]


def empty_tiles(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float8_e4m3fn) -> Tiles:
    """Uninitialised room for the tiles of `rows` x `columns` elements."""
    return Tiles(torch.empty(rows, columns, dtype=dtype, device=device), empty_scale(rows, columns, device))


def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """The scale of tiles whose largest magnitudes are given (FP32): that / 448, or the next power of two above.

    Tiles of zeros get 1. Tiles that hold infinities or NaN get NaN: so does every product with them, and the step that they
    come from is found and skipped.
    """
    # By a tensor: GPUs multiply by the inverse of a number, which rounds differently.
    scale = (largest / torch.full_like(largest, E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    return torch.where(largest.isfinite(), scale, torch.full_like(scale, torch.nan))


def rows_reference(x_RK: Tensor, power_of_two: bool = False) -> Tiles:
    """The definition."""
    rows, columns = x_RK.shape
    tiles = F.pad(x_RK.float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scale = scale_of(tiles.abs().amax(-1), power_of_two)
    # The cast of what is not finite differs between versions of torch; its tile's scale says what it was.
    quotient = (tiles / scale.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0).clamp(-E4M3_MAX, E4M3_MAX)
    out = empty_scale(rows, columns, x_RK.device)
    out.copy_(scale)
    return Tiles(quotient.to(torch.float8_e4m3fn).flatten(1)[:, :columns].contiguous(), out)


def columns_reference(x_RK: Tensor, power_of_two: bool = False) -> Tiles:
    """The definition."""
    return in_whole_tiles(rows_reference(x_RK.t(), power_of_two))


def in_whole_tiles(tiles: Tiles) -> Tiles:
    """With zeros behind the last element of a row, so that its last tile is whole too: no product reads other sizes as fast."""
    values = tiles.values.view(torch.uint8)
    return Tiles(F.pad(values, (0, -values.shape[1] % TILE)).view(tiles.values.dtype), tiles.scale)


def both_reference(x_RK: Tensor, power_of_two: bool = False) -> tuple[Tiles, Tiles]:
    """The definition."""
    return rows_reference(x_RK, power_of_two), columns_reference(x_RK, power_of_two)


def dequantize_reference(tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The definition: multiplied in FP32, rounded once."""
    columns = tiles.values.shape[1]
    factor = tiles.scale.repeat_interleave(TILE, dim=1)[:, :columns]
    return (tiles.values.float() * factor).to(dtype)


def transpose_reference(tiles: Tiles, power_of_two: bool = False) -> Tiles:
    """The definition."""
    return columns_reference(dequantize_reference(tiles, torch.float32), power_of_two)


def not_quantised_by_triton(x_RK: Tensor, power_of_two: bool = False) -> str | None:
    """The reason why the kernels do not serve; None when they do."""
    if x_RK.dim() != 2 or x_RK.stride(1) != 1:
        return "needs a matrix with the elements of a row side by side"
    if x_RK.dtype not in (torch.bfloat16, torch.float32):
        return f"needs BF16 or FP32, not {x_RK.dtype}"
    return no_triton(x_RK)


def not_read_by_triton(tiles: Tiles, *option: object, **named: object) -> str | None:
    """The reason why the kernels that read tiles do not serve; None when they do."""
    if tiles.values.stride(1) != 1:
        return "needs tiles with the values of a row side by side"
    return no_triton(tiles.values, tiles.scale)


quantize_rows = Operation(
    "quantize_rows",
    [
        Implementation("triton", kernel("tiles", "quantize_rows"), not_quantised_by_triton),
        Implementation("reference", rows_reference, anything),
    ],
)
"""`quantize_rows(x [R, K] BF16 or FP32, power_of_two=False) -> Tiles` of x: 1 x 128 tiles."""

quantize_columns = Operation(
    "quantize_columns",
    [
        Implementation("triton", kernel("tiles", "quantize_columns"), not_quantised_by_triton),
        Implementation("reference", columns_reference, anything),
    ],
)
"""`quantize_columns(x [R, K], power_of_two=False) -> Tiles` of x transposed ([K, R]): 128 x 1 tiles of x. Zeros follow the last
row's elements up to a whole tile, as if x had more rows."""

quantize_both = Operation(
    "quantize_both",
    [
        Implementation("triton", kernel("tiles", "quantize_both"), not_quantised_by_triton),
        Implementation("reference", both_reference, anything),
    ],
)
"""`quantize_both(x [R, K], power_of_two=False) -> (quantize_rows(x), quantize_columns(x))`, from one reading of x."""

dequantize_rows = Operation(
    "dequantize_rows",
    [
        Implementation("triton", kernel("tiles", "dequantize_rows"), not_read_by_triton),
        Implementation("reference", dequantize_reference, anything),
    ],
)
"""`dequantize_rows(tiles, dtype=bfloat16) -> [R, K]`."""

transpose_tiles = Operation(
    "transpose_tiles",
    [
        Implementation("triton", kernel("tiles", "transpose_tiles"), not_read_by_triton),
        Implementation("reference", transpose_reference, anything),
    ],
)
"""`transpose_tiles(tiles, power_of_two=False) -> Tiles` of the transposed matrix, as `quantize_columns` has it, from what is left of
it after quantisation: what the weight gradient does with an activation that was kept in FP8 (report, section 3.5.2). With scales that
are powers of two on both sides, values that stay normal numbers are not rounded again."""
