"""Absorbed attention over pages in Gluon, for DeepSeek-V3's 512 + 64 elements: warps share the work of 64 rows out.

Four warps multiply queries and keys of a page, and leave weights in the place of the rotated keys, which are done with by then.
Eight warps hold the 64 x 512 sums, half of a multiprocessor's registers, multiply weights and latents, and fetch the next page
but one into the place that this empties. While scores become weights, or sums are scaled, the tensor cores work for the other
side. Of packed pages, the four warps read the next one ahead, and unpack it into its place.

Which pages a program reads, and how pieces are combined, is as in `dsv3.ops.kernels.paged_attention`: the same without Gluon,
whose interface changes from one release of Triton to the next.
"""

import torch
from torch import Tensor
from triton import cdiv
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

from dsv3.ops.kernels.paged_attention import LOG2_E, combine, room, sequences
from dsv3.ops.latent_pages import PAGE

ROWS = 64
STAGES = gl.constexpr(2)
REGISTERS = gl.constexpr([168])
"""A thread of those that make weights: as many as are left to the others."""
OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SEQUENCES = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
CLEARED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""Latents as pairs in 32 bits, tiles of 64 columns one below the other."""
PACKED_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
"""Who unpacks which four elements of 128 columns: so that what is written meets all banks."""
TO_BF16 = gl.constexpr("""
{
.reg .b32 low, high, x;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
shr.u32 x, low, 4;
and.b32 x, x, 0x07f007f0;
lop3.b32 x, low, 0x80008000, x, 0xea;
mul.rn.bf16x2 x, x, $4;
mul.rn.bf16x2 $0, x, $3;
shr.u32 x, high, 4;
and.b32 x, x, 0x07f007f0;
lop3.b32 x, high, 0x80008000, x, 0xea;
mul.rn.bf16x2 x, x, $4;
mul.rn.bf16x2 $1, x, $3;
}
""")
"""Four numbers in E4M3, by a factor that is a power of two, and by 2^120 for what E4M3's exponent is less than BF16's."""
INFINITY = gl.constexpr(float("inf"))
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def find(lengths, page, end, b, start, after, PAGE: gl.constexpr):
    """The sequence of a page: (its number, the pages of those before it, with its own)."""
    while (page >= after) & (page < end):
        b += 1
        start = after
        after += gl.cdiv(gl.load(lengths + b), PAGE)
    return b, start, after


@gluon.jit
def fetch(pages, pages_key, latents, keys, ready, row, stage, PAGE: gl.constexpr, PACKED: gl.constexpr):
    if PACKED:
        mbarrier.expect(ready.index(stage), PAGE * 64 * 2)
        tma.async_copy_global_to_shared(pages_key, [row, 264], ready.index(stage), keys.index(stage))
    else:
        mbarrier.expect(ready.index(stage), PAGE * 576 * 2)
        tma.async_copy_global_to_shared(pages, [row, 0], ready.index(stage), latents.index(stage))
        tma.async_copy_global_to_shared(pages_key, [row, 512], ready.index(stage), keys.index(stage))


@gluon.jit
def read_tile(words, token, own, TILE: gl.constexpr):
    """128 columns of a packed page: (E4M3, four in each word, and a scale in BF16 twice)."""
    column = TILE * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, PACKED_WORDS))
    coded = gl.load(words + token[:, None] * 164 + column[None, :], mask=own[:, None], other=0)
    scale = gl.load(words + token * 164 + 128 + TILE, mask=own, other=0)
    return coded, (scale & -0x10000) | ((scale >> 16) & 0xFFFF)


@gluon.jit
def read_packed(words, table, lengths, table_stride, page, b, start, end, PAGE: gl.constexpr):
    """All tiles of a page; zeros behind the sequence's length, and of a page that is not there."""
    slot = gl.arange(0, PAGE, layout=gl.SliceLayout(1, PACKED_WORDS))
    at = table + b.to(gl.int64) * table_stride + page - start
    token = gl.load(at, mask=page < end, other=0).to(gl.int64) * PAGE + slot
    length = gl.load(lengths + b, mask=page < end, other=0)
    own = (page - start) * PAGE + slot < length
    coded0, scale0 = read_tile(words, token, own, 0)
    coded1, scale1 = read_tile(words, token, own, 1)
    coded2, scale2 = read_tile(words, token, own, 2)
    coded3, scale3 = read_tile(words, token, own, 3)
    return coded0, coded1, coded2, coded3, scale0, scale1, scale2, scale3


