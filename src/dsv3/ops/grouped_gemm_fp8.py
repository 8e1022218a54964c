"""Matrix products in FP8 for experts (report, sections 3.3.2 and 3.4): rows sorted by expert, each group times its own weight.

How many rows each expert has is known to the device alone: nothing here waits for it.

Legend: R rows, E experts, N elements out, K elements in, P = ceil(N / 128), Q = ceil(K / 128).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.block_scaled import scale_shape
from dsv3.ops.gemm_fp8 import columns_reference, no_bulk_copies, no_sums_in_gluon
from dsv3.ops.gemm_fp8 import reference as gemm_reference
from dsv3.ops.grouped_linear import segments
from dsv3.ops.kernels.available import no_gluon, no_triton
from dsv3.ops.kernels.deep_gemm import no_deep_gemm
from dsv3.ops.operation import Implementation, Operation, kernel
from dsv3.ops.tiles import TILE, Tiles


def rows_of(tiles: Tiles, start: int, end: int) -> Tiles:
    """A view."""
    return Tiles(tiles.values[start:end], tiles.scale[start:end])


def columns_of(tiles: Tiles, start: int, end: int) -> Tiles:
    """A view; `start` is a multiple of 128."""
    return Tiles(tiles.values[:, start:end], tiles.scale[:, start // TILE : -(-end // TILE)])


def reference(
    x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    aligned: bool = False,
) -> Tensor:  # fmt: skip
    """The definition: a loop over experts."""
    out = torch.zeros(len(x.values), weight_ENK.shape[1], dtype=out_dtype, device=x.values.device)
    for e, start, end in segments(counts_E):
        out[start:end] = gemm_reference(rows_of(x, start, end), weight_ENK[e], scale_EPQ[e], out_dtype)
    return out


def masked_reference(
    x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, rows_per_group: int,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """The definition: a loop over experts. Rows behind a group's are zeros here."""
    experts, across, _ = weight_ENK.shape
    out = torch.zeros(experts, rows_per_group, across, dtype=out_dtype, device=x.values.device)
    for e, count in enumerate(counts_E.tolist()):
        group = rows_of(x, e * rows_per_group, e * rows_per_group + count)
        out[e, :count] = gemm_reference(group, weight_ENK[e], scale_EPQ[e], out_dtype)
    return out


def wgrad_reference(grad: Tiles, x: Tiles, counts_E: Tensor, out: Tensor | None = None) -> Tensor:
    """The definition: a loop over experts."""
    if out is None:
        out = torch.zeros(len(counts_E), len(grad.values), len(x.values), device=grad.values.device)
    for e, start, end in segments(counts_E):
        out[e] += columns_reference(columns_of(grad, start, end), columns_of(x, start, end))
    return out


def disagree(x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, *_: Any, **named: Any) -> str | None:
    """What is wrong with the shapes."""
    if x.values.shape[1] != weight_ENK.shape[2]:
        return f"the rows have {x.values.shape[1]} elements, the weight's {weight_ENK.shape[2]}"
    expected = scale_shape(weight_ENK.shape)
    if scale_EPQ.shape != expected:
        return f"a weight of shape {list(weight_ENK.shape)} has scales of shape {list(expected)}, not {list(scale_EPQ.shape)}"
    if len(counts_E) != len(weight_ENK):
        return f"there are {len(weight_ENK)} experts and {len(counts_E)} counts"
    return None


def masked_disagree(
    x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, rows_per_group: int, *_: Any, **named: Any
) -> str | None:
    """What is wrong with the shapes."""
    if len(x.values) != len(weight_ENK) * rows_per_group:
        return f"{len(weight_ENK)} experts with room for {rows_per_group} rows each do not take {len(x.values)} rows"
    return disagree(x, weight_ENK, scale_EPQ, counts_E)


def wgrad_disagree(grad: Tiles, x: Tiles, counts_E: Tensor, out: Tensor | None = None) -> str | None:
    """What is wrong with the shapes."""
    if grad.values.shape[1] != x.values.shape[1]:
        return f"the gradient has {grad.values.shape[1]} tokens, the input {x.values.shape[1]}"
    expected = (len(counts_E), len(grad.values), len(x.values))
    if out is not None and (out.shape != expected or out.dtype != torch.float32):
        return f"adds to float32 {list(expected)}, not to {out.dtype} {list(out.shape)}"
    return None


def without_promise(file: str) -> Callable[..., Tensor]:
    """A kernel for groups of any size: it has no use for `aligned`."""
    run = kernel(file, "contiguous")

    def product(
        x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
        aligned: bool = False,
    ) -> Tensor:  # fmt: skip
        out: Tensor = run(x, weight_ENK, scale_EPQ, counts_E, out_dtype)
        return out

    return product


def deep_gemm(x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, *_: Any, **named: Any) -> Tensor:
    """The plugin."""
    from dsv3.ops.kernels.deep_gemm import contiguous

    return contiguous(x, weight_ENK, scale_EPQ, counts_E)


