"""The output head and its cross-entropy in one: whole logits are never held, for they are the largest tensor of a step.

Legend: N positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.cast import gradient_dtype
from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything

IGNORE = -100
"""The target of a position that does not count."""
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Logits held at a time: on CPU what a core's cache holds, on a GPU about 1,000 rows of DeepSeek-V3's vocabulary."""

IN_PLACE_ELEMENTS = 2**29
"""Logits that `InPlace` holds at a time: 4,152 rows of DeepSeek-V3's vocabulary, 1 GiB in BF16. Every chunk costs a reading
and a writing of the weight's gradient in FP32."""


def chunk_rows(hidden_ND: Tensor, vocab_size: int) -> int:
    """Positions whose logits are held at a time."""
    return max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**27) // vocab_size)


def token_losses_reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The definition, chunk by chunk."""
    rows = chunk_rows(hidden_ND, len(weight_VD))
    weight = weight_VD.to(hidden_ND.dtype)
    losses = [
        torch.nn.functional.cross_entropy((h @ weight.t()).float(), t, ignore_index=IGNORE, reduction="none")
        for h, t in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.cat(losses)


def token_losses_in_place(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Logits stay in the dtype of the hidden states."""
    from dsv3.ops.kernels.cross_entropy import losses

    rows = max(1, IN_PLACE_ELEMENTS // len(weight_VD))
    weight = weight_VD.to(hidden_ND.dtype)
    chunks = zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    return torch.cat([losses(h @ weight.t(), t, IGNORE, None) for h, t in chunks])


def on_gpu(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float | Tensor = 1.0) -> str | None:
    """The reason why the kernel does not serve."""
    if (reason := no_triton(hidden_ND, weight_VD, target_N)) is not None:
        return reason
    return None if hidden_ND.dtype in (torch.float32, torch.bfloat16) else "takes hidden states in float32 or bfloat16"


token_losses = Operation(
    "token_losses",
    [
        Implementation("in_place", token_losses_in_place, on_gpu),
        Implementation("reference", token_losses_reference, anything),
    ],
)
"""`token_losses(hidden [N, D], weight [V, D], target [N] int64) -> FP32 [N]`, without gradients.

-log p(target) of each position, 0 where the target is `IGNORE`."""


def reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float | Tensor) -> Tensor:
    """The definition."""
    logits = (hidden_ND @ weight_VD.to(hidden_ND.dtype).t()).float()
    return torch.nn.functional.cross_entropy(logits, target_N, ignore_index=IGNORE, reduction="sum") / divisor


class Chunked(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float | Tensor) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        rows = chunk_rows(hidden_ND, len(weight_VD))
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            hidden, target = hidden_ND[part], target_N[part]
            at = target.clamp(min=0).unsqueeze(1)
            logits = (hidden @ weight.t()).float()
            at_target = logits.gather(1, at)
            highest = logits.amax(1, keepdim=True)
            grad = logits.sub_(highest).exp_()
            norm = grad.sum(1, keepdim=True)
            row_scale = (target != IGNORE).unsqueeze(1) / divisor
            total += ((norm.log() + highest - at_target) * row_scale).sum()
            # Softmax minus one-hot, times its norm; what is constant along a row is multiplied into the smaller factors.
            grad = grad.scatter_add_(1, at, -norm).to(hidden.dtype)
            row_scale = row_scale / norm
            torch.mm(grad, weight, out=grad_hidden[part]).mul_(row_scale)
            grad_weight += grad.t() @ (hidden * row_scale).to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight.to(gradient_dtype(weight_VD)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None


class InPlace(torch.autograd.Function):
    """`Chunked` with logits that are never in FP32: a kernel with FP32 statistics overwrites them with their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float | Tensor) -> Tensor:
        from dsv3.ops.kernels.cross_entropy import losses

        weight = weight_VD.to(hidden_ND.dtype)
        rows = max(1, IN_PLACE_ELEMENTS // len(weight))
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
        grad_weight = None
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            logits = hidden_ND[part] @ weight.t()
            total += losses(logits, target_N[part], IGNORE, 1.0).sum()
            torch.mm(logits, weight, out=grad_hidden[part])
            grad_weight = plus_product(grad_weight, logits.t(), hidden_ND[part])
            del logits
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight.to(gradient_dtype(weight_VD)))
        ctx.divisor, ctx.weight = divisor, weight_VD
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.divisor
        return grad_hidden * grad.to(grad_hidden.dtype), add_scaled(ctx.weight, grad_weight, grad), None, None


@torch.no_grad()
def add_scaled(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor | None:
    """Adds gradient times factor to `weight.grad` where micro-batches before have left one: one pass over memory, where autograd has
    two; else it is for autograd."""
    total = weight.grad if weight.is_leaf else None
    if total is None or total.dtype != gradient.dtype:
        return gradient * factor
    total.addcmul_(gradient, factor)
    return None


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in FP32, in place of the total; the product is not rounded to the factors' dtype."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


linear_cross_entropy = Operation(
    "linear_cross_entropy",
    [
        Implementation("in_place", InPlace.apply, on_gpu),
        Implementation("chunked", Chunked.apply, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`linear_cross_entropy(hidden [N, D], weight [V, D], target [N] int64, divisor) -> FP32 scalar`.

The sum of -log softmax(hidden weight^T)[target] over positions whose target is not `IGNORE`, divided by `divisor`, a number or a
scalar of the device.
"""
