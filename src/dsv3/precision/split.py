"""Linear layers whose weights' gradients may be computed later than their input's, as those in FP8 can; for pipelines.

Legend: R rows, E experts, I elements in, O elements out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.grouped_linear import grouped_linear, grouped_weight_gradient
from dsv3.precision.deferred import Sums, WeightGradients


class Split:
    """One linear layer, or several that read the same input.

    All micro-batches that are under way share one copy of the weights in the activations' dtype: it is made again when a weight
    has been written to.
    """

    def __init__(self, gradients: WeightGradients):
        self.gradients = gradients
        self.key: tuple[Any, ...] | None = None
        self.copy: Tensor | None = None

    def __call__(
        self, x: Tensor, parameters: Sequence[Tensor], counts_E: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """[..., I] -> [..., O] in x's dtype, the weights [O, I] being stacked along their outputs.

        With counts, x is [R, I] as `grouped_linear` has it, and there is one weight [E, O, I]. `weights` are the parameters under
        other names where a function of all that it reads is asked for (see `model/recompute.py`).
        """
        out: Tensor = Product.apply(x, self, counts_E, parameters, *(weights or parameters))
        return out

    def weight(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All weights in one."""
        if len(weights) == 1 and weights[0].dtype == dtype:
            return weights[0]
        key = (dtype, *((each.data_ptr(), each._version) for each in weights))
        if self.copy is None or key != self.key:
            parts = [each.to(dtype) for each in weights]
            self.key, self.copy = key, parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.copy


class Product(torch.autograd.Function):
    """`Split`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split: Split, counts_E: Tensor | None, parameters: Sequence[Tensor], *weights: Tensor
    ) -> Tensor:
        """[..., O]."""
        weight = split.weight(weights, x.dtype)
        ctx.gradients, ctx.counts, ctx.parameters = split.gradients, counts_E, parameters
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

        def compute(sums: Sums) -> Sequence[Tensor]:
            if counts is not None:
                return [grouped_weight_gradient(grad, x, counts, sums[0])]
            return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).split([len(each) for each in parameters])

        return grad_x, None, None, None, *ctx.gradients.take(parameters, compute)
