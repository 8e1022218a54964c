"""One AdamW update of one weight (Loshchilov and Hutter 2019, algorithm 2) with the moments in BF16, as the report keeps them
(section 3.3.1). Everything is computed in FP32; moments are rounded once.
"""

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel

PART = 2**26
"""Elements the reference updates at a time: what is computed in FP32 on the way takes a few of these and not a few weights."""


def reference(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor, keep: Tensor, scale: Tensor,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """The definition. `nan_to_num` because `keep` is 0 where anything is not finite, and 0 times that is not 0."""
    # Before the first step that counts, both corrections are 0, and so is `keep`.
    corrections = [(1 - beta**step).clamp_(min=torch.finfo(torch.float32).tiny) for beta in betas]
    for part, grad_part, first_part, second_part in zip(
        *(each.view(-1).split(PART) for each in (weight, grad, first, second)), strict=True
    ):
        finite = (grad_part / scale).nan_to_num_(0.0, 0.0, 0.0)
        mean = first_part.float().lerp_(finite, keep * (1 - betas[0]))
        square = second_part.float().lerp_(finite.square_(), keep * (1 - betas[1]))
        first_part.copy_(mean)
        second_part.copy_(square)
        root = (square / corrections[1]).sqrt_().add_(eps)
        part.mul_(1 - keep * (lr * weight_decay))
        part.addcdiv_(mean * (keep / corrections[0]), root, value=-lr)


def triton_serves(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *rest: object) -> str | None:
    """Why it does not."""
    if not all(each.is_contiguous() for each in (weight, grad, first, second)):
        return "needs contiguous tensors"
    return no_triton(weight, grad, first, second)


adamw = Operation(
    "adamw",
    [
        Implementation("triton", kernel("adamw", "update"), triton_serves),
        Implementation("reference", reference, anything),
    ],
)
"""`adamw(weight, grad, first, second, step, keep, scale, lr, betas, eps, weight_decay)` changes weight (FP32), and the moments first
and second (BF16, of its shape) in place. `step` (FP32 scalar) counts this update, whose gradient (FP32) is divided by `scale` (FP32
scalar); where `keep` (FP32 scalar) is 0 and not 1, nothing changes, whatever the gradient holds."""
