"""Matrix products in FP8 as the report has them (section 3.3.2, figure 7): tensor cores sum 128 elements of K, the sums are
multiplied by the scales of both sides and added in FP32.

Tensor cores keep about 14 bits while they sum FP8 products: what reaches them in FP32 after every 128 loses no more.

Legend: M rows, K summed over, N columns, P = ceil(N / 128), Q = ceil(K / 128).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.block_scaled import BLOCK
from dsv3.ops.kernels.available import no_gluon, no_triton
from dsv3.ops.operation import Implementation, Operation
from dsv3.ops.tiles import TILE, Tiles, empty_scale

FILLING = 64
"""Tiles from which on a product that is added to a sum is faster in Gluon than cuBLAS's and an addition."""


def prepared_scale(scale_PQ: Tensor) -> Tensor:
    """The scales of a weight (FP32 [..., P, Q]) in rows padded to multiples of four, as cuBLAS reads them: the same shape and
    values, in strides of 4 ceil(Q / 4).

    The products take either form, and lay out what is not prepared at each call. Where Q is a multiple of 4, nothing is copied.
    """
    blocks = scale_PQ.shape[-1]
    if not blocks % 4:
        return scale_PQ.contiguous()
    return F.pad(scale_PQ, (0, -blocks % 4))[..., :blocks]


def weight_factor(scale_PQ: Tensor, rows: int) -> Tensor:
    """The scales of a weight's blocks, one for each of its rows: [P, Q] -> [rows, Q]."""
    return scale_PQ.repeat_interleave(BLOCK, dim=0)[:rows]