@gluon.jit
def write_tile(latent, coded, scale, TILE: gl.constexpr, PAGE: gl.constexpr):
    low, high = gl.inline_asm_elementwise(
        TO_BF16, "=r,=r,r,r,r", [coded, scale[:, None], 0x7B807B80], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    pairs = gl.join(low, high).reshape([PAGE, 2, 32]).permute([1, 0, 2]).reshape([2 * PAGE, 32])
    latent._reinterpret(gl.int32, [8 * PAGE, 32], WORDS).slice(TILE * 2 * PAGE, 2 * PAGE).store(pairs)


@gluon.jit
def weigh(
    q, q_rotated, words, q_latent, q_key, q_ready, latents, keys, ready, weighed, shrink, factor, factor_ready, factor_free,
    table, lengths, lse, piece_lse, table_stride, begin, end, b, start, part, first_row, rows, tokens, heads, scale,
    PAGE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    column = gl.arange(0, PAGE, layout=gl.SliceLayout(0, SCORES))
    nothing = gl.full([64, PAGE], 0, gl.float32, SCORES)
    if PACKED:
        next_b = b
        next_start = start
        next_after = start + gl.cdiv(gl.load(lengths + b, mask=begin < end, other=0), PAGE)
        c0, c1, c2, c3, s0, s1, s2, s3 = read_packed(
            words, table, lengths, table_stride, begin, next_b, next_start, end, PAGE
        )
    range_begin = begin
    step = 0
    pieces = 0
    page = begin
    while page < end:
        length = gl.load(lengths + b)
        after = start + gl.cdiv(length, PAGE)
        stop = gl.minimum(end, after)
        if stop > page:
            # All four warps are done with the queries before.
            gl.thread_barrier()
            mbarrier.expect(q_ready, 64 * 576 * 2)
            tma.async_copy_global_to_shared(q, [b * rows + first_row, 0], q_ready, q_latent)
            tma.async_copy_global_to_shared(q_rotated, [b * rows + first_row, 512], q_ready, q_key)
            mbarrier.wait(q_ready, pieces & 1)
            limit = length - tokens + row // heads + 1
            largest = gl.full([64], -INFINITY, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.full([64], 0, gl.float32, gl.SliceLayout(1, SCORES))
            for i in range(page - start, stop - start):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if PACKED:
                    write_tile(latents.index(stage), c0, s0, 0, PAGE)
                    write_tile(latents.index(stage), c1, s1, 1, PAGE)
                    write_tile(latents.index(stage), c2, s2, 2, PAGE)
                    write_tile(latents.index(stage), c3, s3, 3, PAGE)
                    fence_async_shared()
                    gl.thread_barrier()
                    ahead = begin + step + 1
                    next_b, next_start, next_after = find(lengths, ahead, end, next_b, next_start, next_after, PAGE)
                    c0, c1, c2, c3, s0, s1, s2, s3 = read_packed(
                        words, table, lengths, table_stride, ahead, next_b, next_start, end, PAGE
                    )
                scores = warpgroup_mma(
                    q_latent, latents.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                scores = warpgroup_mma(q_key, keys.index(stage).permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                scores = gl.where((i * PAGE + column)[None, :] < limit[:, None], scores * scale, -INFINITY)
                new = gl.maximum(largest, gl.max(scores, axis=1))
                seen = gl.where(new == -INFINITY, 0.0, new)
                weights = gl.exp2(scores - seen[:, None])
                shrunk = gl.exp2(largest - seen)
                total = total * shrunk + gl.sum(weights, axis=1)
                largest = new
                shrink.index(stage).store(shrunk)
                # All four warps have multiplied by the rotated keys.
                gl.thread_barrier()
                keys.index(stage).store(weights.to(keys.dtype))
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(weighed.index(stage))
                step += 1
            mbarrier.wait(factor_free, (pieces & 1) ^ 1)
            factor.store(gl.where(total > 0, 1 / total, 0.0))
            gl.thread_barrier()
            mbarrier.arrive(factor_ready)
            logarithm = gl.where(total > 0, largest + gl.log2(total), -INFINITY)
            if (page == start) & (stop == after):
                gl.store(lse + b.to(gl.int64) * rows + row, logarithm * LN_2, mask=row < rows)
            else:
                place = (part * 2 + (range_begin < start).to(gl.int32)).to(gl.int64) * rows
                gl.store(piece_lse + place + row, logarithm, mask=row < rows)
            pieces += 1
        page = stop
        start = after
        b += 1


@gluon.jit
def attend(
    pages, pages_key, latents, keys, ready, weighed, shrink, factor, factor_ready, factor_free, table, lengths, out, piece,
    table_stride, begin, end, b, start, part, first_row, rows, PAGE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    at = row[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, SUMS))[None, :]
    own = (row < rows)[:, None]
    slot = gl.arange(0, PAGE, layout=gl.SliceLayout(1, CLEARED))
    next_b = b
    next_start = start
    next_after = start + gl.cdiv(gl.load(lengths + b, mask=begin < end, other=0), PAGE)
    for ahead in range(begin, gl.minimum(begin + STAGES, end)):
        next_b, next_start, next_after = find(lengths, ahead, end, next_b, next_start, next_after, PAGE)
        entry = gl.load(table + next_b.to(gl.int64) * table_stride + ahead - next_start)
        fetch(pages, pages_key, latents, keys, ready, entry * PAGE, ahead - begin, PAGE, PACKED)
    range_begin = begin
    step = 0
    pieces = 0
    page = begin
    while page < end:
        length = gl.load(lengths + b)
        after = start + gl.cdiv(length, PAGE)
        stop = gl.minimum(end, after)
        if stop > page:
            sums = gl.full([64, 512], 0, gl.float32, SUMS)
            for i in range(page - start, stop - start):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                ahead = begin + step + STAGES
                next_b, next_start, next_after = find(lengths, ahead, end, next_b, next_start, next_after, PAGE)
                # Read here, used when the place is free.
                next_at = table + next_b.to(gl.int64) * table_stride + ahead - next_start
                entry = gl.load(next_at, mask=ahead < end, other=0)
                mbarrier.wait(weighed.index(stage), phase)
                sums = sums * shrink.index(stage).load(gl.SliceLayout(1, SUMS))[:, None]
                mbarrier.wait(ready.index(stage), phase)
                if (i + 1) * PAGE > length:
                    # Weights of unused slots are zeros, which do not undo what may be NaN.
                    tiles = latents.index(stage)._reinterpret(latents.dtype, [8 * PAGE, 64], OPERAND)
                    for c in gl.static_range(8):
                        tile = tiles.slice(c * PAGE, PAGE)
                        held = tile.load(CLEARED)
                        tile.store(gl.where((i * PAGE + slot < length)[:, None], held, 0.0))
                    fence_async_shared()
                    gl.thread_barrier()
                sums = warpgroup_mma(keys.index(stage), latents.index(stage), sums, is_async=True)
                sums = warpgroup_mma_wait(0, deps=[sums])
                gl.thread_barrier()
                if ahead < end:
                    fetch(pages, pages_key, latents, keys, ready, entry * PAGE, stage, PAGE, PACKED)
                step += 1
            mbarrier.wait(factor_ready, pieces & 1)
            sums = sums * factor.load(gl.SliceLayout(1, SUMS))[:, None]
            gl.thread_barrier()
            mbarrier.arrive(factor_free)
            if (page == start) & (stop == after):
                gl.store(out + b.to(gl.int64) * rows * 512 + at, sums.to(out.dtype.element_ty), mask=own)
            else:
                place = (part * 2 + (range_begin < start).to(gl.int32)).to(gl.int64) * rows * 512
                gl.store(piece + place + at, sums, mask=own)
            pieces += 1
        page = stop
        start = after
        b += 1


@gluon.jit(do_not_specialize=["batch", "tokens", "heads", "table_stride", "parts"])
def decode_kernel(
    q, q_rotated, pages, pages_key, words, table, lengths, out, lse, piece, piece_lse,
    batch, tokens, heads, table_stride, scale, parts, PAGE: gl.constexpr, BATCH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    rows = tokens * heads
    blocks = gl.cdiv(rows, 64)
    part = gl.program_id(0) // blocks
    first_row = gl.program_id(0) % blocks * 64

    sequence = gl.arange(0, BATCH, layout=SEQUENCES)
    held = gl.cdiv(gl.load(lengths + sequence, mask=sequence < batch, other=0), PAGE)
    up_to = gl.associative_scan(held, 0, add)
    total = gl.sum(held, 0)
    parts = gl.maximum(gl.minimum(total, parts), 1)
    begin = part * total // parts
    end = gl.minimum((part + 1) * total // parts, total)
    b = gl.sum((up_to <= begin).to(gl.int32), 0)
    start = gl.max(gl.where(up_to <= begin, up_to, 0), 0)

    q_latent = gl.allocate_shared_memory(q.dtype, [64, 512], q.layout)
    q_key = gl.allocate_shared_memory(q.dtype, [64, 64], q.layout)
    latents = gl.allocate_shared_memory(q.dtype, [STAGES, PAGE, 512], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, PAGE, 64], q.layout)
    shrink = gl.allocate_shared_memory(gl.float32, [STAGES, 64], VECTOR)
    factor = gl.allocate_shared_memory(gl.float32, [64], VECTOR)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    factor_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    factor_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(weighed.index(stage), count=1)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(factor_ready, count=1)
    mbarrier.init(factor_free, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (attend, (pages, pages_key, latents, keys, ready, weighed, shrink, factor, factor_ready, factor_free, table,
                      lengths, out, piece, table_stride, begin, end, b, start, part, first_row, rows, PAGE, PACKED)),
            (weigh, (q, q_rotated, words, q_latent, q_key, q_ready, latents, keys, ready, weighed, shrink, factor,
                     factor_ready, factor_free, table, lengths, lse, piece_lse, table_stride, begin, end, b, start, part,
                     first_row, rows, tokens, heads, scale, PAGE, PACKED)),
        ],
        [4],
        REGISTERS,
    )  # fmt: skip


def decode(
    q_BTHL: Tensor,
    pages: Tensor,
    table_BM: Tensor,
    lengths_B: Tensor,
    latent: int,
    scale: float,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `dsv3.ops.paged_attention.paged_latent_attention`; `parts` is how many programs share the pages."""
    batch, tokens, heads, size = q_BTHL.shape
    made = room(q_BTHL, table_BM, latent, ROWS, parts)
    if not q_BTHL.numel():
        return made.out, made.lse
    packed = pages.dtype == torch.uint8
    queries, entries = q_BTHL.view(-1, size), pages.view(torch.bfloat16).flatten(0, 1)
    decode_kernel[(made.parts * cdiv(tokens * heads, ROWS),)](
        TensorDescriptor.from_tensor(queries, [ROWS, 512], OPERAND),
        TensorDescriptor.from_tensor(queries, [ROWS, 64], OPERAND),
        None if packed else TensorDescriptor.from_tensor(entries, [PAGE, 512], OPERAND),
        TensorDescriptor.from_tensor(entries, [PAGE, 64], OPERAND),
        pages.view(torch.int32) if packed else None,
        table_BM, lengths_B, made.out, made.lse, made.piece, made.piece_lse,
        batch, tokens, heads, table_BM.stride(0), scale * LOG2_E, made.parts,
        PAGE=PAGE, BATCH=sequences(batch), PACKED=packed,
        num_warps=8,
    )  # fmt: skip
    combine(made, lengths_B)
    return made.out, made.lse
