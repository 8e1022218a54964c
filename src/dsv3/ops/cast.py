"""A weight in the dtype of the activations, and its gradient in its own."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.ops.accumulate import accumulate


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. Asking is cheaper than a `to` with nothing to do, which counts where tokens come one by one.

    The gradient of a parameter goes straight to its `grad`: see `add_gradient`.
    """
    if weight.dtype == dtype and (not torch.is_grad_enabled() or gradient_dtype(weight) == dtype):
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


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """What a weight's gradient is in: its own dtype, but FP32 for one in BF16 whose master copy is elsewhere (`parallel.zero`)."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


class Rows(torch.autograd.Function):
    """Rows of a weight, their gradients added up in the dtype of the weight's gradient (`gradient_dtype`)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: Tensor) -> Tensor:
        """(weight [R, D], row int [...]) -> [..., D]."""
        ctx.weight = weight
        ctx.save_for_backward(row)
        return torch.nn.functional.embedding(row, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """The weight's. On a GPU the rows that were read alone are added to what micro-batches before have left."""
        (row,), weight = ctx.saved_tensors, ctx.weight
        if weight.is_cuda and weight.is_leaf and weight.grad is not None:
            add_rows(weight.grad, row, grad)
            return None, None
        wide = grad.to(gradient_dtype(weight))
        return torch.ops.aten.embedding_dense_backward(wide, row, len(weight), -1, False), None


@torch.no_grad()
def add_rows(total: Tensor, row: Tensor, gradient: Tensor) -> None:
    """Adds gradients [..., D] to the rows [...] of `total` [R, D], in an order that is always the same."""
    total.index_put_((row.flatten(),), gradient.flatten(0, -2).to(total.dtype), accumulate=True)


@torch.no_grad()
def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Adds to `weight.grad`, in its dtype, a gradient of any: one pass over memory in place of two. `weight.grad` itself is the
    result of a product that has added to it already."""
    if weight.grad is None:
        weight.grad = gradient.to(gradient_dtype(weight))
    elif gradient is not weight.grad:
        accumulate(weight.grad, gradient)
