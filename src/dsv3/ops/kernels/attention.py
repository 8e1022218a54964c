"""Causal attention within documents: forward, and backward without atomic additions, so that it repeats bit for bit.

A document is a range of tokens, so what a block of queries sees is a range of keys, and what sees a block of keys is a range
of queries. Loops run over these ranges alone. Blocks at their ends are masked: where documents change, and at the diagonal.
Those between are not, and are done first.

Heads of queries and keys are two parts, each a power of two wide, since blocks must be: 192 = 128 + 64 for DeepSeek-V3, which
are its content and its rotated part.

Legend: B sequences, T tokens, H heads, Q elements of a query or key head, V elements of a value head.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.ops.attention import parts


class Config(NamedTuple):
    """How work is cut: queries and keys of a block, and what computes it."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """Most of a thread."""


FORWARD = Config(128, 32, 8, 3, 128)
QUERIES = Config(128, 64, 8, 3)
"""Of the gradient of queries."""
KEYS = Config(32, 64, 4, 3)
"""Of the gradients of keys and values."""

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)
"""Score of what may not be seen. Finite: a row of such scores gives no NaN, and the first real one wipes out what it gave.
Where it is subtracted from itself it has been multiplied before: a product and a difference in one instruction are rounded
once, and what is left of two large numbers overflows the power of two."""


@triton.jit
def load(x, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return x.load([batch, head, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def load_both(parts, rests, batch, head, row, ROWS: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr):
    part = load(parts, batch, head, row, 0, ROWS, PART)
    # A function cannot return None: without a rest, what stands for it is not used.
    rest = part
    if REST > 0:
        rest = load(rests, batch, head, row, PART, ROWS, REST)
    return part, rest


@triton.jit
def scores(left, left_rest, right, right_rest, REST: tl.constexpr):
    product = tl.dot(left, right.T)
    if REST > 0:
        product = tl.dot(left_rest, right_rest.T, product)
    return product


@triton.jit
def turns(first, before, full, after, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Of the loop with masks or of the one without: (where it begins, blocks until it leaves some out, their width, blocks)."""
    if MASKED:
        return first, before, full * SIZE, before + after
    else:
        return first + before * SIZE, full, 0, full


