"""Products in FP8 for decoding: a fixed room of rows an expert, of which only the first few hold tokens.

Reading the weights takes the time. So the weight is the left operand, whose tiles have 64 rows at least on tensor cores, and
the few tokens are the right one, whose tiles may be as narrow as 16; several programs share a multiprocessor, and one reads
while another finishes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.ops.kernels.product import Config
from dsv3.ops.tiles import TILE, Tiles


def choose(rows_per_group: int) -> Config:
    """The narrowest tile that holds a group, or 64 rows."""
    return Config(min(64, max(16, triton.next_power_of_2(rows_per_group))), 128, 4, 3)


@triton.jit(do_not_specialize=["rows_per_group", "K", "x_scale_column", "weight_scale_expert", "weight_scale_row"])
def masked_kernel(
    x,
    weight,
    x_scale,
    weight_scale,
    counts,
    out,
    rows_per_group,
    N,
    K,
    x_scale_column,
    weight_scale_expert,
    weight_scale_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0)
    n = tl.program_id(1)
    expert = tl.program_id(2)
    count = tl.minimum(tl.load(counts + expert).to(tl.int32), rows_per_group)
    if m * BLOCK_M < count:
        inside = m * BLOCK_M + tl.arange(0, BLOCK_M)
        row = expert * rows_per_group + m * BLOCK_M
        rows = expert * rows_per_group + inside
        x_scale_at = x_scale + rows
        weight_scale_at = weight_scale + expert * weight_scale_expert + (n * BLOCK_N // BLOCK_K) * weight_scale_row
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            # Read here, multiplied below: they arrive while the tensor cores work.
            left_factor = tl.load(weight_scale_at + k)
            right_factor = tl.load(x_scale_at, mask=inside < count, other=0.0)
            left = weight.load([expert * N + n * BLOCK_N, k * BLOCK_K])
            right = x.load([row, k * BLOCK_K])
            part = tl.dot(left, right.T)
            sums += part * (left_factor * right_factor)[None, :]
            x_scale_at += x_scale_column
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        own = (inside < count)[:, None] & (columns < N)[None, :]
        tl.store(at, sums.T.to(out.dtype.element_ty), mask=own)


def masked(
    x: Tiles,
    weight_ENK: Tensor,
    scale_EPQ: Tensor,
    counts_E: Tensor,
    rows_per_group: int,
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
) -> Tensor:
    """[E, rows_per_group, N]: see `dsv3.ops.grouped_gemm_fp8`. K is a multiple of 16 bytes, the scales' columns lie together."""
    experts, across, inner = weight_ENK.shape
    out = torch.empty(experts, rows_per_group, across, dtype=out_dtype, device=x.values.device)
    if not out.numel():
        return out
    config = config or choose(rows_per_group)
    masked_kernel[(-(-rows_per_group // config.rows), -(-across // config.columns), experts)](
        TensorDescriptor.from_tensor(x.values, [config.rows, TILE]),
        TensorDescriptor.from_tensor(weight_ENK.view(-1, inner), [config.columns, TILE]),
        x.scale,
        scale_EPQ,
        counts_E,
        out,
        rows_per_group,
        across,
        inner,
        x.scale.stride(1),
        scale_EPQ.stride(0),
        scale_EPQ.stride(1),
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=TILE,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
