"""Causal attention over whole sequences, for training and prefill.

Documents are runs of equal numbers: where a number returns after another one, it is another document. What a token sees is
then one range of positions, from its document's first to its own.

Legend: B sequences, T tokens, H heads, Q elements of a query or key head, V elements of a value head.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything

log = logging.getLogger(__name__)


def starts(segment_BT: Tensor) -> Tensor:
    """int32 [B, T]: the first position of each token's document."""
    position = torch.arange(segment_BT.shape[1], dtype=torch.int32, device=segment_BT.device)
    first = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
    return torch.where(first, position, 0).cummax(1).values


def ends(segment_BT: Tensor) -> Tensor:
    """int32 [B, T]: the first position behind each token's document."""
    length = segment_BT.shape[1]
    return length - starts(segment_BT.flip(1)).flip(1)


def visible(length: int, segment_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query (rows) may see a key (columns): not later and, with segments, of the same document. [B or 1, 1, T, T]"""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if segment_BT is None:
        return causal
    return causal & (torch.arange(length, device=device) >= starts(segment_BT)[:, None, :, None])


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


def parts(width: int) -> tuple[int, int]:
    """A head's width as the largest power of two and the rest: kernels compute on blocks of powers of two. 192 = 128 + 64."""
    part = 1 << (width.bit_length() - 1)
    return part, width - part


def in_blocks(query: int, value: int) -> bool:
    """Whether the kernels compute heads of these widths: every part fills blocks, and registers hold them all."""
    part, rest = parts(query)
    sizes = [part, value, *([rest] if rest else [])]
    return query <= 192 and value <= 128 and all(size >= 16 and not size & (size - 1) for size in sizes)


class WithinDocuments(torch.autograd.Function):
    """The kernels. Keeps the logarithm of each softmax's sum for the backward pass, which repeats bit for bit."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None) -> Tensor:
        from dsv3.ops.kernels import attention
        from dsv3.ops.kernels.documents import bounds

        start = None if segment_BT is None else bounds(segment_BT, backwards=False)
        out, log_sum = attention.forward(q, k, v, scale, start, True)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, log_sum, start, segment_BT)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from dsv3.ops.kernels import attention
        from dsv3.ops.kernels.documents import bounds

        q, k, v, out, log_sum, start, segment_BT = ctx.saved_tensors
        end = None if segment_BT is None else bounds(segment_BT, backwards=True)
        grad = grad.contiguous() if unreadable(grad) else grad
        return *attention.backward(grad, q, k, v, out, log_sum, ctx.scale, start, end), None, None


def triton(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None = None) -> Tensor:
    """Kernels of ours, whose work is what documents let tokens see."""
    from dsv3.ops.kernels import attention
    from dsv3.ops.kernels.documents import bounds

    if torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        return WithinDocuments.apply(q, k, v, scale, segment_BT)
    start = None if segment_BT is None else bounds(segment_BT, backwards=False)
    return attention.forward(q, k, v, scale, start, False)[0]


def unreadable(x: Tensor) -> bool:
    """Whether bulk copies cannot read x: they want elements side by side, and all else at multiples of 16 bytes."""
    strides = [stride * x.itemsize for stride in x.stride()[:-1]]
    return x.stride(-1) != 1 or x.data_ptr() % 16 != 0 or any(stride % 16 or not stride for stride in strides)


def not_by_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None = None) -> str | None:
    """The reason why the kernels do not serve, or are not the fastest; None when they are to compute it."""
    if (reason := no_triton(q, k, v)) is not None:
        return reason
    if any(each.dtype != torch.bfloat16 for each in (q, k, v)):
        return "needs BF16"
    if not in_blocks(q.shape[3], v.shape[3]):
        return "needs query heads of one or two powers of two, at most 192, and value heads of one, at most 128"
    if not q.numel() or scale <= 0 or any(map(unreadable, (q, k, v))):
        return "needs tokens, a positive scale, and heads at multiples of 16 bytes"
    if segment_BT is None and not torch.are_deterministic_algorithms_enabled() and by_cudnn(q, k, v):
        return "cuDNN is faster where there are no documents, and need not repeat bit for bit"
    return None


def by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN computes causal attention of these, which torch denies it where algorithms must be deterministic."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, False))


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_BT: Tensor | None = None) -> Tensor:
    """Torch's attention: cuDNN or flash kernels. On CPU, value heads shorter than query heads would leave the fast path."""
    padding = q.shape[3] - v.shape[3] if q.device.type == "cpu" else 0
    values = F.pad(v, (0, padding)) if padding > 0 else v
    mask = None if segment_BT is None else visible(q.shape[1], segment_BT, q.device)
    if q.is_cuda and (mask is not None or not by_cudnn(q, k, v)):
        say_slow("documents" if segment_BT is not None else "no documents", q.dtype, q.shape[3], v.shape[3])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[..., : v.shape[3]].transpose(1, 2)


@cache
def say_slow(documents: str, dtype: torch.dtype, query: int, value: int) -> None:
    """Once for each kind of call."""
    log.warning(
        "attention with %s, in %s, with heads of %d and %d elements is slow on this GPU: torch has no fast kernel for it",
        documents, dtype, query, value,
    )  # fmt: skip


attention = Operation(
    "attention",
    [
        Implementation("matmul", Matmul.apply, short_on_cpu),
        Implementation("triton", triton, not_by_triton),
        Implementation("sdpa", sdpa, anything),
        Implementation("reference", reference, anything),
    ],
)
"""`attention(q [B, T, H, Q], k [B, T, H, Q], v [B, T, H, V], scale, segment_BT=None) -> [B, T, H, V]`.

Causal; with `segment_BT` (int [B, T], a run of equal numbers a document) tokens see their own document only.
"""


def behind_context_reference(q_BTHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """The definition, softmax in FP32."""
    length, held = q_BTHQ.shape[1], k_BSHQ.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BTHQ, k_BSHQ).float() * scale
    later = torch.ones(length, held, dtype=torch.bool, device=q_BTHQ.device).triu(held - length + 1)
    return torch.einsum(
        "bhqk,bkhd->bqhd", scores.masked_fill(later, float("-inf")).softmax(-1).to(v_BSHV.dtype), v_BSHV
    )


def behind_context_sdpa(q_BTHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """Torch's attention, whose flash kernels want values as wide as keys."""
    # Here, because it brings all of torch.compile with it, a second or more of every program's start.
    from torch.nn.attention.bias import causal_lower_right

    values = F.pad(v_BSHV, (0, max(q_BTHQ.shape[3] - v_BSHV.shape[3], 0)))
    out: Tensor = F.scaled_dot_product_attention(
        q_BTHQ.transpose(1, 2),
        k_BSHQ.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=causal_lower_right(q_BTHQ.shape[1], k_BSHQ.shape[1]),
        scale=scale,
    )
    return out[..., : v_BSHV.shape[3]].transpose(1, 2)


attention_behind_context = Operation(
    "attention_behind_context",
    [
        Implementation("sdpa", behind_context_sdpa, anything),
        Implementation("reference", behind_context_reference, anything),
    ],
)
"""`attention_behind_context(q [B, T, H, Q], k [B, S, H, Q], v [B, S, H, V], scale) -> [B, T, H, V]`: the last T of S tokens, causal."""
