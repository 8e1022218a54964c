"""Cross-entropy of rows of logits, which are overwritten with their gradient: no second tensor of that size, none in FP32.

A row is read twice, first for its maximum and its sum of exponentials, then to be replaced. The second reading goes
backwards through the row, since what was read last is still in the cache.

Legend: N positions, V vocabulary.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_WARPS_ROWS = (16_384, 16, 1)
"""Columns that a block takes at a time, its warps, and the rows under way on a multiprocessor: with one, those of a whole
H200 (132 of 0.26 MB for DeepSeek-V3's vocabulary) fit into its cache."""
VECTOR = tl.constexpr(8)
"""Columns a thread reads at once: it has its own maximum and sum, and threads meet once a row."""
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def loss_kernel(
    logits, target, loss, rows, vocabulary, scale, ignore,
    COLUMNS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, COLUMNS // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    blocks = tl.cdiv(vocabulary, COLUMNS)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = logits + tl.cast(row, tl.int64) * vocabulary
        wanted = tl.load(target + row)
        if wanted == ignore:
            tl.store(loss + row, 0.0)
            if GRADIENT:
                for block in range(0, blocks):
                    column = block * COLUMNS + lane
                    zeros = tl.zeros([COLUMNS // VECTOR, VECTOR], logits.dtype.element_ty)
                    tl.store(start + column, zeros, mask=column < vocabulary)
        else:
            # NaN for a target that is no entry of the vocabulary. Read before anything is overwritten.
            known = (wanted >= 0) & (wanted < vocabulary)
            own = tl.load(start + wanted, mask=known, other=float("nan")).to(tl.float32)
            maximum = tl.full([COLUMNS // VECTOR], float("-inf"), tl.float32)
            total = tl.zeros([COLUMNS // VECTOR], tl.float32)
            for block in range(0, blocks):
                column = block * COLUMNS + lane
                value = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
                higher = tl.maximum(maximum, tl.max(value, axis=1))
                # Where there was nothing but -inf yet, -inf minus itself would be NaN.
                base = tl.where(higher == float("-inf"), 0.0, higher) * LOG2_E
                exponentials = tl.exp2(value * LOG2_E - base[:, None])
                total = total * tl.exp2(maximum * LOG2_E - base) + tl.sum(exponentials, axis=1)
                maximum = higher
            highest = tl.max(maximum, axis=0)
            norm = tl.sum(total * tl.exp2((maximum - highest) * LOG2_E), axis=0)
            tl.store(loss + row, tl.log(norm) + highest - own)
            if GRADIENT:
                factor = scale / norm
                base = highest * LOG2_E
                one = wanted.to(tl.int32)
                for block in range(0, blocks):
                    column = (blocks - 1 - block) * COLUMNS + lane
                    inside = column < vocabulary
                    value = tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32)
                    gradient = tl.exp2(value * LOG2_E - base) * factor - tl.where(column == one, scale, 0.0)
                    tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=inside, cache_modifier=".cs")


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter any number would do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def losses(
    logits_NV: Tensor,
    target_N: Tensor,
    ignore: int,
    scale: float | None,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    """-log softmax(logits)[target] of each row, FP32 [N], 0 where the target is `ignore`.

    With `scale`, the logits (contiguous) become the gradient of `scale` times the sum of the losses.
    """
    rows, vocabulary = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    wanted, warps, under_way = config or COLUMNS_WARPS_ROWS
    columns = max(VECTOR.value, min(wanted, triton.next_power_of_2(vocabulary)))
    if rows:
        loss_kernel[(min(rows, under_way * multiprocessors(logits_NV.device)),)](
            logits_NV, target_N.contiguous(), loss_N, rows, vocabulary, 0.0 if scale is None else scale, ignore,
            COLUMNS=columns, GRADIENT=scale is not None, num_warps=max(1, min(warps, columns // 256)),
        )  # fmt: skip
    return loss_N
