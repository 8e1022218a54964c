"""Products in FP8 of rows sorted by expert: each group of rows times its own weight, scales multiplied in every 128 of K.

Persistent: each program takes every so-many-th tile of the output, and walks the groups' counts on the device to find it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.ops.kernels.product import Config, processors
from dsv3.ops.tiles import TILE, Tiles

LARGE = Config(128, 128, 8, 4, 8)
SMALL = Config(64, 128, 4, 4, 8)
"""For groups of few rows, which larger tiles would mostly pad."""


@triton.jit(do_not_specialize=["R", "E", "K", "x_scale_column", "weight_scale_expert", "weight_scale_row"])
def contiguous_kernel(
    x,
    weight,
    x_scale,
    weight_scale,
    counts,
    out,
    R,
    E,
    N,
    K,
    x_scale_column,
    weight_scale_expert,
    weight_scale_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    first_tile = 0
    start = 0
    for expert in range(E):
        count = tl.load(counts + expert).to(tl.int32)
        down = tl.cdiv(count, BLOCK_M)
        while tile < first_tile + down * across:
            inside = tile - first_tile
            m, n = tl.swizzle2d(inside // across, inside % across, down, across, GROUP)
            row = start + m * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            x_scale_at = x_scale + rows
            weight_scale_at = weight_scale + expert * weight_scale_expert + (n * BLOCK_N // BLOCK_K) * weight_scale_row
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(tl.cdiv(K, BLOCK_K)):
                # Read here, multiplied below: they arrive while the tensor cores work.
                left_factor = tl.load(x_scale_at, mask=rows < R, other=0.0)
                right_factor = tl.load(weight_scale_at + k)
                left = x.load([row, k * BLOCK_K])
                right = weight.load([expert * N + n * BLOCK_N, k * BLOCK_K])
                part = tl.dot(left, right.T)
                sums += part * (left_factor * right_factor)[:, None]
                x_scale_at += x_scale_column
            columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
            at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
            own = (rows < tl.minimum(start + count, R))[:, None] & (columns < N)[None, :]
            tl.store(at, sums.to(out.dtype.element_ty), mask=own)
            tile += tl.num_programs(0)
        first_tile += down * across
        start += count
    nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype.element_ty)
    while tile < first_tile + tl.cdiv(R - start, BLOCK_M) * across:
        rows = start + (tile - first_tile) // across * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile - first_tile) % across * BLOCK_N + tl.arange(0, BLOCK_N)
        at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, nothing, mask=(rows < R)[:, None] & (columns < N)[None, :])
        tile += tl.num_programs(0)


def contiguous(
    x: Tiles,
    weight_ENK: Tensor,
    scale_EPQ: Tensor,
    counts_E: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    num_sms: int | None = None,
    config: Config | None = None,
) -> Tensor:
    """[R, N]: see `dsv3.ops.grouped_gemm_fp8`. K is a multiple of 16 bytes, the scales' columns lie together."""
    rows, inner = x.values.shape
    experts, across, _ = weight_ENK.shape
    out = torch.empty(rows, across, dtype=out_dtype, device=x.values.device)
    if not out.numel():
        return out
    config = config or (LARGE if rows > SMALL.rows * experts else SMALL)
    tiles = (-(-rows // config.rows) + experts) * -(-across // config.columns)
    contiguous_kernel[(min(tiles, num_sms or processors(x.values.device)),)](
        TensorDescriptor.from_tensor(x.values, [config.rows, TILE]),
        TensorDescriptor.from_tensor(weight_ENK.view(-1, inner), [config.columns, TILE]),
        x.scale,
        scale_EPQ,
        counts_E,
        out,
        rows,
        experts,
        across,
        inner,
        x.scale.stride(1),
        scale_EPQ.stride(0),
        scale_EPQ.stride(1),
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=TILE,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