def columns_reference(a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The definition."""
    left, right = a.values.float(), b.values.float()
    product = left.new_zeros(len(left), len(right))
    for q, start in enumerate(range(0, left.shape[1], TILE)):
        part = left[:, start : start + TILE] @ right[:, start : start + TILE].t()
        product += part * a.scale[:, q, None] * b.scale[None, :, q]
    return product.to(out_dtype) if out is None else out.add_(product)


def reference(x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The definition."""
    return columns_reference(x, Tiles(weight_NK, weight_factor(scale_PQ, len(weight_NK))), out_dtype)


def disagree(x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What is wrong with the shapes."""
    if x.values.shape[1] != weight_NK.shape[1]:
        return f"the rows have {x.values.shape[1]} elements, the weight's {weight_NK.shape[1]}"
    expected = [-(-size // BLOCK) for size in weight_NK.shape]
    if list(scale_PQ.shape) != expected:
        return f"a weight of shape {list(weight_NK.shape)} has scales of shape {expected}, not {list(scale_PQ.shape)}"
    return None


def columns_disagree(
    a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> str | None:
    """What is wrong with the shapes."""
    if a.values.shape[1] != b.values.shape[1]:
        return f"the sides have {a.values.shape[1]} and {b.values.shape[1]} elements to sum over"
    if out is not None and (out.shape, out.dtype) != ((len(a.values), len(b.values)), torch.float32):
        return f"adds to float32 {[len(a.values), len(b.values)]}, not to {out.dtype} {list(out.shape)}"
    return None


def no_scaled_mm(a: Tensor, b: Tensor) -> str | None:
    """The reason why torch's product with scales a block cannot compute these values."""
    if not a.is_cuda or torch.version.cuda is None:
        return "needs tensors on a GPU of NVIDIA's"
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        return f"takes float8_e4m3fn, not {a.dtype} and {b.dtype}"
    if a.shape[1] % TILE or b.shape[0] % 16:
        return f"needs rows of whole tiles and a multiple of 16 columns, not {a.shape[1]} and {b.shape[0]}"
    if not a.shape[0] or not a.shape[1] or not b.shape[0]:
        return "needs at least one element"
    return no_block_scales(a.device)


@cache
def no_block_scales(device: torch.device) -> str | None:
    """The reason why this GPU's cuBLAS multiplies no scales of tiles and blocks."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a GPU of compute capability 9.0"
    if tuple(int(part) for part in str(torch.version.cuda).split(".")[:2]) < (12, 9):
        return f"needs CUDA 12.9 or later, not {torch.version.cuda}"
    return None


def padded(tiles: Tiles) -> Tiles:
    """With the rows behind the last, up to a multiple of four, that cuBLAS wants; what they hold is of no account."""
    rows, columns = tiles.values.shape
    if not rows % 4:
        return tiles
    values = tiles.values.new_empty(rows + -rows % 4, columns)
    values[:rows] = tiles.values
    return Tiles(values, tiles.scale.as_strided((len(values), tiles.scale.shape[1]), tiles.scale.stride()))


def laid_out(tiles: Tiles) -> Tiles:
    """With scales as cuBLAS reads them: those of some of a matrix's rows are too far apart."""
    rows, columns = tiles.values.shape
    scale = empty_scale(rows, columns, tiles.values.device)
    return tiles if tiles.scale.stride() == scale.stride() else Tiles(tiles.values, scale.copy_(tiles.scale))


def scaled_mm(x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """cuBLAS, through torch."""
    left = padded(x)
    down, blocks = scale_PQ.shape
    long = blocks + -blocks % 4
    # Without the padding, older releases of torch compute something else, in silence (pytorch#166752).
    if scale_PQ.stride() != (long, 1):
        scale_PQ = F.pad(scale_PQ, (0, long - blocks))
    out = F.scaled_mm(
        left.values,
        weight_NK.t(),
        left.scale,
        F.ScalingType.BlockWise1x128,
        scale_PQ.as_strided((long, down), (1, long)),
        F.ScalingType.BlockWise128x128,
        output_dtype=out_dtype,
    )
    return out[: len(x.values)]


def columns_scaled_mm(a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """cuBLAS, through torch."""
    left = padded(laid_out(a))
    scaling = F.ScalingType.BlockWise1x128
    product = F.scaled_mm(left.values, b.values.t(), left.scale, scaling, b.scale, scaling, output_dtype=out_dtype)
    product = product[: len(a.values)]
    return product if out is None else out.add_(product)


def columns_gluon(a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, *, out: Tensor) -> Tensor:
    """The kernel of grouped weight gradients, with one group: what is added to is not read by it."""
    from dsv3.ops.kernels.grouped_wgrad_fp8_gluon import wgrad

    wgrad(a, b, torch.full((1,), a.values.shape[1], device=a.values.device), out.unsqueeze(0))
    return out


def scaled_mm_serves(
    x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Why it does not."""
    return disagree(x, weight_NK, scale_PQ) or no_scaled_mm(x.values, weight_NK)


def columns_scaled_mm_serves(
    a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> str | None:
    """Why it does not."""
    return columns_disagree(a, b, out_dtype, out) or no_scaled_mm(a.values, b.values)


def columns_gluon_serves(
    a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> str | None:
    """Why it does not."""
    if out is None:
        return "pays where the product is added to what is there"
    if len(a.values) * len(b.values) < FILLING * 128 * 256:
        return f"pays from {FILLING} tiles of 128 x 256 on"
    if a.values.shape[1] % TILE:
        return f"needs a multiple of {TILE} tokens, not {a.values.shape[1]}"
    return columns_disagree(a, b, out_dtype, out) or no_sums_in_gluon(a, b, out)


def no_bulk_copies(a: Tensor, b: Tensor) -> str | None:
    """The reason why Triton's kernels of products cannot read these values."""
    if a.shape[-1] * a.element_size() % 16:
        return f"needs rows of a multiple of 16 bytes, not {a.shape[-1] * a.element_size()}"
    return no_triton(a, b)


def triton(x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The kernel of grouped products, with one group."""
    from dsv3.ops.kernels.grouped_gemm_fp8 import contiguous

    count = torch.full((1,), len(x.values), device=x.values.device)
    return contiguous(x, weight_NK.unsqueeze(0), scale_PQ.unsqueeze(0), count, out_dtype)


def columns_triton(a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The kernel of grouped weight gradients, with one group."""
    from dsv3.ops.kernels.grouped_wgrad_fp8 import wgrad

    count = torch.full((1,), a.values.shape[1], device=a.values.device)
    product = wgrad(a, b, count, None if out is None else out.unsqueeze(0), out_dtype=out_dtype)[0]
    return product if out is None else out


def triton_serves(x: Tiles, weight_NK: Tensor, scale_PQ: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why it does not."""
    return disagree(x, weight_NK, scale_PQ) or no_bulk_copies(x.values, weight_NK)


def columns_triton_serves(
    a: Tiles, b: Tiles, out_dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> str | None:
    """Why it does not."""
    if out is not None and not out.is_contiguous():
        return "adds to a contiguous matrix"
    return columns_disagree(a, b, out_dtype, out) or no_bulk_copies(a.values, b.values)


def no_sums_in_gluon(a: Tiles, b: Tiles, out: Tensor | None) -> str | None:
    """The reason why the kernel for weight gradients in Gluon cannot read these, or write there."""
    if out is not None and not out.is_contiguous():
        return "adds to contiguous matrices"
    if (reason := no_bulk_copies(a.values, b.values) or no_gluon(a.values.device)) is not None:
        return reason
    if len(b.values) % 4 or any(each.data_ptr() % 16 for each in (a.scale, b.scale, out) if each is not None):
        return "needs scales and rows of the result at multiples of 16 bytes"
    return None


gemm_fp8 = Operation(
    "gemm_fp8",
    [
        Implementation("scaled_mm", scaled_mm, scaled_mm_serves),
        Implementation("triton", triton, triton_serves),
        Implementation("reference", reference, disagree),
    ],
)
"""`gemm_fp8(x: Tiles [M, K], weight E4M3 [N, K] contiguous, scale FP32 [P, Q], out_dtype=bfloat16) -> [M, N]` = x weight^T.

One scale a 1 x 128 tile of x and one a 128 x 128 block of the weight; `prepared_scale` lays the latter out once. Raises
`UserError` for shapes that do not agree.
"""

gemm_fp8_columns = Operation(
    "gemm_fp8_columns",
    [
        Implementation("gluon", columns_gluon, columns_gluon_serves),
        Implementation("scaled_mm", columns_scaled_mm, columns_scaled_mm_serves),
        Implementation("triton", columns_triton, columns_triton_serves),
        Implementation("reference", columns_reference, columns_disagree),
    ],
)
"""`gemm_fp8_columns(a: Tiles [M, K], b: Tiles [N, K], out_dtype=float32, out=None) -> [M, N]` = a b^T, with one scale a 1 x 128 tile
on both sides: the weight gradient, where K are tokens, a the output's gradient transposed and b the input transposed
(`quantize_columns`). Where `out` (FP32) is given, the product is added to it and it is returned. Raises `UserError` for shapes
that do not agree.
"""
