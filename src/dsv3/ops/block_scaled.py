"""Matrices in FP8 with one scale a block (report, section 3.3.2): E4M3 values, 128 x 128 blocks, scales in FP32.

The released weights are stored so: `weight` and `weight_scale_inv`, the factor that values are multiplied by to get them
back (in spite of its name). Blocks at the lower and right edges may be smaller.

Legend: O rows, I columns, P = ceil(O / 128), Q = ceil(I / 128).
"""

import torch
from torch import Tensor

from dsv3.errors import UserError

BLOCK = 128
E4M3_MAX = 448.0


def quantize(weight_OI: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """FP32 or BF16 [..., O, I] -> (E4M3 [..., O, I], FP32 scales [..., P, Q]).

    A block's scale is its largest magnitude / 448, or the next power of two above (DeepSeek-V3.1's `ue8m0`); a block of
    zeros gets 1. Raises `UserError` for infinities and NaN, which E4M3 blocks cannot hold.
    """
    rows, columns = weight_OI.shape[-2:]
    blocks = in_blocks(weight_OI).float()
    largest = blocks.abs().amax((-3, -1))
    if not bool(largest.isfinite().all()):
        raise UserError(f"a weight of shape {list(weight_OI.shape)} holds infinities or NaN, which FP8 blocks cannot")
    # By a tensor: GPUs multiply by the inverse of a number, which rounds differently.
    scale = torch.where(largest > 0, largest / torch.full_like(largest, E4M3_MAX), 1.0)
    # Below this, the quotient by a scale would overflow FP32.
    scale = scale.clamp_(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (blocks / scale[..., :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns].contiguous(), scale


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
