"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in FP32."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.cast import cast
from dsv3.ops.operation import Implementation, Operation, anything, in_training


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in FP32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class UnitKept(torch.autograd.Function):
    """Keeps the normalised rows and one factor a row, instead of the copies that autograd of the definition would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = (wide * factor).to(x.dtype)
        ctx.save_for_backward(unit, weight, factor)
        return unit * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, weight, factor = ctx.saved_tensors
        grad_weight = (grad * unit).flatten(0, -2).sum(0, dtype=torch.float32)
        grad_unit = grad * weight.to(grad.dtype)
        inner = torch.linalg.vecdot(grad_unit, unit).float().div_(unit.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad_unit.float(), unit.float(), inner, value=-1).mul_(factor)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None


def on_cpu(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Torch has a fused kernel on GPUs; on CPU its backward keeps and rereads several copies."""
    if (reason := in_training()) is not None:
        return reason
    return None if x.device.type == "cpu" and x.dim() > 1 else "for tensors on the CPU"


def few_operations(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(|x|^2 + D eps) * sqrt(D) weight`: four operations on x, half as many as torch's own on the CPU."""
    wide, size = x.float(), x.shape[-1]
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    root = torch.hypot(norm, torch.full((), math.sqrt(size * eps), device=x.device))
    return (wide / root * (weight.float() * math.sqrt(size))).to(x.dtype)


def in_inference_on_cpu(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """On a GPU torch's own is one kernel."""
    return None if x.device.type == "cpu" and not torch.is_grad_enabled() else "for inference on the CPU"


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own; the weight takes the input's dtype, as its fused kernel demands."""
    return F.rms_norm(x, (x.shape[-1],), cast(weight, x.dtype), eps)


rms_norm = Operation(
    "rms_norm",
    [
        Implementation("unit_kept", UnitKept.apply, on_cpu),
        Implementation("few_operations", few_operations, in_inference_on_cpu),
        Implementation("torch", fused, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`rms_norm(x [..., D], weight [D], eps) -> [..., D]` in x's dtype."""
