"""A gradient added to the sum of those before it."""

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel


def reference(total: Tensor, gradient: Tensor) -> None:
    """The definition."""
    total.add_(gradient)


def triton_serves(total: Tensor, gradient: Tensor) -> str | None:
    """Why it does not. Torch's own addition of one dtype is as fast as a copy."""
    if (total.dtype, gradient.dtype) != (torch.float32, torch.bfloat16):
        return f"adds BF16 to FP32, not {gradient.dtype} to {total.dtype}"
    if total.shape != gradient.shape or not total.is_contiguous() or not gradient.is_contiguous():
        return "needs contiguous tensors of one shape"
    return no_triton(total, gradient)


accumulate = Operation(
    "accumulate",
    [
        Implementation("triton", kernel("accumulate", "add"), triton_serves),
        Implementation("reference", reference, anything),
    ],
)
"""`accumulate(total, gradient)`: adds to `total`, in its dtype and in place, a gradient of its shape in any dtype."""
