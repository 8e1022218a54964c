"""The product of rows sorted by expert once more, in Gluon: who copies and who computes are different warps.

One warp fetches tiles of both operands, as far ahead as shared memory reaches, and across the borders of output tiles. Two
groups of four warps compute half of the columns each, on their own: while one multiplies its sums by scales and adds them, or
writes a finished tile, the tensor cores work for the other. A tile of 128 x 256 elements reads a quarter less than two of
128 x 128, which matters as the L2 cache is what limits the latter.

Gluon changes from one release of Triton to the next: `dsv3.ops.kernels.grouped_gemm_fp8` is the same product without it.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv3.ops.kernels.product import processors
from dsv3.ops.tiles import TILE, Tiles

ROWS = 128
COLUMNS = 256
STAGES = 4
GROUP = 8
"""Tiles of rows that are done for one tile of columns before the next: they share the weight in the L2 cache."""
REGISTERS = gl.constexpr([216, 72])
"""Of the second half and of the warp that copies, a thread: what is left is 216 for the first half. With more for one and less
for another, the compiler moves sums through memory (seen in its output: with 232 and 24, 18 of them in each step)."""
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
"""Who holds what of the sums of 64 x 128 elements of four warps."""
WRITTEN = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""Likewise when they are written: 16 bytes a thread, whole lines a warp."""


@gluon.jit
def place(tile, down, across, GROUP: gl.constexpr):
    group = tile // (GROUP * across)
    height = gl.minimum(down - group * GROUP, GROUP)
    inside = tile - group * GROUP * across
    return group * GROUP + inside % height, inside // height


@gluon.jit
def fetch(
    x,
    weight,
    left,
    right,
    ready,
    free,
    counts,
    E,
    N,
    K,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    across = gl.cdiv(N, BLOCK_N)
    tile = gl.program_id(0)
    step = 0
    first_tile = 0
    start = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        down = gl.cdiv(count, BLOCK_M)
        while tile < first_tile + down * across:
            m, n = place(tile - first_tile, down, across, GROUP)
            row = start + m * BLOCK_M
            column = expert * N + n * BLOCK_N
            for k in range(gl.cdiv(K, 128)):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(stage), (BLOCK_M + BLOCK_N) * 128)
                tma.async_copy_global_to_shared(x, [row, k * 128], ready.index(stage), left.index(stage))
                tma.async_copy_global_to_shared(weight, [column, k * 128], ready.index(stage), right.index(stage))
                step += 1
            tile += gl.num_programs(0)
        first_tile += down * across
        start += count


@gluon.jit
def write(out, sums, row, end, column, N):
    values = gl.convert_layout(sums.to(out.dtype.element_ty), WRITTEN)
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, WRITTEN))
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, WRITTEN))
    at = out + rows.to(gl.int64)[:, None] * N + columns[None, :]
    gl.store(at, values, mask=(rows < end)[:, None] & (columns < N)[None, :])


@gluon.jit
def compute(
    left,
    right,
    ready,
    free,
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
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    HALF: gl.constexpr,
):
    across = gl.cdiv(N, BLOCK_N)
    within = gl.arange(0, 64, layout=gl.SliceLayout(1, PRODUCT))
    nothing = gl.full([64, 128], 0, gl.float32, PRODUCT)
    tile = gl.program_id(0)
    step = 0
    first_tile = 0
    start = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        down = gl.cdiv(count, BLOCK_M)
        while tile < first_tile + down * across:
            m, n = place(tile - first_tile, down, across, GROUP)
            row = start + m * BLOCK_M
            column = n * BLOCK_N + HALF * 128
            upper_scale_at = x_scale + row + within
            lower_scale_at = upper_scale_at + 64
            # Half a tile may lie behind the last column: its results are not written, its scale is any.
            block = gl.minimum(column, N - 1) // 128
            weight_scale_at = weight_scale + expert * weight_scale_expert + block * weight_scale_row
            upper_own = row + within < R
            lower_own = row + 64 + within < R
            upper = nothing
            lower = nothing
            for k in range(gl.cdiv(K, 128)):
                # Read here, multiplied below: they arrive while the tensor cores work.
                factor = gl.load(weight_scale_at + k)
                upper_factor = gl.load(upper_scale_at, mask=upper_own, other=0.0)
                lower_factor = gl.load(lower_scale_at, mask=lower_own, other=0.0)
                upper_scale_at += x_scale_column
                lower_scale_at += x_scale_column
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                own = right.index(stage).slice(HALF * 128, 128).permute((1, 0))
                part = warpgroup_mma(left.index(stage).slice(0, 64), own, nothing, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                upper += part * (upper_factor * factor)[:, None]
                part = warpgroup_mma(left.index(stage).slice(64, 64), own, nothing, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                mbarrier.arrive(free.index(stage))
                lower += part * (lower_factor * factor)[:, None]
                step += 1
            end = gl.minimum(start + count, R)
            write(out, upper, row, end, column, N)
            write(out, lower, row + 64, end, column, N)
            tile += gl.num_programs(0)
        first_tile += down * across
        start += count
    while tile < first_tile + gl.cdiv(R - start, BLOCK_M) * across:
        row = start + (tile - first_tile) // across * BLOCK_M
        column = (tile - first_tile) % across * BLOCK_N + HALF * 128
        write(out, nothing, row, R, column, N)
        write(out, nothing, row + 64, R, column, N)
        tile += gl.num_programs(0)


@gluon.jit(do_not_specialize=["R", "E", "K", "x_scale_column", "weight_scale_expert", "weight_scale_row"])
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
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    left = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, 128], x.layout)
    right = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_N, 128], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (left, right, ready, free, x_scale, weight_scale, counts, out, R, E, N, K, x_scale_column,
                       weight_scale_expert, weight_scale_row, BLOCK_M, BLOCK_N, STAGES, GROUP, 0)),
            (compute, (left, right, ready, free, x_scale, weight_scale, counts, out, R, E, N, K, x_scale_column,
                       weight_scale_expert, weight_scale_row, BLOCK_M, BLOCK_N, STAGES, GROUP, 1)),
            (fetch, (x, weight, left, right, ready, free, counts, E, N, K, BLOCK_M, BLOCK_N, STAGES, GROUP)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def contiguous(
    x: Tiles,
    weight_ENK: Tensor,
    scale_EPQ: Tensor,
    counts_E: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    num_sms: int | None = None,
) -> Tensor:
    """[R, N]: see `dsv3.ops.grouped_gemm_fp8`. K is a multiple of 16 bytes, the scales' columns lie together."""
    rows, inner = x.values.shape
    experts, across, _ = weight_ENK.shape
    out = torch.empty(rows, across, dtype=out_dtype, device=x.values.device)
    if not out.numel():
        return out
    tiles = (-(-rows // ROWS) + experts) * -(-across // COLUMNS)
    contiguous_kernel[(min(tiles, num_sms or processors(x.values.device)),)](
        TensorDescriptor.from_tensor(x.values, [ROWS, TILE], OPERAND),
        TensorDescriptor.from_tensor(weight_ENK.view(-1, inner), [COLUMNS, TILE], OPERAND),
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
        BLOCK_M=ROWS,
        BLOCK_N=COLUMNS,
        STAGES=STAGES,
        GROUP=GROUP,
        num_warps=4,
    )
    return out
