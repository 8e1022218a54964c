"""The output head and its cross-entropy in one: whole logits are never held, for they are the largest tensor of a step.

Legend: N positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything

IGNORE = -100
"""The target of a position that does not count."""
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Logits held at a time: on CPU what a core's cache holds, on a GPU about 1,000 rows of DeepSeek-V3's vocabulary."""


def chunk_rows(hidden_ND: Tensor, vocab_size: int) -> int:
    """Positions whose logits are held at a time."""
    return max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**27) // vocab_size)


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """-log p(target) of each position in FP32, 0 where the target is `IGNORE`; without gradients. [N]"""
    rows = chunk_rows(hidden_ND, len(weight_VD))
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
