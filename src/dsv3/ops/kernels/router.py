"""Selection of experts: a few tokens a warp, their affinities in registers from the first comparison to the last.

Numbers are compared as integers of the same order, so that NaN takes part (as the highest, as for torch) and every token
gets K different experts whatever it holds. Ties go to the lower number.

Legend: as in `dsv3.ops.router`; G groups of S experts, both padded to powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_WARPS = (2, 1)
"""Tokens of a block, and its warps: within one warp, maxima need no shared memory."""
GRADIENT_TOKENS = 64
"""Tokens of a block of the backward pass."""

LOWEST = tl.constexpr(-(2**31))
"""Below every number."""


@triton.jit
def ordered(number):
    bits = number.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + 1)


@triton.jit
def number_of(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def highest(order, place, AXIS: tl.constexpr, LENGTH: tl.constexpr):
    best = tl.max(order, axis=AXIS, keep_dims=True)
    at = tl.min(tl.where(order == best, place, LENGTH), axis=AXIS, keep_dims=True)
    return best, place == at


@triton.jit
def among_highest(order, place, COUNT: tl.constexpr, LENGTH: tl.constexpr):
    chosen = order != order
    for _ in tl.static_range(COUNT):
        _best, hit = highest(order, place, 1, LENGTH)
        chosen |= hit
        order = tl.where(hit, LOWEST, order)
    return chosen


@triton.jit
def select_kernel(
    affinity, bias, weight, expert, tokens, scaling,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, KEPT: tl.constexpr, NORMALISE: tl.constexpr,
    G_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    E_BLOCK: tl.constexpr = G_BLOCK * S_BLOCK
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, E_BLOCK)[None, :]
    group, within = place // S_BLOCK, place % S_BLOCK
    real = (group < G) & (within < S)
    number = group * S + within
    inside = (token < tokens)[:, None] & real
    own = tl.load(affinity + token[:, None].to(tl.int64) * (G * S) + number, mask=inside, other=1.0)
    order = tl.where(real, ordered(own + tl.load(bias + number, mask=real, other=0.0)), LOWEST)
    if KEPT < G:
        grouped = tl.reshape(order, [TOKENS, G_BLOCK, S_BLOCK])
        in_group = tl.arange(0, S_BLOCK)[None, None, :]
        first, hit = highest(grouped, in_group, 2, S_BLOCK)
        second = tl.max(tl.where(hit, LOWEST, grouped), axis=2)
        rank = ordered(number_of(tl.reshape(first, [TOKENS, G_BLOCK])) + number_of(second))
        groups = tl.arange(0, G_BLOCK)[None, :]
        kept = among_highest(tl.where(groups < G, rank, LOWEST), groups, KEPT, G_BLOCK)
        order = tl.reshape(tl.where(kept[:, :, None], grouped, LOWEST), [TOKENS, E_BLOCK])
    chosen = among_highest(order, place, K, E_BLOCK)
    if NORMALISE:
        factor = scaling / tl.sum(tl.where(chosen, own, 0.0), axis=1, keep_dims=True)
    else:
        factor = tl.full([TOKENS, 1], scaling, tl.float32)
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    at = token[:, None].to(tl.int64) * K + slot
    tl.store(weight + at, own * factor, mask=chosen & inside)
    tl.store(expert + at, number.to(tl.int64), mask=chosen & inside)


@triton.jit
def gradient_kernel(
    grad_weight, affinity, expert, grad_affinity, tokens, experts, scaling,
    K: tl.constexpr, K_BLOCK: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    k = tl.arange(0, K_BLOCK)[None, :]
    inside = (token < tokens) & (k < K)
    assignment = token.to(tl.int64) * K + k
    at = token.to(tl.int64) * experts + tl.load(expert + assignment, mask=inside, other=0)
    grad = tl.load(grad_weight + assignment, mask=inside, other=0.0) * scaling
    if NORMALISE:
        own = tl.load(affinity + at, mask=inside, other=0.0)
        total = tl.sum(own, axis=1, keep_dims=True)
        total = tl.where(token < tokens, total, 1.0)
        grad = (grad - tl.sum(grad * own, axis=1, keep_dims=True) / total) / total
    tl.store(grad_affinity + at, grad, mask=inside)


def select(
    affinity_TE: Tensor,
    bias_E: Tensor,
    num_experts: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
    config: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(weight FP32 [T, K], expert int64 [T, K], ascending) of affinities in FP32 [T, E]."""
    tokens, experts = affinity_TE.shape
    weight_TK = torch.empty(tokens, num_experts, dtype=torch.float32, device=affinity_TE.device)
    expert_TK = torch.empty(tokens, num_experts, dtype=torch.int64, device=affinity_TE.device)
    groups = n_group if topk_group < n_group else 1
    size, warps = config or TOKENS_WARPS
    if tokens:
        select_kernel[(triton.cdiv(tokens, size),)](
            affinity_TE.contiguous(), bias_E.contiguous(), weight_TK, expert_TK, tokens, scaling,
            K=num_experts, G=groups, S=experts // groups, KEPT=min(topk_group, groups), NORMALISE=normalise,
            G_BLOCK=triton.next_power_of_2(groups), S_BLOCK=triton.next_power_of_2(experts // groups),
            TOKENS=size, num_warps=warps,
        )  # fmt: skip
    return weight_TK, expert_TK


def gradient_of_affinity(
    grad_weight_TK: Tensor, affinity_TE: Tensor, expert_TK: Tensor, normalise: bool, scaling: float
) -> Tensor:
    """[T, E] FP32: zeros but for the chosen experts."""
    (tokens, experts), chosen = affinity_TE.shape, expert_TK.shape[1]
    grad_TE = torch.zeros(tokens, experts, dtype=torch.float32, device=affinity_TE.device)
    if tokens:
        gradient_kernel[(triton.cdiv(tokens, GRADIENT_TOKENS),)](
            grad_weight_TK.contiguous(), affinity_TE.contiguous(), expert_TK, grad_TE, tokens, experts, scaling,
            K=chosen, K_BLOCK=triton.next_power_of_2(chosen), NORMALISE=normalise, TOKENS=GRADIENT_TOKENS, num_warps=4,
        )  # fmt: skip
    return grad_TE
