"""Weight gradients in FP8 once more, in Gluon: shared out among warps as in `dsv3.ops.kernels.grouped_gemm_fp8_gluon`.

Both sides have a scale for each of their channels and every 128 tokens: they are fetched with the operands, and sums of 128 tokens
are multiplied by two of them. Finished tiles, in FP32, leave through shared memory: bulk copies write them, or have the L2 cache
add them to what is there, while the next tile is computed. What is added to is never read by a multiprocessor.

Gluon changes from one release of Triton to the next: `dsv3.ops.kernels.grouped_wgrad_fp8` is the same without it.
"""

from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsv3.ops.kernels.grouped_gemm_fp8_gluon import OPERAND, PRODUCT, REGISTERS, place
from dsv3.ops.kernels.product import processors
from dsv3.ops.tiles import TILE, Tiles

ROWS = 128
COLUMNS = 256
STAGES = 3
"""As many as the finished half tiles leave room for."""
GROUP = 8
"""Tiles of rows that are done for one tile of columns before the next: they share the input in the L2 cache."""
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
FINISHED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)


@builtin
def add_shared_to_global(descriptor: Any, place: Any, source: Any, _semantic: Any = None) -> None:
    """`tma.async_copy_shared_to_global` that adds; Gluon 3.6 has the instruction and no name for it."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, place, source.handle)


@gluon.jit
def fetch(
    grad, x, grad_scale, x_scale, left, right, left_scale, right_scale, ready, free, counts, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    down = gl.cdiv(N, BLOCK_N)
    across = gl.cdiv(K, BLOCK_K)
    tile = gl.program_id(0)
    step = 0
    start = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        while tile < (expert + 1) * down * across:
            i, j = place(tile - expert * down * across, down, across, GROUP)
            for r in range(start // 128, gl.cdiv(start + count, 128)):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                arrived = ready.index(stage)
                # 128 bytes of E4M3 and four of scales.
                mbarrier.expect(arrived, (BLOCK_N + BLOCK_K) * 132)
                tma.async_copy_global_to_shared(grad, [i * BLOCK_N, r * 128], arrived, left.index(stage))
                tma.async_copy_global_to_shared(x, [j * BLOCK_K, r * 128], arrived, right.index(stage))
                tma.async_copy_global_to_shared(grad_scale, [r, i * BLOCK_N], arrived, left_scale.index(stage))
                tma.async_copy_global_to_shared(x_scale, [r, j * BLOCK_K], arrived, right_scale.index(stage))
                step += 1
            tile += gl.num_programs(0)
        start += count


@gluon.jit
def add_product(sums, left, right, left_scale, right_scale):
    nothing = gl.full([64, 128], 0, gl.float32, PRODUCT)
    part = warpgroup_mma(left, right, nothing, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, deps=[part])
    # Read as late as this: there are no registers to keep them in.
    rows = left_scale.load(gl.SliceLayout(1, PRODUCT))
    columns = right_scale.load(gl.SliceLayout(0, PRODUCT))
    return sums + part * rows[:, None] * columns[None, :]


@gluon.jit
def write(out, sums, finished, expert, row, column, ACCUMULATE: gl.constexpr):
    # The half tile before has left its place.
    tma.store_wait(0)
    gl.thread_barrier()
    finished.reshape([64, 128]).store(sums)
    fence_async_shared()
    gl.thread_barrier()
    if ACCUMULATE:
        add_shared_to_global(out, [expert, row, column], finished)
    else:
        tma.async_copy_shared_to_global(out, [expert, row, column], finished)


@gluon.jit
def compute(
    left, right, left_scale, right_scale, ready, free, finished, counts, out, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, ACCUMULATE: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    down = gl.cdiv(N, BLOCK_N)
    across = gl.cdiv(K, BLOCK_K)
    tile = gl.program_id(0)
    step = 0
    start = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        while tile < (expert + 1) * down * across:
            i, j = place(tile - expert * down * across, down, across, GROUP)
            upper = gl.full([64, 128], 0, gl.float32, PRODUCT)
            lower = gl.full([64, 128], 0, gl.float32, PRODUCT)
            for _ in range(start // 128, gl.cdiv(start + count, 128)):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                own = right.index(stage).slice(HALF * 128, 128).permute((1, 0))
                scales = left_scale.index(stage).reshape([BLOCK_N])
                own_scales = right_scale.index(stage).reshape([BLOCK_K]).slice(HALF * 128, 128)
                upper = add_product(upper, left.index(stage).slice(0, 64), own, scales.slice(0, 64), own_scales)
                lower = add_product(lower, left.index(stage).slice(64, 64), own, scales.slice(64, 64), own_scales)
                mbarrier.arrive(free.index(stage))
                step += 1
            if (not ACCUMULATE) | (count > 0):
                row = i * BLOCK_N
                column = j * BLOCK_K + HALF * 128
                write(out, upper, finished.index(HALF), expert, row, column, ACCUMULATE)
                write(out, lower, finished.index(HALF), expert, row + 64, column, ACCUMULATE)
            tile += gl.num_programs(0)
        start += count
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E", "N", "K"])
def wgrad_kernel(
    grad, x, grad_scale, x_scale, counts, out, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    left = gl.allocate_shared_memory(grad.dtype, [STAGES, BLOCK_N, 128], grad.layout)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_K, 128], x.layout)
    left_scale = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], grad_scale.layout)
    right_scale = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_K], x_scale.layout)
    finished = gl.allocate_shared_memory(gl.float32, [2, 1, 64, 128], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (left, right, left_scale, right_scale, ready, free, finished, counts, out, E, N, K,
                       BLOCK_N, BLOCK_K, STAGES, GROUP, ACCUMULATE, 0)),
            (compute, (left, right, left_scale, right_scale, ready, free, finished, counts, out, E, N, K,
                       BLOCK_N, BLOCK_K, STAGES, GROUP, ACCUMULATE, 1)),
            (fetch, (grad, x, grad_scale, x_scale, left, right, left_scale, right_scale, ready, free, counts, E, N, K,
                     BLOCK_N, BLOCK_K, STAGES, GROUP)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def wgrad(
    grad: Tiles, x: Tiles, counts_E: Tensor, out_ENK: Tensor | None = None, num_sms: int | None = None
) -> Tensor:  # fmt: skip
    """FP32 [E, N, K]: see `dsv3.ops.grouped_gemm_fp8`. Where `out_ENK` is given, the product is added to it.

    Bulk copies want rows of tokens, columns of scales and rows of the result at multiples of 16 bytes.
    """
    down, across, experts = len(grad.values), len(x.values), len(counts_E)
    accumulate = out_ENK is not None
    if out_ENK is None:
        out_ENK = torch.empty(experts, down, across, device=grad.values.device)
    if not out_ENK.numel() or not x.values.shape[1]:
        return out_ENK if accumulate else out_ENK.zero_()
    tiles = experts * -(-down // ROWS) * -(-across // COLUMNS)
    wgrad_kernel[(min(tiles, num_sms or processors(grad.values.device)),)](
        TensorDescriptor.from_tensor(grad.values, [ROWS, TILE], OPERAND),
        TensorDescriptor.from_tensor(x.values, [COLUMNS, TILE], OPERAND),
        TensorDescriptor.from_tensor(grad.scale.t(), [1, ROWS], SCALES),
        TensorDescriptor.from_tensor(x.scale.t(), [1, COLUMNS], SCALES),
        counts_E,
        TensorDescriptor.from_tensor(out_ENK, [1, 64, 128], FINISHED),
        experts,
        down,
        across,
        BLOCK_N=ROWS,
        BLOCK_K=COLUMNS,
        STAGES=STAGES,
        GROUP=GROUP,
        ACCUMULATE=accumulate,
        num_warps=4,
    )
    return out_ENK
