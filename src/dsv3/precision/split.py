"""A linear layer whose weights' gradients may be computed later than its input's, as those of FP8 layers can.

Legend: R rows, E experts, I elements in, O elements out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.grouped_linear import grouped_linear, grouped_weight_gradient
from dsv3.precision.deferred import WeightGradients


def split_linear(
    x: Tensor, parameters: Sequence[Tensor], gradients: WeightGradients, counts_E: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[..., I] -> [..., O] in x's dtype, the weights [O, I] being stacked along their outputs.

    With counts, x is [R, I] as `grouped_linear` has it, and there is one weight [E, O, I]. The gradients go to `parameters`;
    `weights` are multiplied in their place where they are copies (see `model/recompute.py`).
    """
    out: Tensor = Split.apply(x, gradients, counts_E, parameters, *(weights or parameters))
    return out


class Split(torch.autograd.Function):
    """`split_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gradients: WeightGradients, counts_E: Tensor | None, parameters: Sequence[Tensor],
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """[..., O]."""
        weight = weights[0].to(x.dtype) if len(weights) == 1 else torch.cat([each.to(x.dtype) for each in weights])
        ctx.gradients, ctx.counts, ctx.parameters = gradients, counts_E, parameters
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight) if counts_E is None else grouped_linear(x, weight, counts_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The input's gradient; those of the weights go to `WeightGradients`."""
        x, weight = ctx.saved_tensors
        counts, parameters = ctx.counts, ctx.parameters
        grad = grad.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight if counts is None else grouped_linear(grad, weight.mT, counts)

        def compute() -> Sequence[Tensor]:
            if counts is not None:
                return [grouped_weight_gradient(grad, x, counts)]
            return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).split([len(each) for each in parameters])

        return grad_x, None, None, None, *ctx.gradients.take(parameters, compute)
