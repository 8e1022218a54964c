"""SwiGLU's three layers in FP8, for one expert or a stack of them: inputs kept in FP8, the activation computed again in
backward (report, section 3.3.3).

Legend: R rows (tokens), D hidden, I inner, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.grouped_gemm_fp8 import grouped_wgrad_fp8
from dsv3.ops.grouped_linear import grouped_weight_gradient
from dsv3.ops.swiglu import swiglu_backward
from dsv3.ops.tiles import Tiles, dequantize_rows
from dsv3.precision.deferred import Sums, WeightGradients
from dsv3.precision.products import product, weight_gradients
from dsv3.precision.scaling import QUANTIZERS, Quantizers
from dsv3.precision.weights import BlockCache


class FeedForward:
    """`down(silu(gate x) * up x)` with all products in FP8.

    The routed experts' inputs, and the gradients of their outputs, get scales that are powers of two (`power_of_two`): so the
    report sends them to other GPUs, where they enter the product as they came.
    """

    def __init__(
        self, gradients: WeightGradients, power_of_two: bool = False, quantizers: Quantizers = QUANTIZERS["tiles"]
    ):
        self.gradients, self.power_of_two, self.quantizers = gradients, power_of_two, quantizers
        self.up_cache, self.down_cache = BlockCache(quantizers), BlockCache(quantizers)

    @property
    def caches(self) -> tuple[BlockCache, ...]:
        """The copies of its weights."""
        return self.up_cache, self.down_cache

    def __call__(
        self,
        x: Tensor,
        gate_up: Sequence[Tensor],
        down: Tensor,
        counts_E: Tensor | None = None,
        weight_R: Tensor | None = None,
        aligned: bool = False,
    ) -> Tensor:
        """[..., D] -> [..., D].

        `gate_up` are weights [I, D] of gate and up, or one [2I, D]; `down` is [D, I]. With counts, x holds each expert's rows
        one after the other ([R, D]), and weights are stacked: one [E, 2I, D], and [E, D, I]. `weight_R` are FP32 factors of rows;
        `aligned` promises groups of multiples of 128 rows.
        """
        out: Tensor = Compute.apply(x.flatten(0, -2), weight_R, self, counts_E, aligned, down, *gate_up)
        return out.view(x.shape)


class Compute(torch.autograd.Function):
    """`FeedForward` of [R, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_R: Tensor | None,
        layers: FeedForward,
        counts_E: Tensor | None,
        aligned: bool,
        down: Tensor,
        *gate_up: Tensor,
    ) -> Tensor:
        """[R, D]."""
        ctx.layers, ctx.counts, ctx.weights, ctx.dtype = layers, counts_E, (down, *gate_up), x_RD.dtype
        ctx.aligned = aligned
        ctx.up, ctx.down = layers.up_cache.of(gate_up), layers.down_cache.of((down,))
        x = layers.quantizers.rows(x_RD, layers.power_of_two)
        inner = product(x, ctx.up, counts_E, x_RD.dtype, aligned)
        if any(ctx.needs_input_grad):
            kept = layers.quantizers.rows(inner)
            ctx.save_for_backward(x.values, x.scale, kept.values, kept.scale, weight_R)
        return product(layers.quantizers.activated(inner, weight_R), ctx.down, counts_E, x_RD.dtype, aligned)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the rows' factors and of every weight."""
        grad_RD, counts, dtype, aligned = grad_RD.contiguous(), ctx.counts, ctx.dtype, ctx.aligned
        values, scale, inner_values, inner_scale, weight_R = ctx.saved_tensors
        quantizers: Quantizers = ctx.layers.quantizers
        power_of_two, in_fp8 = ctx.layers.power_of_two, counts is None or aligned

        def quantised(grad: Tensor, power_of_two: bool = False) -> tuple[Tiles, Tiles | None]:
            """For the input's gradient, and for the weight's where that is in FP8."""
            if in_fp8:
                return quantizers.gradient_both(grad, power_of_two)
            return quantizers.gradient_rows(grad, power_of_two), None

        rows, out_columns = quantised(grad_RD, power_of_two)
        grad_act = product(rows, ctx.down.transposed, counts, dtype, aligned)
        inner = dequantize_rows(Tiles(inner_values, inner_scale), dtype)
        grad_inner, grad_weight, act = swiglu_backward(grad_act, inner, weight_R)
        rows, inner_columns = quantised(grad_inner)
        grad_x = product(rows, ctx.up.transposed, counts, dtype, aligned) if ctx.needs_input_grad[0] else None

        def compute(sums: Sums) -> Sequence[Tensor]:
            x = Tiles(values, scale)
            if out_columns is None or inner_columns is None:
                wide = dequantize_rows(x, dtype)
                return (
                    grouped_weight_gradient(grad_RD, act, counts, sums[0]),
                    grouped_weight_gradient(grad_inner, wide, counts, sums[1]),
                )
            of_down = out_columns, quantizers.columns(act)
            of_gate_up = inner_columns, quantizers.columns(x, power_of_two)
            if counts is not None:
                return grouped_wgrad_fp8(*of_down, counts, sums[0]), grouped_wgrad_fp8(*of_gate_up, counts, sums[1])
            sizes = [len(each) for each in ctx.weights]
            down = weight_gradients(*of_down, sizes[:1], sums[:1])
            return *down, *weight_gradients(*of_gate_up, sizes[1:], sums[1:])

        return grad_x, grad_weight, None, None, None, *ctx.layers.gradients.take(ctx.weights, compute)