def deep_gemm_serves(
    x: Tiles, weight_ENK: Tensor, scale_EPQ: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16,
    aligned: bool = False,
) -> str | None:  # fmt: skip
    """Why it does not."""
    if not aligned:
        return "needs groups of multiples of 128 rows, and the caller's word for it"
    if out_dtype != torch.bfloat16 or weight_ENK.shape[2] % TILE or weight_ENK.shape[1] % 64:
        return "gives bfloat16, for K a multiple of 128 and N of 64"
    return disagree(x, weight_ENK, scale_EPQ, counts_E) or no_triton(x.values, weight_ENK) or no_deep_gemm()


def triton_serves(x: Tiles, weight_ENK: Tensor, *rest: Any, **named: Any) -> str | None:
    """Why it does not."""
    return disagree(x, weight_ENK, *rest, **named) or no_bulk_copies(x.values, weight_ENK)


def gluon_serves(x: Tiles, weight_ENK: Tensor, *rest: Any, **named: Any) -> str | None:
    """Why it does not."""
    if len(x.values) <= 64 * len(weight_ENK):
        return "pays from 64 rows an expert"
    return triton_serves(x, weight_ENK, *rest, **named) or no_gluon(x.values.device)


def masked_triton_serves(x: Tiles, weight_ENK: Tensor, *rest: Any, **named: Any) -> str | None:
    """Why it does not."""
    return masked_disagree(x, weight_ENK, *rest, **named) or no_bulk_copies(x.values, weight_ENK)


def wgrad_by(file: str) -> Callable[..., Tensor]:
    """A kernel, called as the operation is."""
    run = kernel(file, "wgrad")

    def product(grad: Tiles, x: Tiles, counts_E: Tensor, out: Tensor | None = None) -> Tensor:
        found: Tensor = run(grad, x, counts_E, out)
        return found

    return product


def wgrad_triton_serves(grad: Tiles, x: Tiles, counts_E: Tensor, out: Tensor | None = None) -> str | None:
    """Why it does not."""
    if out is not None and not out.is_contiguous():
        return "adds to contiguous matrices"
    return wgrad_disagree(grad, x, counts_E, out) or no_bulk_copies(grad.values, x.values)


def wgrad_gluon_serves(grad: Tiles, x: Tiles, counts_E: Tensor, out: Tensor | None = None) -> str | None:
    """Why it does not."""
    return wgrad_disagree(grad, x, counts_E, out) or no_sums_in_gluon(grad, x, out)


grouped_gemm_fp8 = Operation(
    "grouped_gemm_fp8",
    [
        Implementation("deep_gemm", deep_gemm, deep_gemm_serves),
        Implementation("gluon", without_promise("grouped_gemm_fp8_gluon"), gluon_serves),
        Implementation("triton", without_promise("grouped_gemm_fp8"), triton_serves),
        Implementation("reference", reference, disagree),
    ],
)
"""`grouped_gemm_fp8(x: Tiles [R, K], weight E4M3 [E, N, K], scale FP32 [E, P, Q], counts [E] int, out_dtype=bfloat16,
aligned=False) -> [R, N]`.

The first counts[0] rows meet weight[0], the next counts[1] rows weight[1], and so on. Counts are any that sum to R or less;
rows behind the last group's are zeros. With `aligned`, the caller promises that all are multiples of 128. Raises `UserError`
for shapes that do not agree.
"""

grouped_gemm_fp8_masked = Operation(
    "grouped_gemm_fp8_masked",
    [
        Implementation("triton", kernel("grouped_gemm_fp8_masked", "masked"), masked_triton_serves),
        Implementation("reference", masked_reference, masked_disagree),
    ],
)
"""`grouped_gemm_fp8_masked(x: Tiles [E * rows_per_group, K], weight E4M3 [E, N, K], scale FP32 [E, P, Q], counts [E] int,
rows_per_group, out_dtype=bfloat16) -> [E, rows_per_group, N]`.

For decoding: every expert has room for `rows_per_group` rows and uses the first counts[e]; what lies behind them, in x and in
the result, is of no account. Raises `UserError` for shapes that do not agree.
"""

grouped_wgrad_fp8 = Operation(
    "grouped_wgrad_fp8",
    [
        Implementation("gluon", wgrad_by("grouped_wgrad_fp8_gluon"), wgrad_gluon_serves),
        Implementation("triton", wgrad_by("grouped_wgrad_fp8"), wgrad_triton_serves),
        Implementation("reference", wgrad_reference, wgrad_disagree),
    ],
)
"""`grouped_wgrad_fp8(grad: Tiles [N, R], x: Tiles [K, R], counts [E] int, out=None) -> FP32 [E, N, K]`: for each expert, the
gradient of its weight, summed over its rows.

Both sides are transposed (`quantize_columns`): a tile is 128 rows of one channel, so counts are multiples of 128. Where `out`
is given, the products are added to it and it is returned. Raises `UserError` for shapes that do not agree.
"""
