"""The output head and its cross-entropy in one: whole logits are never held, for they are the largest tensor of a step.

Legend: N positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything

IGNORE = -100
"""The target of a position that does not count."""
CHUNK_ELEMENTS = 2**21
"""Logits held at a time. At a vocabulary of 2,048 that is 1,024 rows, which stay in a CPU's cache."""


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """-log p(target) of each position in FP32, 0 where the target is `IGNORE`; without gradients. [N]"""
    rows = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    weight = weight_VD.to(hidden_ND.dtype)
    losses = [
        torch.nn.functional.cross_entropy((h @ weight.t()).float(), t, ignore_index=IGNORE, reduction="none")
        for h, t in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.cat(losses)


def reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float) -> Tensor:
    """The definition."""
    logits = (hidden_ND @ weight_VD.to(hidden_ND.dtype).t()).float()
    return torch.nn.functional.cross_entropy(logits, target_N, ignore_index=IGNORE, reduction="sum") / divisor


class Chunked(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, divisor: float) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            hidden, target = hidden_ND[part], target_N[part]
            at = target.clamp(min=0).unsqueeze(1)
            row_scale = (target != IGNORE).unsqueeze(1) / divisor
            log_p = (hidden @ weight.t()).float().log_softmax(1)
            total -= (log_p.gather(1, at) * row_scale).sum()
            # softmax minus one-hot; what is constant along a row is multiplied into the smaller factor.
            grad = log_p.exp_().scatter_add_(1, at, torch.full(at.shape, -1.0, device=at.device)).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part]).mul_(row_scale)
            grad_weight += grad.t() @ (hidden * row_scale).to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None


linear_cross_entropy = Operation(
    "linear_cross_entropy",
    [Implementation("chunked", Chunked.apply, anything), Implementation("reference", reference, anything)],
)
"""`linear_cross_entropy(hidden [N, D], weight [V, D], target [N] int64, divisor) -> FP32 scalar`.

The sum of -log softmax(hidden weight^T)[target] over positions whose target is not `IGNORE`, divided by `divisor`.
"""
