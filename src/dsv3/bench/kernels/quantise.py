"""Quantisation, alone and with what it is fused with, against the rate of a copy."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv3.bench.kernels.case import Case
from dsv3.ops.accumulate import accumulate
from dsv3.ops.adamw import adamw
from dsv3.ops.block_scaled import quantize_blocks, transpose_blocks
from dsv3.ops.e5m6 import pack_e5m6, unpack_e5m6
from dsv3.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_tiles
from dsv3.ops.swiglu import swiglu, swiglu_backward, swiglu_tiles
from dsv3.ops.tiles import dequantize_rows, quantize_both, quantize_columns, quantize_rows, transpose_tiles

TOKENS, HIDDEN = 16384, 7168
ROWS, EXPERT = 32768, 2048
"""Rows of experts, and an expert's width."""


def cases(device: torch.device) -> Iterator[Case]:
    """All of them; each makes its tensors when its turn comes."""
    yield from of_tiles(device)
    yield from of_weights(device)
    yield from of_rms_norm(device)
    yield from of_swiglu(device)
    yield of_adamw(device)
    yield of_accumulate(device)


def against_copy(op: str, shape: str, ours: Callable[[], object], moved: float, target: float | None = None) -> Case:
    """What memory limits: `moved` bytes at least."""
    return Case(op=op, shape=shape, ours=ours, peer_name="copy rate", bytes=moved, target=target)


def normal(device: torch.device, *shape: int) -> Tensor:
    """Activations in BF16."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def of_tiles(device: torch.device) -> Iterator[Case]:
    """Activations and gradients of the attention's width. Beside two or one bytes an element, a scale for 128 of them."""
    x, shape, size = normal(device, TOKENS, HIDDEN), f"{TOKENS}x{HIDDEN}", TOKENS * HIDDEN
    scales = size / 32
    yield against_copy("quantize_rows", shape, lambda: quantize_rows(x), 3 * size + scales, 0.90)
    yield against_copy("quantize_rows, powers of two", shape, lambda: quantize_rows(x, True), 3 * size + scales, 0.90)
    yield against_copy("quantize_columns", shape, lambda: quantize_columns(x), 3 * size + scales, 0.78)
    yield against_copy("quantize_both", shape, lambda: quantize_both(x), 4 * size + 2 * scales, 0.78)
    tiles = quantize_rows(x)
    yield against_copy("dequantize_rows", shape, lambda: dequantize_rows(tiles), 3 * size + scales)
    yield against_copy("transpose_tiles", shape, lambda: transpose_tiles(tiles), 2 * size + 2 * scales)
    yield against_copy("pack_e5m6", shape, lambda: pack_e5m6(x), 3.5 * size + scales)
    packed = pack_e5m6(x)
    yield against_copy("unpack_e5m6", shape, lambda: unpack_e5m6(packed), 3.5 * size + scales)


def of_weights(device: torch.device) -> Iterator[Case]:
    """The experts of one layer on one of 64 devices: gate and up, from FP32 and from BF16."""
    experts, rows, columns = 4, 2 * EXPERT, HIDDEN
    shape, size = f"{experts}x{rows}x{columns}", experts * rows * columns
    weight = torch.randn(experts, rows, columns, device=device)
    yield against_copy("quantize_blocks, FP32", shape, lambda: quantize_blocks(weight), 5 * size)
    rounded = weight.bfloat16()
    yield against_copy("quantize_blocks, BF16", shape, lambda: quantize_blocks(rounded), 3 * size)
    values, scale = quantize_blocks(weight)
    yield against_copy("transpose_blocks", shape, lambda: transpose_blocks(values, scale), 2 * size)


def of_rms_norm(device: torch.device) -> Iterator[Case]:
    """With the tiles of the norm, and both passes of training."""
    x, shape, size = normal(device, TOKENS, HIDDEN), f"{TOKENS}x{HIDDEN}", TOKENS * HIDDEN
    weight, grad = torch.ones(HIDDEN, device=device, requires_grad=True), normal(device, TOKENS, HIDDEN)
    fixed = weight.detach()
    yield against_copy("rms_norm_tiles", shape, lambda: rms_norm_tiles(x, fixed, 1e-6), 5 * size + size / 32, 0.83)
    yield against_copy("rms_norm, training", shape, lambda: rms_norm(x, weight, 1e-6), 4 * size)
    yield against_copy("rms_norm_backward", shape, lambda: rms_norm_backward(grad, x, fixed, 1e-6), 6 * size)


def of_swiglu(device: torch.device) -> Iterator[Case]:
    """The experts' rows, with their routing weights."""
    gate_up, shape, size = normal(device, ROWS, 2 * EXPERT), f"{ROWS}x(2x{EXPERT})", ROWS * EXPERT
    weight, grad = torch.rand(ROWS, device=device), normal(device, ROWS, EXPERT)
    yield against_copy("swiglu_tiles", shape, lambda: swiglu_tiles(gate_up, weight), 5 * size + size / 32, 0.87)
    yield against_copy("swiglu_backward", shape, lambda: swiglu_backward(grad, gate_up, weight), 12 * size)
    leaf = gate_up.detach().requires_grad_()
    yield against_copy("swiglu, training", shape, lambda: swiglu(leaf), 6 * size)


def of_adamw(device: torch.device) -> Case:
    """Four experts' gate and up: 12 bytes an element read, 8 written."""
    weight, grad = torch.randn(2, 4 * 4096, HIDDEN, device=device)
    moments = [torch.zeros_like(weight, dtype=torch.bfloat16) for _ in range(2)]
    one = torch.ones((), device=device)

    def ours() -> Tensor:
        adamw(weight, grad, *moments, one, one, one, 1e-6, (0.9, 0.95), 1e-8, 0.1)
        return weight

    return against_copy("adamw", f"4x4096x{HIDDEN}, moments in BF16", ours, 20 * weight.numel())


def of_accumulate(device: torch.device) -> Case:
    """Of the same: 6 bytes an element read, 4 written."""
    total = torch.zeros(4 * 4096, HIDDEN, device=device)
    gradient = torch.randn_like(total, dtype=torch.bfloat16)

    def ours() -> Tensor:
        accumulate(total, gradient)
        return total

    return against_copy("accumulate", f"BF16 to FP32, 4x4096x{HIDDEN}", ours, 10 * total.numel())