@triton.jit
def keys_seen(start, row, T, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """(first key, blocks of keys with a mask, without, with a mask) of the queries from `row`."""
    end = tl.minimum(row + QUERIES, T)
    first = 0
    last = 0
    if start is not None:
        first = tl.load(start + row)
        last = tl.load(start + end - 1)
    before = tl.cdiv(last - first, KEYS)
    full = tl.maximum(row + 1 - first - before * KEYS, 0) // KEYS
    after = tl.cdiv(tl.maximum(end - first - (before + full) * KEYS, 0), KEYS)
    return first, before, full, after


@triton.jit
def seen(start_of, queries, keys):
    visible = keys <= queries
    if start_of is not None:
        visible &= keys >= start_of
    return visible


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_parts, q_rests, k_parts, k_rests, v_parts, start, out, log_sum, T, scale,
    Q_PART: tl.constexpr, Q_REST: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # The last queries see most: they begin first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    heads = tl.num_programs(1)
    rows = row + tl.arange(0, QUERIES)
    start_of = None
    if start is not None:
        start += batch.to(tl.int64) * T
        start_of = tl.load(start + rows, rows < T, other=0)[:, None]
    first, before, full, after = keys_seen(start, row, T, QUERIES, KEYS)
    q, q_rest = load_both(q_parts, q_rests, batch, head, row, QUERIES, Q_PART, Q_REST)
    sums = tl.zeros((QUERIES, V), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    factor = scale * LOG2_E
    for masked in tl.static_range(2):
        begin, until, jump, count = turns(first, before, full, after, KEYS, masked)
        for i in range(count):
            key = begin + i * KEYS
            if masked:
                key += tl.where(i < until, 0, jump)
            k, k_rest = load_both(k_parts, k_rests, batch, head, key, KEYS, Q_PART, Q_REST)
            score = scores(q, q_rest, k, k_rest, Q_REST)
            if masked:
                keys = key + tl.arange(0, KEYS)[None, :]
                score = tl.where(seen(start_of, rows[:, None], keys), score * factor, HIDDEN)
                higher = tl.maximum(highest, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None])
            else:
                higher = tl.maximum(highest, tl.max(score, 1) * factor)
                weight = tl.exp2(score * factor - higher[:, None])
            shrink = tl.exp2(highest - higher)
            highest = higher
            total = total * shrink + tl.sum(weight, 1)
            v = load(v_parts, batch, head, key, 0, KEYS, V)
            sums = tl.dot(weight.to(v.dtype), v, sums * shrink[:, None])
    inside = rows < T
    at = out + ((batch.to(tl.int64) * T + rows) * heads + head)[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(at, (sums / total[:, None]).to(out.dtype.element_ty), inside[:, None])
    if log_sum is not None:
        tl.store(log_sum + (batch.to(tl.int64) * heads + head) * T + rows, highest + tl.log2(total), inside)


@triton.jit(do_not_specialize=["T"])
def queries_kernel(
    q_parts, q_rests, k_parts, k_rests, v_parts, grad_parts, out, start, log_sum, inner, grad_q, T, scale,
    Q_PART: tl.constexpr, Q_REST: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    heads = tl.num_programs(1)
    rows = row + tl.arange(0, QUERIES)
    inside = rows < T
    start_of = None
    if start is not None:
        start += batch.to(tl.int64) * T
        start_of = tl.load(start + rows, inside, other=0)[:, None]
    first, before, full, after = keys_seen(start, row, T, QUERIES, KEYS)
    at = (batch.to(tl.int64) * heads + head) * T + rows
    token = ((batch.to(tl.int64) * T + rows) * heads + head)[:, None]
    log_sum_of = tl.load(log_sum + at, inside, other=0.0)
    q, q_rest = load_both(q_parts, q_rests, batch, head, row, QUERIES, Q_PART, Q_REST)
    grad = load(grad_parts, batch, head, row, 0, QUERIES, V)
    result = tl.load(out + token * V + tl.arange(0, V)[None, :], inside[:, None], other=0.0)
    inner_of = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(inner + at, inner_of, inside)
    sums = tl.zeros((QUERIES, Q_PART), tl.float32)
    if Q_REST > 0:
        sums_rest = tl.zeros((QUERIES, Q_REST), tl.float32)
    factor = scale * LOG2_E
    for masked in tl.static_range(2):
        begin, until, jump, count = turns(first, before, full, after, KEYS, masked)
        for i in range(count):
            key = begin + i * KEYS
            if masked:
                key += tl.where(i < until, 0, jump)
            k, k_rest = load_both(k_parts, k_rests, batch, head, key, KEYS, Q_PART, Q_REST)
            v = load(v_parts, batch, head, key, 0, KEYS, V)
            score = scores(q, q_rest, k, k_rest, Q_REST)
            if masked:
                keys = key + tl.arange(0, KEYS)[None, :]
                score = tl.where(seen(start_of, rows[:, None], keys), score, HIDDEN)
            weight = tl.exp2(score * factor - log_sum_of[:, None])
            of_score = (weight * (tl.dot(grad, v.T) - inner_of[:, None])).to(k.dtype)
            sums = tl.dot(of_score, k, sums)
            if Q_REST > 0:
                sums_rest = tl.dot(of_score, k_rest, sums_rest)
    to = grad_q + token * (Q_PART + Q_REST)
    dtype: tl.constexpr = grad_q.dtype.element_ty
    tl.store(to + tl.arange(0, Q_PART)[None, :], (sums * scale).to(dtype), inside[:, None])
    if Q_REST > 0:
        tl.store(to + Q_PART + tl.arange(0, Q_REST)[None, :], (sums_rest * scale).to(dtype), inside[:, None])


@triton.jit(do_not_specialize=["T"])
def keys_kernel(
    q_parts, q_rests, k_parts, k_rests, v_parts, grad_parts, end, log_sum, inner, grad_k, grad_v, T, scale,
    Q_PART: tl.constexpr, Q_REST: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    heads = tl.num_programs(1)
    keys = key + tl.arange(0, KEYS)
    inside = keys < T
    stop = tl.minimum(key + KEYS, T)
    end_of = T
    first_end = T
    last_end = T
    if end is not None:
        end += batch.to(tl.int64) * T
        end_of = tl.load(end + keys, inside, other=0)[:, None]
        first_end = tl.load(end + key)
        last_end = tl.load(end + stop - 1)
    before = tl.cdiv(stop - key, QUERIES)
    full = tl.maximum(first_end - key - before * QUERIES, 0) // QUERIES
    after = tl.cdiv(tl.maximum(last_end - key - (before + full) * QUERIES, 0), QUERIES)
    log_sum += (batch.to(tl.int64) * heads + head) * T
    inner += (batch.to(tl.int64) * heads + head) * T
    k, k_rest = load_both(k_parts, k_rests, batch, head, key, KEYS, Q_PART, Q_REST)
    of_k = tl.zeros((KEYS, Q_PART), tl.float32)
    if Q_REST > 0:
        of_k_rest = tl.zeros((KEYS, Q_REST), tl.float32)
    v = load(v_parts, batch, head, key, 0, KEYS, V)
    of_v = tl.zeros((KEYS, V), tl.float32)
    factor = scale * LOG2_E
    for masked in tl.static_range(2):
        begin, until, jump, count = turns(key, before, full, after, QUERIES, masked)
        for i in range(count):
            row = begin + i * QUERIES
            if masked:
                row += tl.where(i < until, 0, jump)
            rows = row + tl.arange(0, QUERIES)
            q, q_rest = load_both(q_parts, q_rests, batch, head, row, QUERIES, Q_PART, Q_REST)
            grad = load(grad_parts, batch, head, row, 0, QUERIES, V)
            if masked:
                log_sum_of = tl.load(log_sum + rows, rows < T, other=0.0)
                inner_of = tl.load(inner + rows, rows < T, other=0.0)
            else:
                log_sum_of = tl.load(log_sum + rows)
                inner_of = tl.load(inner + rows)
            # Transposed, so that the products below find it where it is computed.
            score = scores(k, k_rest, q, q_rest, Q_REST)
            if masked:
                score = tl.where((keys[:, None] <= rows[None, :]) & (rows[None, :] < end_of), score, HIDDEN)
            weight = tl.exp2(score * factor - log_sum_of[None, :])
            of_v = tl.dot(weight.to(grad.dtype), grad, of_v)
            of_score = (weight * (tl.dot(v, grad.T) - inner_of[None, :])).to(q.dtype)
            of_k = tl.dot(of_score, q, of_k)
            if Q_REST > 0:
                of_k_rest = tl.dot(of_score, q_rest, of_k_rest)
    token = ((batch.to(tl.int64) * T + keys) * heads + head)[:, None]
    dtype: tl.constexpr = grad_k.dtype.element_ty
    to = grad_k + token * (Q_PART + Q_REST)
    tl.store(to + tl.arange(0, Q_PART)[None, :], (of_k * scale).to(dtype), inside[:, None])
    if Q_REST > 0:
        tl.store(to + Q_PART + tl.arange(0, Q_REST)[None, :], (of_k_rest * scale).to(dtype), inside[:, None])
    tl.store(grad_v + token * V + tl.arange(0, V)[None, :], of_v.to(dtype), inside[:, None])


def blocks(x_BTHX: Tensor, rows: int, width: int) -> TensorDescriptor:
    """What loads `rows` tokens of `width` elements of a head; zeros behind the last token."""
    return TensorDescriptor.from_tensor(x_BTHX.transpose(1, 2), [1, 1, rows, width])


def both(x_BTHQ: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """`blocks` of the two parts of a head."""
    part, rest = parts(x_BTHQ.shape[3])
    return blocks(x_BTHQ, rows, part), blocks(x_BTHQ, rows, rest) if rest else None


def forward(
    q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, scale: float, start_BT: Tensor | None, keep: bool,
    config: Config = FORWARD,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out [B, T, H, V], with `keep` the logarithm to base 2 of the sum of exponentials, FP32 [B, H, T]).

    `start_BT`: int32, where each token's document begins; None where each sequence is one document.
    """
    (batch, length, heads, query), value = q_BTHQ.shape, v_BTHV.shape[3]
    out = torch.empty(batch, length, heads, value, dtype=v_BTHV.dtype, device=v_BTHV.device)
    log_sum = torch.empty(batch, heads, length, device=out.device) if keep else None
    forward_kernel[(triton.cdiv(length, config.queries), heads, batch)](
        *both(q_BTHQ, config.queries), *both(k_BTHQ, config.keys), blocks(v_BTHV, config.keys, value), start_BT,
        out, log_sum, length, scale, *parts(query), value, config.queries, config.keys,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    return out, log_sum


def backward(
    grad_BTHV: Tensor, q_BTHQ: Tensor, k_BTHQ: Tensor, v_BTHV: Tensor, out_BTHV: Tensor, log_sum_BHT: Tensor,
    scale: float, start_BT: Tensor | None, end_BT: Tensor | None,
    of_queries: Config = QUERIES, of_keys: Config = KEYS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. `end_BT`: int32, the first position behind each token's document."""
    (batch, length, heads, query), value = q_BTHQ.shape, v_BTHV.shape[3]
    widths = *parts(query), value
    grad_q, grad_k, grad_v = (
        torch.empty(batch, length, heads, width, dtype=q_BTHQ.dtype, device=q_BTHQ.device)
        for width in (query, query, value)
    )
    inner = torch.empty_like(log_sum_BHT)
    rows, columns = of_queries.queries, of_queries.keys
    queries_kernel[(triton.cdiv(length, rows), heads, batch)](
        *both(q_BTHQ, rows), *both(k_BTHQ, columns), blocks(v_BTHV, columns, value), blocks(grad_BTHV, rows, value),
        out_BTHV, start_BT, log_sum_BHT, inner, grad_q, length, scale, *widths, rows, columns,
        num_warps=of_queries.warps, num_stages=of_queries.stages, maxnreg=of_queries.registers,
    )  # fmt: skip
    rows, columns = of_keys.queries, of_keys.keys
    keys_kernel[(triton.cdiv(length, columns), heads, batch)](
        *both(q_BTHQ, rows), *both(k_BTHQ, columns), blocks(v_BTHV, columns, value), blocks(grad_BTHV, rows, value),
        end_BT, log_sum_BHT, inner, grad_k, grad_v, length, scale, *widths, rows, columns,
        num_warps=of_keys.warps, num_stages=of_keys.stages, maxnreg=of_keys.registers,
    )  # fmt: skip
    return grad_q, grad_k, grad_v
