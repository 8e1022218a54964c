"""Products in FP8 at DeepSeek-V3's shapes: dense beside the bare call of torch, grouped beside DeepGEMM where it is installed."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.bench.kernels.case import Case, Work
from dsv3.ops.gemm_fp8 import gemm_fp8, gemm_fp8_columns, prepared_scale
from dsv3.ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_masked, grouped_wgrad_fp8
from dsv3.ops.grouped_linear import grouped_weight_gradient, weight_gradient_grouped_mm
from dsv3.ops.kernels.deep_gemm import expert_of_rows, no_deep_gemm
from dsv3.ops.tiles import TILE, Tiles, empty_scale

DENSE_ROWS = 4096
DENSE = (
    ("q_a + kv_a", 2112, 7168),
    ("q_b", 24576, 1536),
    ("kv_b", 32768, 512),
    ("o", 7168, 16384),
    ("gate + up", 36864, 7168),
    ("down", 7168, 18432),
    ("shared gate + up", 4096, 7168),
    ("shared down", 7168, 2048),
)
"""N and K of the linear layers in FP8."""
EXPERT = ((4096, 7168), (7168, 2048))
"""N and K of an expert's."""
MANY, MANY_EXPERTS = (64, 768), ((2816, 2048), (2048, 1408))
"""Experts and rows of each in `dsv3 bench train --lite`, and their N and K."""


def cases(device: torch.device) -> Iterator[Case]:
    """All of them. Needs a GPU of sm_90."""
    for name, across, inner in DENSE:
        yield dense(device, name, across, inner)
    for across, inner in EXPERT:
        yield dense_wgrad(device, across, inner)
    for name in ("triton", "gluon"):
        for across, inner in EXPERT:
            yield grouped(device, name, 32, 1024, across, inner)
            yield grouped(device, name, 8, 4096, across, inner)
    for across, inner in EXPERT:
        yield masked(device, 32, 20, 128, across, inner)
        yield masked(device, 32, 192, 192, across, inner)
    for name in ("triton", "gluon"):
        for across, inner in EXPERT:
            yield grouped_wgrad(device, name, 8, 4096, across, inner)
    for (experts, rows), sizes in ((MANY, MANY_EXPERTS), ((8, 4096), EXPERT)):
        for across, inner in sizes:
            yield added_wgrad(device, experts, rows, across, inner)


