"""A linear layer in FP8: all three products, the input kept in FP8 for the weight's gradient (report, section 3.3).

Legend: R rows (tokens), K inputs, N outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.ops.e5m6 import PackedTiles, pack_e5m6, unpack_e5m6
from dsv3.ops.tiles import Tiles
from dsv3.precision.deferred import Sums, WeightGradients
from dsv3.precision.products import product, weight_gradients
from dsv3.precision.scaling import QUANTIZERS, Quantizers
from dsv3.precision.weights import BlockCache


class Projection:
    """One product for the weights of one linear layer, or of several that read the same input: it is quantised once.

    `linears` are modules with a `weight` [N, K]. With `twelve_bits` the input is kept in E5M6 with power-of-two scales, as
    the report keeps that of the product after attention (section 3.3.3); else as the E4M3 tiles that were multiplied.
    """

    def __init__(
        self,
        linears: Sequence[nn.Module],
        gradients: WeightGradients,
        twelve_bits: bool = False,
        quantizers: Quantizers = QUANTIZERS["tiles"],
    ):
        self.linears, self.gradients, self.twelve_bits = tuple(linears), gradients, twelve_bits
        self.quantizers, self.cache = quantizers, BlockCache(quantizers)

    @property
    def caches(self) -> tuple[BlockCache, ...]:
        """The copies of its weights."""
        return (self.cache,)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """[N, K] each."""
        return tuple(each.get_parameter("weight") for each in self.linears)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., K] -> [..., N] of every layer, in x's dtype."""
        return self.multiply(x, *self.weights)

    def multiply(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """The same as a function of all that it reads."""
        outputs: Tensor = Multiply.apply(x.flatten(0, -2), self, *weights)
        outputs = outputs.unflatten(0, x.shape[:-1])
        # Backward through a split copies.
        return (outputs,) if len(weights) == 1 else outputs.split([len(each) for each in weights], dim=-1)


class Multiply(torch.autograd.Function):
    """`Projection.multiply` of [R, K]."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, projection: Projection, *weights: Tensor) -> Tensor:
        """[R, sum of N]."""
        ctx.projection, ctx.sizes = projection, [len(each) for each in weights]
        ctx.blocks = projection.cache.of(weights)
        tiles = projection.quantizers.rows(x_RK)
        if any(ctx.needs_input_grad):
            kept = pack_e5m6(x_RK) if projection.twelve_bits else tiles
            ctx.columns, ctx.dtype = x_RK.shape[1], x_RK.dtype
            ctx.save_for_backward(kept.packed if isinstance(kept, PackedTiles) else kept.values, kept.scale)
        return product(tiles, ctx.blocks, None, x_RK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of every weight."""
        quantizers: Quantizers = ctx.projection.quantizers
        rows, columns = quantizers.gradient_both(grad_RN.contiguous())
        kept, scale = ctx.saved_tensors
        grad_x = product(rows, ctx.blocks.transposed, None, ctx.dtype) if ctx.needs_input_grad[0] else None

        def compute(sums: Sums) -> Sequence[Tensor]:
            twelve_bits = ctx.projection.twelve_bits
            x = unpack_e5m6(PackedTiles(kept, scale, ctx.columns)) if twelve_bits else Tiles(kept, scale)
            return weight_gradients(columns, quantizers.columns(x), ctx.sizes, sums)

        return grad_x, None, *ctx.projection.gradients.take(ctx.projection.weights, compute)
