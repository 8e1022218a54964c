"""A weight in the dtype of the activations, and its gradient in its own."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.ops.accumulate import accumulate


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. Asking is cheaper than a `to` with nothing to do, which counts where tokens come one by one.

    The gradient of a parameter goes straight to its `grad`: see `add_gradient`.
    """
    if weight.dtype == dtype:
        return weight
    if isinstance(weight, nn.Parameter) and weight.requires_grad and torch.is_grad_enabled():
        cast_weight: Tensor = Cast.apply(weight, dtype)
        return cast_weight
    return weight.to(dtype)


class Cast(torch.autograd.Function):
    """`weight.to(dtype)`, whose backward leaves nothing for autograd to convert and to add."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Any shape."""
        ctx.weight = weight
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Adds to `weight.grad`."""
        add_gradient(ctx.weight, grad)
        return None, None


@torch.no_grad()
def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Adds to `weight.grad`, in the weight's dtype, a gradient of any: one pass over memory in place of two."""
    if weight.grad is None:
        weight.grad = gradient.to(weight.dtype)
    else:
        accumulate(weight.grad, gradient)