def values(device: torch.device, *shape: int) -> Tensor:
    """E4M3 as quantised normal numbers fill it."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(120).clamp_(-448, 448).to(torch.float8_e4m3fn)


def tiles(device: torch.device, rows: int, columns: int) -> Tiles:
    """Random ones."""
    scale = empty_scale(rows, columns, device)
    return Tiles(values(device, rows, columns), scale.copy_(torch.rand(scale.shape, device=device) + 0.5))


def blocks(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """Random values and scales of a weight."""
    *stack, rows, columns = shape
    scale = torch.rand(*stack, -(-rows // TILE), -(-columns // TILE), device=device) + 0.5
    return values(device, *shape), scale


def dense(device: torch.device, name: str, across: int, inner: int) -> Case:
    """Inputs are quantised and scales are laid out beforehand, on both sides."""
    x, (weight, scale) = tiles(device, DENSE_ROWS, inner), blocks(device, across, inner)
    prepared = prepared_scale(scale)
    long = prepared.stride(0)
    theirs = prepared.as_strided((long, len(prepared)), (1, long))
    scaling = F.ScalingType

    def bare() -> Tensor:
        return F.scaled_mm(
            x.values, weight.t(), x.scale, scaling.BlockWise1x128, theirs, scaling.BlockWise128x128, output_dtype=torch.bfloat16
        )  # fmt: skip

    return Case(
        op="gemm_fp8",
        shape=f"{name} {DENSE_ROWS} {across}x{inner}",
        ours=lambda: gemm_fp8(x, weight, prepared),
        peer_name="torch scaled_mm",
        peer=bare,
        flops=2 * DENSE_ROWS * across * inner,
        target=0.97,
    )


def dense_wgrad(device: torch.device, across: int, inner: int) -> Case:
    """A weight gradient in FP32 of a linear layer."""
    grad, x = tiles(device, across, DENSE_ROWS), tiles(device, inner, DENSE_ROWS)
    scaling = F.ScalingType.BlockWise1x128

    def bare() -> Tensor:
        return F.scaled_mm(grad.values, x.values.t(), grad.scale, scaling, x.scale, scaling, output_dtype=torch.float32)

    return Case(
        op="gemm_fp8_columns",
        shape=f"{DENSE_ROWS} {across}x{inner}",
        ours=lambda: gemm_fp8_columns(grad, x),
        peer_name="torch scaled_mm",
        peer=bare,
        flops=2 * DENSE_ROWS * across * inner,
        target=0.97,
    )


def grouped(device: torch.device, name: str, experts: int, rows: int, across: int, inner: int) -> Case:
    """Equal groups; our own kernels, which are not told so."""
    (run,) = (each.run for each in grouped_gemm_fp8.implementations if each.name == name)
    x, (weight, scale) = tiles(device, experts * rows, inner), blocks(device, experts, across, inner)
    counts = torch.full((experts,), rows, device=device)
    peer: Work | None = None
    if no_deep_gemm() is None:
        library: Any = import_module("deep_gemm")
        out = torch.empty(experts * rows, across, dtype=torch.bfloat16, device=device)
        operands = (x.values, x.scale), (weight, scale), out, expert_of_rows(counts, experts * rows)
        peer = partial(library.m_grouped_fp8_gemm_nt_contiguous, *operands)
    return Case(
        op=f"grouped_gemm_fp8, {name}",
        shape=f"{experts}x{rows} {across}x{inner}",
        ours=lambda: run(x, weight, scale, counts),
        peer_name="DeepGEMM",
        peer=peer,
        flops=2 * experts * rows * across * inner,
        target=1000,
        unit="TFLOP/s",
        or_of_the_peer=0.87,
    )


def masked(device: torch.device, experts: int, rows: int, room: int, across: int, inner: int) -> Case:
    """Decoding: below some 100 rows an expert, reading the weights takes the time."""
    x, (weight, scale) = tiles(device, experts * room, inner), blocks(device, experts, across, inner)
    counts = torch.full((experts,), rows, device=device)
    few = rows < 100
    return Case(
        op="grouped_gemm_fp8_masked",
        shape=f"{experts}x{rows} of {room} {across}x{inner}",
        ours=lambda: grouped_gemm_fp8_masked(x, weight, scale, counts, room),
        peer_name="copy rate",
        bytes=weight.numel(),
        flops=2 * experts * rows * across * inner,
        target=3.3 if few else 650,
        unit="TB/s" if few else "TFLOP/s",
    )


def grouped_wgrad(device: torch.device, name: str, experts: int, rows: int, across: int, inner: int) -> Case:
    """FP8, added to FP32 in place, beside BF16 without the addition."""
    (run,) = (each.run for each in grouped_wgrad_fp8.implementations if each.name == name)
    grad, x = tiles(device, across, experts * rows), tiles(device, inner, experts * rows)
    counts = torch.full((experts,), rows, device=device)
    total = torch.zeros(experts, across, inner, device=device)
    wide = [torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16) for size in (across, inner)]
    offsets = counts.cumsum(0, dtype=torch.int32)
    return Case(
        op=f"grouped_wgrad_fp8, {name}",
        shape=f"{experts}x{rows} {across}x{inner}",
        ours=lambda: run(grad, x, counts, total),
        peer_name="torch grouped_mm in BF16",
        peer=lambda: F.grouped_mm(wide[0].t(), wide[1], offs=offsets),
        flops=2 * experts * rows * across * inner,
        target=600,
        unit="TFLOP/s",
    )


def added_wgrad(device: torch.device, experts: int, rows: int, across: int, inner: int) -> Case:
    """BF16, added to FP32, beside a product and an addition."""
    grad, x = (torch.randn(experts * rows, size, device=device, dtype=torch.bfloat16) for size in (across, inner))
    counts = torch.full((experts,), rows, device=device)
    total = torch.zeros(experts, across, inner, device=device)
    return Case(
        op="grouped_weight_gradient, added",
        shape=f"{experts}x{rows} {across}x{inner}",
        ours=lambda: grouped_weight_gradient(grad, x, counts, total),
        peer_name="torch grouped_mm, then added",
        peer=lambda: weight_gradient_grouped_mm(grad, x, counts, total),
        flops=2 * experts * rows * across * inner,
    )
