"""What one FP8 scale covers: the report's tiles and blocks (section 3.3.2), and two coarser choices to compare them with.

Legend: R rows (tokens), K columns (channels), P = ceil(R / 128), Q = ceil(K / 128).
"""

from typing import Literal

import torch
from torch import Tensor

from dsv3.ops.block_scaled import quantize_blocks, transpose_blocks
from dsv3.ops.swiglu import swiglu, swiglu_tiles
from dsv3.ops.tiles import (
    E4M3_MAX,
    TILE,
    Tiles,
    empty_scale,
    in_whole_tiles,
    quantize_both,
    quantize_columns,
    quantize_rows,
    scale_of,
    transpose_tiles,
)

Scaling = Literal["tiles", "gradient_blocks", "tensors"]


class Quantizers:
    """The report's: activations and gradients in tiles of 1 x 128 along what a product sums over, weights in 128 x 128 blocks."""

    def rows(self, x_RK: Tensor, power_of_two: bool = False) -> Tiles:
        """An activation, for the output."""
        return quantize_rows(x_RK, power_of_two)

    def columns(self, x: Tensor | Tiles, power_of_two: bool = False) -> Tiles:
        """An activation [R, K], for the weight's gradient: its transpose, in tiles of 128 tokens."""
        return transpose_tiles(x, power_of_two) if isinstance(x, Tiles) else quantize_columns(x, power_of_two)

    def activated(self, gate_up: Tensor, weight_R: Tensor | None = None) -> Tiles:
        """SwiGLU of [R, 2K], times the weights of rows, for the output."""
        return swiglu_tiles(gate_up, weight_R)

    def gradient_rows(self, grad_RK: Tensor, power_of_two: bool = False) -> Tiles:
        """A gradient, for the input's gradient."""
        return self.rows(grad_RK, power_of_two)

    def gradient_both(self, grad_RK: Tensor, power_of_two: bool = False) -> tuple[Tiles, Tiles]:
        """(`gradient_rows`, its transpose for the weight's gradient), read once, and alike in their scales."""
        return quantize_both(grad_RK, power_of_two)

    def weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(E4M3 [..., N, K], FP32 scales of its blocks)."""
        return quantize_blocks(weight)


class GradientBlocks(Quantizers):
    """Gradients in 128 x 128 blocks, which diverged in the report's trial (appendix B.2)."""

    def gradient_rows(self, grad_RK: Tensor, power_of_two: bool = False) -> Tiles:
        """A gradient, for the input's gradient."""
        values, scale_PQ = quantize_blocks(grad_RK, power_of_two)
        return Tiles(values, of_every_row(scale_PQ, len(values)))

    def gradient_both(self, grad_RK: Tensor, power_of_two: bool = False) -> tuple[Tiles, Tiles]:
        """(`gradient_rows`, its transpose), rounded once."""
        values, scale_PQ = quantize_blocks(grad_RK, power_of_two)
        columns, scale_QP = transpose_blocks(values, scale_PQ)
        turned = in_whole_tiles(Tiles(columns, of_every_row(scale_QP, len(columns))))
        return Tiles(values, of_every_row(scale_PQ, len(values))), turned


class Tensors(Quantizers):
    """One scale for a whole matrix, or stack of matrices, whatever it is: its largest magnitude / 448."""

    def rows(self, x_RK: Tensor, power_of_two: bool = False) -> Tiles:
        """An activation, for the output."""
        values, scale = whole(x_RK, power_of_two)
        return Tiles(values, of_every_tile(scale, values))

    def columns(self, x: Tensor | Tiles, power_of_two: bool = False) -> Tiles:
        """An activation [R, K], for the weight's gradient: its transpose."""
        if not isinstance(x, Tiles):
            return in_whole_tiles(self.rows(x.t(), power_of_two))
        values = x.values.view(torch.uint8).t().contiguous().view(x.values.dtype)
        return in_whole_tiles(Tiles(values, of_every_tile(x.scale[:1, :1], values)))

    def activated(self, gate_up: Tensor, weight_R: Tensor | None = None) -> Tiles:
        """SwiGLU of [R, 2K], times the weights of rows, for the output."""
        return self.rows(swiglu(gate_up, weight_R))

    def gradient_both(self, grad_RK: Tensor, power_of_two: bool = False) -> tuple[Tiles, Tiles]:
        """(`gradient_rows`, its transpose), rounded once."""
        rows = self.rows(grad_RK, power_of_two)
        return rows, self.columns(rows)

    def weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(E4M3 [..., N, K], FP32 scales of its blocks)."""
        values, scale = whole(weight, False)
        blocks = [-(-size // TILE) for size in weight.shape[-2:]]
        return values, scale.expand(*weight.shape[:-2], *blocks).contiguous()


def of_every_row(scale_PQ: Tensor, rows: int) -> Tensor:
    """The scales of blocks as those of their rows' tiles, laid out as `Tiles.scale` says."""
    scale = empty_scale(rows, scale_PQ.shape[1] * TILE, scale_PQ.device)
    return scale.copy_(scale_PQ.repeat_interleave(TILE, dim=0)[:rows])


def of_every_tile(scale: Tensor, values_RK: Tensor) -> Tensor:
    """The scale of a whole matrix as those of its tiles."""
    rows, columns = values_RK.shape
    return empty_scale(rows, columns, values_RK.device).copy_(scale)


def whole(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """(E4M3 of x's shape, contiguous; its one scale)."""
    scale = scale_of(x.abs().amax().float(), power_of_two)
    quotient = (x.float() / scale).nan_to_num_(0.0, 0.0, 0.0).clamp_(-E4M3_MAX, E4M3_MAX)
    return quotient.contiguous().to(torch.float8_e4m3fn), scale


QUANTIZERS: dict[Scaling, Quantizers] = {
    "tiles": Quantizers(),
    "gradient_blocks": GradientBlocks(),
    "tensors": Tensors(),
}
