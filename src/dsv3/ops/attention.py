"""Causal attention over whole sequences, for training and prefill.

Legend: B sequences, T tokens, H heads, Q elements of a query or key head, V elements of a value head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything


def visible(length: int, segment_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query (rows) may see a key (columns): not later and, with segments, of the same document. [B or 1, 1, T, T]"""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if segment_BT is None:
        return causal
    return causal & (segment_BT[:, None, :, None] == segment_BT[:, None, None, :])


def reference(q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, scale: float, segment_BT: Tensor | None = None) -> Tensor:
    """The definition, softmax in FP32."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BTHQ, k_BTHQ).float() * scale
    scores = scores.masked_fill(~visible(q_BTHQ.shape[1], segment_BT, q_BTHQ.device), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v_BTHV.dtype), v_BTHV)


QUERY_BLOCK = 128
"""Queries handled at a time by `Matmul`: a block sees only the keys up to its own end, which saves near half the work."""


class Matmul(torch.autograd.Function):
    """Batched products and a softmax, block by block. On CPU and short sequences half the time of torch's own backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None) -> Tensor:
        q, k, v = (
            (q * scale).transpose(1, 2).contiguous(),
            k.transpose(1, 2).contiguous(),
            v.transpose(1, 2).contiguous(),
        )
        hidden = ~visible(q.shape[2], segment_BT, q.device)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        saved = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            rows, end = slice(start, start + QUERY_BLOCK), min(start + QUERY_BLOCK, q.shape[2])
            scores = q[:, :, rows] @ k[:, :, :end].mT
            # Without documents to tell apart, only the block on the diagonal holds later keys.
            masked = slice(start if segment_BT is None else 0, end)
            scores[..., masked].masked_fill_(hidden[:, :, rows, masked], float("-inf"))
            probability = scores.softmax(-1)
            out[:, :, rows] = probability @ v[:, :, :end]
            saved.append(probability)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *saved)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *saved = ctx.saved_tensors
        grad = grad_BTHV.transpose(1, 2).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, probability in zip(range(0, q.shape[2], QUERY_BLOCK), saved, strict=True):
            rows, end = slice(start, start + QUERY_BLOCK), probability.shape[3]
            grad_v[:, :, :end] += probability.mT @ grad[:, :, rows]
            grad_p = grad[:, :, rows] @ v[:, :, :end].mT
            grad_s = torch._softmax_backward_data(grad_p, probability, -1, q.dtype)
            grad_q[:, :, rows] = grad_s @ k[:, :, :end]
            grad_k[:, :, :end] += grad_s.mT @ q[:, :, rows]
        scale: float = ctx.scale
        return grad_q.mul_(scale).transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None


def short_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None = None) -> str | None:
    """The probabilities are kept for the backward pass, so sequences must be short."""
    if q.device.type != "cpu":
        return "for tensors on the CPU"
    if not (torch.is_grad_enabled() and q.requires_grad):
        return "pays in training only"
    return None if q.shape[1] <= 1024 else "for at most 1,024 tokens, since probabilities are kept"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None = None) -> Tensor:
    """Torch's attention: cuDNN or flash kernels. On CPU, value heads shorter than query heads would leave the fast path."""
    padding = q.shape[3] - v.shape[3] if q.device.type == "cpu" else 0
    values = F.pad(v, (0, padding)) if padding > 0 else v
    mask = None if segment_BT is None else visible(q.shape[1], segment_BT, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[..., : v.shape[3]].transpose(1, 2)


attention = Operation(
    "attention",
    [
        Implementation("matmul", Matmul.apply, short_on_cpu),
        Implementation("sdpa", sdpa, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`attention(q [B, T, H, Q], k [B, T, H, Q], v [B, T, H, V], scale, segment_BT=None) -> [B, T, H, V]`.

Causal; with `segment_BT` (int [B, T], one number a document) tokens see their own document only.
"""
