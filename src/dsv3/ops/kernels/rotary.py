"""Heads of MLA: one program for some heads of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = (16, 4)
"""Heads of a program at a time, warps."""


@triton.jit
def rotate_kernel(
    x, turn, out, tokens, heads, content, pairs, x_batch, x_token, x_head, turn_batch, turn_token,
    BACKWARDS: tl.constexpr, HEADS: tl.constexpr, CONTENT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // parts).to(tl.int64)
    head = tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS)
    batch, at = token // tokens, token % tokens
    source = x + batch * x_batch + at * x_token + head.to(tl.int64)[:, None] * x_head
    target = out + (token * heads + head)[:, None] * (content + 2 * pairs)
    column = tl.arange(0, CONTENT)
    inside = (head < heads)[:, None] & (column < content)[None, :]
    tl.store(target + column[None, :], tl.load(source + column[None, :], inside), inside)
    pair = tl.arange(0, PAIRS)
    angle = turn + batch * turn_batch + at * turn_token + 2 * pair
    cosine = tl.load(angle, pair < pairs, other=0.0)[None, :]
    sine = tl.load(angle + 1, pair < pairs, other=0.0)[None, :]
    if BACKWARDS:
        sine = -sine
    element = tl.arange(0, 2 * PAIRS)
    inside = (head < heads)[:, None] & (element < 2 * pairs)[None, :]
    rest = tl.load(source + content + element[None, :], inside, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(rest, (HEADS, PAIRS, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    turned = tl.reshape(turned, (HEADS, 2 * PAIRS))
    tl.store(target + content + element[None, :], turned.to(out.dtype.element_ty), inside)


@triton.jit
def keys_kernel(
    kv, key, out, tokens, heads, content, rotary, kv_batch, kv_token, kv_head, key_batch, key_token,
    HEADS: tl.constexpr, CONTENT: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // parts).to(tl.int64)
    head = tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS)
    batch, at = token // tokens, token % tokens
    target = out + (token * heads + head)[:, None] * (content + rotary)
    source = kv + batch * kv_batch + at * kv_token + head.to(tl.int64)[:, None] * kv_head
    column = tl.arange(0, CONTENT)
    inside = (head < heads)[:, None] & (column < content)[None, :]
    tl.store(target + column[None, :], tl.load(source + column[None, :], inside), inside)
    element = tl.arange(0, ROTARY)
    shared = tl.load(key + batch * key_batch + at * key_token + element, element < rotary)
    inside = (head < heads)[:, None] & (element < rotary)[None, :]
    tl.store(target + content + element[None, :], tl.broadcast_to(shared[None, :], (HEADS, ROTARY)), inside)


@triton.jit
def keys_backward_kernel(
    grad_keys, grad_values, grad_kv, grad_key, tokens, heads, content, rotary, value,
    keys_batch, keys_token, keys_head, values_batch, values_token, values_head,
    HEADS: tl.constexpr, CONTENT: tl.constexpr, ROTARY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, at = token // tokens, token % tokens
    column, element, place = tl.arange(0, CONTENT), tl.arange(0, ROTARY), tl.arange(0, VALUE)
    total = tl.zeros((ROTARY,), tl.float32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        here = (head < heads)[:, None]
        of_keys = grad_keys + batch * keys_batch + at * keys_token + head.to(tl.int64)[:, None] * keys_head
        of_values = grad_values + batch * values_batch + at * values_token + head.to(tl.int64)[:, None] * values_head
        target = grad_kv + (token * heads + head)[:, None] * (content + value)
        inside = here & (column < content)[None, :]
        tl.store(target + column[None, :], tl.load(of_keys + column[None, :], inside), inside)
        inside = here & (place < value)[None, :]
        tl.store(target + content + place[None, :], tl.load(of_values + place[None, :], inside), inside)
        shared = tl.load(of_keys + content + element[None, :], here & (element < rotary)[None, :], other=0.0)
        total += tl.sum(shared.to(tl.float32), axis=0)
    tl.store(grad_key + token * rotary + element, total.to(grad_key.dtype.element_ty), element < rotary)


def with_adjacent(x: Tensor) -> Tensor:
    """It, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(x: Tensor, turn_BTF: Tensor, backwards: bool = False) -> Tensor:
    """[B, T, H, N + R] -> the same, contiguous; see `dsv3.ops.rotary`."""
    x, turn = with_adjacent(x), torch.view_as_real(turn_BTF.resolve_conj())
    (batch, tokens, heads, size), pairs, (block, warps) = x.shape, turn_BTF.shape[-1], HEADS
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        rotate_kernel[(batch * tokens * triton.cdiv(heads, block),)](
            x, turn, out, tokens, heads, size - 2 * pairs, pairs, *x.stride()[:3],
            turn.stride(0) if len(turn) > 1 else 0, turn.stride(1),
            BACKWARDS=backwards, HEADS=block, CONTENT=triton.next_power_of_2(max(1, size - 2 * pairs)),
            PAIRS=triton.next_power_of_2(pairs), num_warps=warps,
        )  # fmt: skip
    return out


def keys(kv: Tensor, key: Tensor, content: int) -> Tensor:
    """[B, T, H, N + R], contiguous; see `dsv3.ops.rotary`."""
    kv, key = with_adjacent(kv), with_adjacent(key)
    (batch, tokens, heads, _), rotary, (block, warps) = kv.shape, key.shape[-1], HEADS
    out = torch.empty(batch, tokens, heads, content + rotary, dtype=kv.dtype, device=kv.device)
    if out.numel():
        keys_kernel[(batch * tokens * triton.cdiv(heads, block),)](
            kv, key, out, tokens, heads, content, rotary, *kv.stride()[:3], *key.stride()[:2],
            HEADS=block, CONTENT=triton.next_power_of_2(content), ROTARY=triton.next_power_of_2(rotary), num_warps=warps,
        )  # fmt: skip
    return out


def keys_backward(grad_keys: Tensor, grad_values: Tensor, content: int) -> tuple[Tensor, Tensor]:
    """([B, T, H, N + V], [B, T, R]), contiguous, from the gradients of keys [B, T, H, N + R] and values [B, T, H, V]."""
    grad_keys, grad_values = with_adjacent(grad_keys), with_adjacent(grad_values)
    (batch, tokens, heads, size), value, (block, warps) = grad_keys.shape, grad_values.shape[-1], HEADS
    rotary = size - content
    grad_kv = torch.empty(batch, tokens, heads, content + value, dtype=grad_keys.dtype, device=grad_keys.device)
    grad_key = torch.empty(batch, tokens, rotary, dtype=grad_keys.dtype, device=grad_keys.device)
    if grad_kv.numel():
        keys_backward_kernel[(batch * tokens,)](
            grad_keys, grad_values, grad_kv, grad_key, tokens, heads, content, rotary, value,
            *grad_keys.stride()[:3], *grad_values.stride()[:3],
            HEADS=block, CONTENT=triton.next_power_of_2(content), ROTARY=triton.next_power_of_2(rotary),
            VALUE=triton.next_power_of_2(value), num_warps=warps,
        )  # fmt: skip
    return grad_kv, grad_key
