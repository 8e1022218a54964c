"""Where each token's document begins, and where it ends, from the numbers of documents: one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
"""Tokens of a program."""


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def beginnings(segment, t, T, BACKWARDS: tl.constexpr):
    inside = (t >= 0) & (t < T)
    if BACKWARDS:
        own = tl.load(segment + T - 1 - t, inside, other=0)
        before = tl.load(segment + T - t, inside & (t > 0), other=0)
    else:
        own = tl.load(segment + t, inside, other=0)
        before = tl.load(segment + t - 1, inside & (t > 0), other=0)
    return tl.where(inside & ((t == 0) | (own != before)), t, -1)


@triton.jit(do_not_specialize=["T", "stride"])
def bounds_kernel(segment, out, T, stride, BACKWARDS: tl.constexpr, CHUNK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    segment += batch * stride
    out += batch * T
    chunk = tl.program_id(0) * CHUNK
    t = chunk + tl.arange(0, CHUNK)
    found = tl.associative_scan(beginnings(segment, t, T, BACKWARDS), 0, larger)
    # The document that reaches into this chunk began in an earlier one, mostly the one before.
    carried = tl.full((), -1, tl.int32)
    while (carried < 0) & (chunk > 0):
        chunk -= CHUNK
        carried = tl.max(beginnings(segment, chunk + tl.arange(0, CHUNK), T, BACKWARDS), 0)
    first = tl.maximum(found, carried)
    if BACKWARDS:
        tl.store(out + T - 1 - t, T - first, t < T)
    else:
        tl.store(out + t, first, t < T)


def bounds(segment_BT: Tensor, backwards: bool, chunk: int = CHUNK) -> Tensor:
    """int32 [B, T]: `starts` of `dsv3.ops.attention` or, backwards, its `ends`."""
    batch, length = segment_BT.shape
    segment_BT = segment_BT if segment_BT.stride(1) == 1 else segment_BT.contiguous()
    out = torch.empty(batch, length, dtype=torch.int32, device=segment_BT.device)
    grid = (triton.cdiv(length, chunk), batch)
    bounds_kernel[grid](segment_BT, out, length, segment_BT.stride(0), backwards, chunk, num_warps=4)
    return out
