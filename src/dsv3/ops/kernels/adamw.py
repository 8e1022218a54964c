"""AdamW's update: 20 bytes an element read and written."""

import triton
import triton.language as tl
from torch import Tensor

CONFIG = (4096, 8)
"""Elements of a program, warps."""


@triton.jit
def update_kernel(
    weight, grad, first, second, step, keep, scale, size, lr, eps, weight_decay,
    BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Where nothing is to change, nothing is read: the gradient may hold anything.
    if tl.load(keep) != 0:
        count = tl.load(step)
        correction1 = 1 - tl.exp2(count * tl.log2(tl.full((), BETA1, tl.float32)))
        correction2 = 1 - tl.exp2(count * tl.log2(tl.full((), BETA2, tl.float32)))
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, inside, other=0.0) / tl.load(scale)
        mean = tl.load(first + at, inside, other=0.0).to(tl.float32)
        square = tl.load(second + at, inside, other=0.0).to(tl.float32)
        mean += (1 - BETA1) * (g - mean)
        square += (1 - BETA2) * (g * g - square)
        tl.store(first + at, mean.to(first.dtype.element_ty), inside)
        tl.store(second + at, square.to(second.dtype.element_ty), inside)
        w = tl.load(weight + at, inside, other=0.0) * (1 - lr * weight_decay)
        w -= lr * (mean / correction1) / (tl.sqrt(square / correction2) + eps)
        tl.store(weight + at, w, inside)


def update(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor, keep: Tensor, scale: Tensor,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    config: tuple[int, int] = CONFIG,
) -> None:  # fmt: skip
    """In place; see `dsv3.ops.adamw`."""
    block, warps = config
    update_kernel[(triton.cdiv(weight.numel(), block),)](
        weight, grad, first, second, step, keep, scale, weight.numel(), lr, eps, weight_decay,
        BETA1=betas[0], BETA2=betas[1], BLOCK=block, num_warps=warps,
    )  # fmt: skip
