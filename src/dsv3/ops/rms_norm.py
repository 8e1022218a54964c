"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in FP32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in FP32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class SavedScale(torch.autograd.Function):
    """Keeps the input and one factor a row, instead of the intermediates that autograd of the definition would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = factor.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        unit = x * factor
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        inner = (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_unit = grad * weight
        return unit.mul_(inner).neg_().add_(grad_unit).mul_(factor).to(x.dtype), grad_weight, None


def on_cpu(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Torch has a fused kernel on GPUs; on CPU its backward keeps and rereads several copies."""
    return None if x.device.type == "cpu" and x.dim() > 1 else "for tensors on the CPU"


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own; the weight takes the input's dtype, as its fused kernel demands."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


rms_norm = Operation(
    "rms_norm",
    [
        Implementation("saved_scale", SavedScale.apply, on_cpu),
        Implementation("torch", fused, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`rms_norm(x [..., D], weight [D], eps) -> [..., D]` in x's dtype."""
