"""A call of every operation as training or serving DeepSeek-V3 makes it, small: what `dsv3 info ops` explains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3.ops import (
    accumulate,
    adamw,
    attention,
    block_scaled,
    cross_entropy,
    e5m6,
    gemm_fp8,
    grouped_gemm_fp8,
    grouped_linear,
    latent_pages,
    linear_fp32,
    paged_attention,
    permute,
    rms_norm,
    rooms,
    rotary,
    router,
    swiglu,
    tiles,
)
from dsv3.ops.operation import Operation

Call = tuple[Operation, tuple[Any, ...]]
ROWS, SIZE, EXPERTS, CHOSEN = 256, 256, 4, 2


def calls(device: torch.device) -> Iterator[Call]:
    """(operation, arguments) in BF16 or FP8 on a device."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def heads(size: int) -> Tensor:
        return random(1, 128, 4, size).requires_grad_()

    x = random(ROWS, SIZE).requires_grad_()
    rows, weight = x.detach(), random(SIZE, SIZE, dtype=torch.float32)
    yield attention.attention, (heads(192), heads(192), heads(128), 0.1, None)
    yield attention.attention_behind_context, (heads(192)[:, 64:], heads(192), heads(128), 0.1)
    turn = torch.ones(1, 128, 32, dtype=torch.complex64, device=device)
    yield rotary.rotate_heads, (heads(192), turn)
    yield rotary.keys_and_values, (heads(256), random(1, 128, 64), 128)
    pages, slots = random(4, 64, 576), torch.arange(2, device=device)
    yield latent_pages.store_latents, (pages, slots, random(2, 512), random(2, 64))
    table = torch.zeros(2, 1, dtype=torch.int32, device=device)
    yield paged_attention.paged_latent_attention, (random(2, 1, 16, 576), pages, table, table[:, 0] + 64, 512, 0.1)
    yield rms_norm.rms_norm, (x, weight[0], 1e-6)
    yield rms_norm.rms_norm_tiles, (rows, weight[0], 1e-6)
    yield rms_norm.rms_norm_backward, (rows, rows, weight[0], 1e-6)
    yield swiglu.swiglu, (x,)
    yield swiglu.swiglu_tiles, (rows,)
    yield swiglu.swiglu_backward, (random(ROWS, SIZE // 2), rows)
    target = torch.zeros(ROWS, dtype=torch.int64, device=device)
    yield cross_entropy.linear_cross_entropy, (x, weight, target, 1.0)
    yield cross_entropy.token_losses, (rows, weight, target)

    yield linear_fp32.linear_fp32, (x, weight)
    affinity = random(ROWS, EXPERTS, dtype=torch.float32).sigmoid()
    expert = affinity.topk(CHOSEN).indices
    yield router.select_experts, (affinity, affinity[0], CHOSEN, 1, 1, True, 1.0)
    yield permute.sort_by_expert, (expert, EXPERTS)
    order = permute.sort_by_expert(expert, EXPERTS)
    yield permute.permute, (x, order)
    yield permute.unpermute, (random(ROWS * CHOSEN, SIZE).requires_grad_(), order)
    size = rooms.room_for(ROWS)
    yield rooms.assign_rooms, (expert, affinity[:, :CHOSEN].contiguous(), EXPERTS, size)
    row = rooms.assign_rooms(expert, affinity[:, :CHOSEN].contiguous(), EXPERTS, size)[0]
    yield rooms.quantize_to_rooms, (rows, row, EXPERTS * size)
    counts = torch.full((EXPERTS,), ROWS // EXPERTS, device=device)
    yield grouped_linear.grouped_linear, (x, random(EXPERTS, SIZE, SIZE, dtype=torch.float32), counts)
    total = random(EXPERTS, SIZE, SIZE, dtype=torch.float32)
    yield grouped_linear.grouped_weight_gradient, (rows, rows, counts, total)

    moment = torch.zeros_like(weight, dtype=torch.bfloat16)
    one, setting = torch.ones((), device=device), (1e-6, (0.9, 0.95), 1e-8, 0.1)
    yield accumulate.accumulate, (torch.zeros_like(rows, dtype=torch.float32), rows)
    yield adamw.adamw, (weight, weight.clone(), moment, moment.clone(), one, one, one, *setting)
    for operation in (tiles.quantize_rows, tiles.quantize_columns, tiles.quantize_both, e5m6.pack_e5m6):
        yield operation, (rows,)
    across, down = tiles.quantize_both(rows)
    yield tiles.dequantize_rows, (across,)
    yield tiles.transpose_tiles, (across,)
    yield e5m6.unpack_e5m6, (e5m6.pack_e5m6(rows),)
    yield block_scaled.quantize_blocks, (weight,)
    blocks, scale = block_scaled.quantize_blocks(weight)
    yield block_scaled.transpose_blocks, (blocks, scale)
    yield gemm_fp8.gemm_fp8, (across, blocks, scale)
    yield gemm_fp8.gemm_fp8_columns, (down, down)
    experts = blocks.expand(EXPERTS, -1, -1).contiguous(), scale.expand(EXPERTS, -1, -1).contiguous()
    yield grouped_gemm_fp8.grouped_gemm_fp8, (across, *experts, counts)
    yield grouped_gemm_fp8.grouped_gemm_fp8_masked, (across, *experts, counts // 2, ROWS // EXPERTS)
    yield grouped_gemm_fp8.grouped_wgrad_fp8, (down, down, torch.tensor([tiles.TILE, tiles.TILE, 0, 0], device=device))
