"""Weight gradients in FP8, one an expert: products over each group's tokens of two matrices that both lie along tokens.

Persistent: each program takes every so-many-th tile of the output, and walks the groups' counts on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.ops.kernels.product import Config, processors
from dsv3.ops.tiles import TILE, Tiles

LARGE = Config(128, 128, 8, 3, 8)


@triton.jit(do_not_specialize=["E", "N", "grad_scale_column", "x_scale_column"])
def wgrad_kernel(
    grad,
    x,
    grad_scale,
    x_scale,
    counts,
    out,
    E,
    N,
    K,
    grad_scale_column,
    x_scale_column,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    tile = tl.program_id(0)
    down = tl.cdiv(N, BLOCK_N)
    across = tl.cdiv(K, BLOCK_K)
    start = 0
    for expert in range(E):
        count = tl.load(counts + expert).to(tl.int32)
        while tile < (expert + 1) * down * across:
            inside = tile - expert * down * across
            i, j = tl.swizzle2d(inside // across, inside % across, down, across, GROUP)
            rows = i * BLOCK_N + tl.arange(0, BLOCK_N)
            columns = j * BLOCK_K + tl.arange(0, BLOCK_K)
            grad_scale_at = grad_scale + rows + (start // BLOCK_R).to(tl.int64) * grad_scale_column
            x_scale_at = x_scale + columns + (start // BLOCK_R).to(tl.int64) * x_scale_column
            sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
            for step in range(tl.cdiv(count, BLOCK_R)):
                # Read here, multiplied below: they arrive while the tensor cores work.
                left_factor = tl.load(grad_scale_at, mask=rows < N, other=0.0)
                right_factor = tl.load(x_scale_at, mask=columns < K, other=0.0)
                left = grad.load([i * BLOCK_N, start + step * BLOCK_R])
                right = x.load([j * BLOCK_K, start + step * BLOCK_R])
                part = tl.dot(left, right.T)
                sums += part * left_factor[:, None] * right_factor[None, :]
                grad_scale_at += grad_scale_column
                x_scale_at += x_scale_column
            at = out + (expert * N + rows).to(tl.int64)[:, None] * K + columns[None, :]
            own = (rows < N)[:, None] & (columns < K)[None, :]
            if ACCUMULATE:
                if count > 0:
                    tl.store(at, tl.load(at, mask=own, other=0.0) + sums, mask=own)
            else:
                tl.store(at, sums.to(out.dtype.element_ty), mask=own)
            tile += tl.num_programs(0)
        start += count


def wgrad(
    grad: Tiles,
    x: Tiles,
    counts_E: Tensor,
    out_ENK: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    num_sms: int | None = None,
    config: Config = LARGE,
) -> Tensor:
    """[E, N, K]: see `dsv3.ops.grouped_gemm_fp8`. Where `out_ENK` (FP32) is given, the product is added to it."""
    down, across, experts = len(grad.values), len(x.values), len(counts_E)
    accumulate = out_ENK is not None
    if out_ENK is None:
        out_ENK = torch.empty(experts, down, across, dtype=out_dtype, device=grad.values.device)
    if not out_ENK.numel() or not x.values.shape[1]:
        return out_ENK if accumulate else out_ENK.zero_()
    tiles = experts * -(-down // config.rows) * -(-across // config.columns)
    wgrad_kernel[(min(tiles, num_sms or processors(grad.values.device)),)](
        TensorDescriptor.from_tensor(grad.values, [config.rows, TILE]),
        TensorDescriptor.from_tensor(x.values, [config.columns, TILE]),
        grad.scale,
        x.scale,
        counts_E,
        out_ENK,
        experts,
        down,
        across,
        grad.scale.stride(1),
        x.scale.stride(1),
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        BLOCK_R=TILE,
        GROUP=config.group,
        ACCUMULATE=accumulate,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out_ENK
