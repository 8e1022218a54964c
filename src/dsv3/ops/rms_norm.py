"""RMSNorm: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in FP32."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.cast import cast
from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, in_training
from dsv3.ops.tiles import Tiles, empty_tiles, rows_reference


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


class InputKept(torch.autograd.Function):
    """Keeps the input alone: the backward kernel reads it whole, and finds the factor of each row on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from dsv3.ops.kernels.rms_norm import forward

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return forward(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        size = x.shape[-1]
        grad_x, grad_weight = rms_norm_backward(grad.reshape(-1, size), x.reshape(-1, size), weight, ctx.eps)
        return grad_x.view(x.shape), grad_weight, None


def not_by_triton(x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False) -> str | None:
    """The reason why the kernels do not serve; None when they do."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"needs BF16 or FP32, not {x.dtype}"
    if x.stride(-1) != 1 or not weight.is_contiguous():
        return "needs rows whose elements are side by side"
    if x.shape[-1] > 16384:
        return "needs rows of at most 16384 elements"
    return no_triton(x, weight)


def training_not_by_triton(x: Tensor, weight: Tensor, eps: float) -> str | None:
    """Torch's own kernel is as fast forward, and much slower backward."""
    return in_training() or not_by_triton(x, weight, eps)


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own; the weight takes the input's dtype, as its fused kernel demands."""
    return F.rms_norm(x, (x.shape[-1],), cast(weight, x.dtype), eps)


rms_norm = Operation(
    "rms_norm",
    [
        Implementation("unit_kept", UnitKept.apply, on_cpu),
        Implementation("few_operations", few_operations, in_inference_on_cpu),
        Implementation("triton", InputKept.apply, training_not_by_triton),
        Implementation("torch", fused, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`rms_norm(x [..., D], weight [D], eps) -> [..., D]` in x's dtype."""


def tiles_reference(x_RD: Tensor, weight: Tensor, eps: float, power_of_two: bool = False) -> tuple[Tensor, Tiles]:
    """The definition: the tiles are those of the norm after its rounding."""
    normed = reference(x_RD, weight, eps)
    return normed, rows_reference(normed, power_of_two)


def tiles_triton(x_RD: Tensor, weight: Tensor, eps: float, power_of_two: bool = False) -> tuple[Tensor, Tiles]:
    """One reading of x."""
    from dsv3.ops.kernels.rms_norm import forward

    rows, columns = x_RD.shape
    tiles = empty_tiles(rows, columns, x_RD.device)
    return forward(x_RD, weight, eps, tiles, power_of_two), tiles


rms_norm_tiles = Operation(
    "rms_norm_tiles",
    [Implementation("triton", tiles_triton, not_by_triton), Implementation("reference", tiles_reference, anything)],
)
"""`rms_norm_tiles(x [R, D], weight [D], eps, power_of_two=False) -> (norm [R, D] in x's dtype, Tiles of it)`, without gradients:
`rms_norm_backward` makes them."""


def backward_reference(grad_RD: Tensor, x_RD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition, in FP32: with u = x factor and g = grad weight, (g - u mean(g u)) factor."""
    wide, grad = x_RD.float(), grad_RD.float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, grad_unit = wide * factor, grad * weight.float()
    grad_x = (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True)) * factor
    return grad_x.to(x_RD.dtype), (grad * unit).sum(0).to(weight.dtype)


def backward_triton(grad_RD: Tensor, x_RD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One reading of both; the weight's gradient as partial sums, which torch adds up, always in one order."""
    from dsv3.ops.kernels.rms_norm import backward

    # A gradient may come expanded from a sum.
    return backward(grad_RD if grad_RD.stride(-1) == 1 else grad_RD.contiguous(), x_RD, weight, eps)


def backward_not_by_triton(grad_RD: Tensor, x_RD: Tensor, weight: Tensor, eps: float) -> str | None:
    """The reason why the kernel does not serve; None when it does."""
    return no_triton(grad_RD) or not_by_triton(x_RD, weight, eps)


rms_norm_backward = Operation(
    "rms_norm_backward",
    [
        Implementation("triton", backward_triton, backward_not_by_triton),
        Implementation("reference", backward_reference, anything),
    ],
)
"""`rms_norm_backward(grad [R, D], x [R, D], weight [D], eps) -> (grad of x [R, D], grad of weight [D])`, in the dtypes of x and of
weight: the norm's gradients from its input alone."""
