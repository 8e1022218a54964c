"""Matrices in FP8 with one scale a block (report, section 3.3.2): E4M3 values, 128 x 128 blocks, scales in FP32.

The released weights are stored so: `weight` and `weight_scale_inv`, the factor that values are multiplied by to get them
back (in spite of its name). Blocks at the lower and right edges may be smaller.

Legend: O rows, I columns, P = ceil(O / 128), Q = ceil(I / 128).
"""

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel
from dsv3.ops.tiles import E4M3_MAX, scale_of

BLOCK = 128


def quantize(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """FP32 or BF16 [..., O, I] -> (E4M3 [..., O, I], FP32 scales [..., P, Q]).

    A block's scale is its largest magnitude / 448, or the next power of two above (DeepSeek-V3.1's `ue8m0`); a block of
    zeros gets 1. Raises `UserError` for infinities and NaN, which E4M3 blocks cannot hold.
    """
    values, scale = blocks_reference(weight_OI, power_of_two)
    if not bool(scale.isfinite().all()):
        raise UserError(f"a weight of shape {list(weight_OI.shape)} holds infinities or NaN, which FP8 blocks cannot")
    return values, scale


def blocks_reference(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The definition."""
    rows, columns = weight_OI.shape[-2:]
    blocks = in_blocks(weight_OI).float()
    scale = scale_of(blocks.abs().amax((-3, -1)), power_of_two)
    # The cast of what is not finite differs between versions of torch; its block's scale says what it was.
    quotient = (blocks / scale[..., :, None, :, None]).nan_to_num_(0.0, 0.0, 0.0).clamp_(-E4M3_MAX, E4M3_MAX)
    values = quotient.to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2, -1)
    return values[..., :rows, :columns].contiguous(), scale


def transposed_reference(values_OI: Tensor, scale_PQ: Tensor) -> tuple[Tensor, Tensor]:
    """The definition."""
    return values_OI.transpose(-1, -2).contiguous(), scale_PQ.transpose(-1, -2).contiguous()


def not_by_triton(matrix_OI: Tensor, other: object = None) -> str | None:
    """The reason why the kernels do not serve; None when they do."""
    if not matrix_OI.is_contiguous():
        return "needs a contiguous matrix or stack of matrices"
    return no_triton(matrix_OI)


def weight_not_by_triton(weight_OI: Tensor, power_of_two: bool = False) -> str | None:
    """The reason why the kernel that quantises does not serve; None when it does."""
    if weight_OI.dtype not in (torch.bfloat16, torch.float32):
        return f"needs BF16 or FP32, not {weight_OI.dtype}"
    return not_by_triton(weight_OI)


def dequantize(values_OI: Tensor, scale_PQ: Tensor, dtype: torch.dtype) -> Tensor:
    """(E4M3 [..., O, I], scales [..., P, Q]) -> [..., O, I] in `dtype`, multiplied in FP32 and rounded once."""
    rows, columns = values_OI.shape[-2:]
    blocks = in_blocks(values_OI).float().mul_(scale_PQ.float()[..., :, None, :, None]).to(dtype)
    return blocks.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns].contiguous()


def in_blocks(matrix_OI: Tensor) -> Tensor:
    """[..., O, I] -> [..., P, 128, Q, 128], zeros behind the edges."""
    *_, rows, columns = matrix_OI.shape
    if rows % BLOCK or columns % BLOCK:
        padded = matrix_OI.new_zeros(*matrix_OI.shape[:-2], rows + -rows % BLOCK, columns + -columns % BLOCK)
        padded[..., :rows, :columns] = matrix_OI
        matrix_OI = padded
    return matrix_OI.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix, or of a stack of matrices: [..., O, I] -> [..., P, Q]."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // BLOCK), -(-columns // BLOCK))


quantize_blocks = Operation(
    "quantize_blocks",
    [
        Implementation("triton", kernel("blocks", "quantize_blocks"), weight_not_by_triton),
        Implementation("reference", blocks_reference, anything),
    ],
)
"""`quantize_blocks(weight [..., O, I] FP32 or BF16, power_of_two=False) -> (E4M3 [..., O, I], FP32 scales [..., P, Q])`:
`quantize` for every optimizer step. It never waits for the device: a block that holds infinities or NaN gets the scale NaN and
values of zero, so that whatever is computed with it is NaN too."""

transpose_blocks = Operation(
    "transpose_blocks",
    [
        Implementation("triton", kernel("blocks", "transpose_blocks"), not_by_triton),
        Implementation("reference", transposed_reference, anything),
    ],
)
"""`transpose_blocks(values [..., O, I], scale [..., P, Q]) -> (values [..., I, O], scale [..., Q, P])`, both contiguous: the
weight as the input gradient's product reads it. Blocks are square, so nothing is rounded again."""
