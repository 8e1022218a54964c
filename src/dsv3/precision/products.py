"""The three products of a linear layer in FP8 (report, section 3.3.1): output, input's gradient, weight's gradient.

Legend: R rows (tokens), K inputs, N outputs, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.ops.gemm_fp8 import gemm_fp8, gemm_fp8_columns
from dsv3.ops.grouped_gemm_fp8 import grouped_gemm_fp8
from dsv3.ops.tiles import TILE, Tiles
from dsv3.precision.deferred import Sums
from dsv3.precision.weights import Blocks

FP8_WEIGHT_GRADIENT_ROWS = 4096
"""Mean rows an expert from which its weight gradient is in FP8, as the report has it. Below, BF16 is faster: it needs no transposed
copies (docs/log.md)."""


def product(x: Tiles, weight: Blocks, counts_E: Tensor | None, dtype: torch.dtype, aligned: bool = False) -> Tensor:
    """x [R, K] times weight [N, K], or each expert's rows times its own weight [E, N, K]: [R, N] in `dtype`. `aligned`: all groups
    are multiples of 128 rows."""
    if counts_E is None:
        return gemm_fp8(x, weight.values, weight.scale, dtype)
    return grouped_gemm_fp8(x, weight.values, weight.scale, counts_E, dtype, aligned=aligned)


def weight_gradients(grad: Tiles, x: Tiles, sizes: Sequence[int], sums: Sums) -> Sequence[Tensor]:
    """FP32 [N, K] of each weight: grad^T x, where grad [sum of N, R] and x [K, R] are in tiles of 128 tokens and `sizes` are the
    weights' N. What has a sum is added to it, which is given back."""
    if any(each is None for each in sums):
        return gemm_fp8_columns(grad, x).split(list(sizes))
    parts = zip(grad.values.split(list(sizes)), grad.scale.split(list(sizes)), sums, strict=True)
    return [gemm_fp8_columns(Tiles(values, scale), x, out=total) for values, scale, total in parts]


def row_alignment(rows: int, experts: int) -> int:
    """What the groups of so many rows are to be padded to a multiple of, so that their weight gradients can be in FP8; else 0."""
    return TILE if rows >= FP8_WEIGHT_GRADIENT_ROWS * experts else 0
