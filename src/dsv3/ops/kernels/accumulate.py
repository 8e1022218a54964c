"""BF16 added to FP32: 10 bytes an element. Torch's addition of two dtypes reads one element at a time."""

import triton
import triton.language as tl
from torch import Tensor

CONFIG = (4096, 8)
"""Elements of a program, warps."""


@triton.jit
def add_kernel(total, gradient, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    before = tl.load(total + at, inside, other=0.0)
    tl.store(total + at, before + tl.load(gradient + at, inside, other=0.0).to(tl.float32), inside)


def add(total: Tensor, gradient: Tensor, config: tuple[int, int] = CONFIG) -> None:
    """In place; see `dsv3.ops.accumulate`."""
    block, warps = config
    if total.numel():
        add_kernel[(triton.cdiv(total.numel(), block),)](total, gradient, total.numel(), BLOCK=block, num_warps=warps)
