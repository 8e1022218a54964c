"""Weight gradients of experts in BF16, added to FP32 sums: in Gluon, shared out among warps as in
`dsv3.ops.kernels.grouped_gemm_fp8_gluon`.

Two groups of four warps compute 64 x 256 elements each. Finished tiles leave as those of `dsv3.ops.kernels.grouped_wgrad_fp8_gluon`: the
L2 cache adds them to what is there. So a weight's gradient is neither written in BF16 nor read again.
"""

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

from dsv3.ops.kernels.grouped_gemm_fp8_gluon import REGISTERS, place
from dsv3.ops.kernels.grouped_wgrad_fp8_gluon import COLUMNS, FINISHED, GROUP, ROWS
from dsv3.ops.kernels.product import processors

TOKENS = 32
"""A step sums over."""
STAGES = 4
"""As many as a finished tile leaves room for."""
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
"""Who holds what of the sums of four warps."""
HALVES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Likewise of each half of their columns: nothing moves."""
READ = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Likewise of 16 tokens' elements, where some are cleared."""


@gluon.jit
def fetch(
    grad, x, out, left, right, totals, ready, free, old, drained, counts, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    down = gl.cdiv(N, BLOCK_N)
    across = gl.cdiv(K, BLOCK_K)
    tile = gl.program_id(0)
    step = 0
    start = 0
    done = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        steps = gl.cdiv(count, BLOCK_T)
        while tile < (expert + 1) * down * across:
            i, j = place(tile - expert * down * across, down, across, GROUP)
            for t in range(steps):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                arrived = ready.index(stage)
                mbarrier.expect(arrived, (BLOCK_N + BLOCK_K) * BLOCK_T * 2)
                token = start + t * BLOCK_T
                tma.async_copy_global_to_shared(grad, [token, i * BLOCK_N], arrived, left.index(stage * 2))
                tma.async_copy_global_to_shared(grad, [token, i * BLOCK_N + 64], arrived, left.index(stage * 2 + 1))
                tma.async_copy_global_to_shared(x, [token, j * BLOCK_K], arrived, right.index(stage))
                step += 1
                if t == gl.minimum(steps // 2 + STAGES - 1, steps - 1):
                    for half in gl.static_range(2):
                        mbarrier.wait(drained.index(half), done & 1)
                        mbarrier.expect(old.index(half), 64 * BLOCK_K * 4)
                        for part in gl.static_range(2):
                            corner = [expert, i * BLOCK_N + half * 64, j * BLOCK_K + part * 128]
                            tma.async_copy_global_to_shared(out, corner, old.index(half), totals.index(half * 2 + part))
                    done += 1
            tile += gl.num_programs(0)
        start += count


@gluon.jit
def clear(operand, first, BLOCK_T: gl.constexpr):
    # Tokens of the next expert, or nobody's: they may be anything. Both groups of warps write the same zeros.
    for part in gl.static_range(0, BLOCK_T, 16):
        if first < part + 16:
            tokens = operand.slice(part, 16)
            own = part + gl.arange(0, 16, layout=gl.SliceLayout(1, READ)) < first
            tokens.store(gl.where(own[:, None], tokens.load(READ), 0.0))


@gluon.jit
def compute(
    out, left, right, totals, ready, free, old, drained, counts, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    down = gl.cdiv(N, BLOCK_N)
    across = gl.cdiv(K, BLOCK_K)
    tile = gl.program_id(0)
    step = 0
    done = 0
    for expert in range(E):
        count = gl.load(counts + expert).to(gl.int32)
        steps = gl.cdiv(count, BLOCK_T)
        while tile < (expert + 1) * down * across:
            i, j = place(tile - expert * down * across, down, across, GROUP)
            sums = gl.full([64, BLOCK_K], 0, gl.float32, SUMS)
            for t in range(steps):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                own = left.index(stage * 2 + HALF)
                if count < (t + 1) * BLOCK_T:
                    clear(own, count - t * BLOCK_T, BLOCK_T)
                    clear(right.index(stage), count - t * BLOCK_T, BLOCK_T)
                    fence_async_shared()
                    gl.thread_barrier()
                sums = warpgroup_mma(own.permute((1, 0)), right.index(stage), sums, is_async=True)
                # The products of the step before are done: its operands may go.
                sums = warpgroup_mma_wait(1, deps=[sums])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=t > 0)
                if t == steps // 2:
                    # The tile before has left its place.
                    tma.store_wait(0)
                    mbarrier.arrive(drained.index(HALF))
                step += 1
            sums = warpgroup_mma_wait(0, deps=[sums])
            if steps > 0:
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
                first, second = gl.split(sums.reshape([64, 2, BLOCK_K // 2]).permute([0, 2, 1]))
                one = totals.index(HALF * 2).reshape([64, 128])
                two = totals.index(HALF * 2 + 1).reshape([64, 128])
                mbarrier.wait(old.index(HALF), done & 1)
                one.store(gl.convert_layout(first, HALVES, assert_trivial=True) + one.load(HALVES))
                two.store(gl.convert_layout(second, HALVES, assert_trivial=True) + two.load(HALVES))
                fence_async_shared()
                gl.thread_barrier()
                row = i * BLOCK_N + HALF * 64
                tma.async_copy_shared_to_global(out, [expert, row, j * BLOCK_K], totals.index(HALF * 2))
                tma.async_copy_shared_to_global(out, [expert, row, j * BLOCK_K + 128], totals.index(HALF * 2 + 1))
                done += 1
            tile += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E", "N", "K"])
def add_wgrad_kernel(
    grad, x, counts, out, E, N, K,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    left = gl.allocate_shared_memory(grad.dtype, [STAGES * 2, BLOCK_T, 64], grad.layout)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_T, BLOCK_K], x.layout)
    totals = gl.allocate_shared_memory(gl.float32, [4, 1, 64, 128], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    old = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(old.index(half), count=1)
        mbarrier.init(drained.index(half), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (compute, (out, left, right, totals, ready, free, old, drained, counts, E, N, K,
                       BLOCK_N, BLOCK_K, BLOCK_T, STAGES, GROUP, 0)),
            (compute, (out, left, right, totals, ready, free, old, drained, counts, E, N, K,
                       BLOCK_N, BLOCK_K, BLOCK_T, STAGES, GROUP, 1)),
            (fetch, (grad, x, out, left, right, totals, ready, free, old, drained, counts, E, N, K,
                     BLOCK_N, BLOCK_K, BLOCK_T, STAGES, GROUP)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


def add_wgrad(grad_RN: Tensor, x_RK: Tensor, counts_E: Tensor, out_ENK: Tensor) -> Tensor:
    """BF16, added to FP32 `out_ENK`: see `dsv3.ops.grouped_linear`. Bulk copies want rows at multiples of 16 bytes."""
    experts, down, across = out_ENK.shape
    if not out_ENK.numel() or not len(x_RK):
        return out_ENK
    tiles = experts * -(-down // ROWS) * -(-across // COLUMNS)
    add_wgrad_kernel[(min(tiles, processors(x_RK.device)),)](
        TensorDescriptor.from_tensor(grad_RN, [TOKENS, 64], OPERAND),
        TensorDescriptor.from_tensor(x_RK, [TOKENS, COLUMNS], OPERAND),
        counts_E,
        TensorDescriptor.from_tensor(out_ENK, [1, 64, 128], FINISHED),
        experts,
        down,
        across,
        BLOCK_N=ROWS,
        BLOCK_K=COLUMNS,
        BLOCK_T=TOKENS,
        STAGES=STAGES,
        GROUP=GROUP,
        num_warps=4,
    )
    return out_ENK
