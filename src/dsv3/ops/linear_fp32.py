"""A linear layer in FP32 of activations in any dtype: the router's, which the report leaves in higher precision (section 3.3.1).

Tensor cores have no FP32. But a product of two numbers in BF16 is exact in FP32, and a number in FP32 is the sum of three in BF16:
three products in BF16 stand for one in FP32, at several times the speed. Tensor cores add with fewer bits than FP32's units: at
4,096 x 7,168 the error was 8e-6 of the norm in place of 8e-7 (docs/log.md).

Legend: T tokens, D elements in, E elements out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything, in_training


class Reference(torch.autograd.Function):
    """The definition. The input is kept in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """FP32 [T, E]."""
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Of the input in its dtype, of the weight in FP32."""
        x_TD, weight_ED = ctx.saved_tensors
        return (grad_TE @ weight_ED.float()).to(x_TD.dtype), grad_TE.t() @ x_TD.float()


class InThree(torch.autograd.Function):
    """The weight, and the gradient of the result, as three in BF16 each."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """FP32 [T, E]."""
        ctx.save_for_backward(x_TD, weight_ED)
        out: Tensor = torch.mm(x_TD, torch.cat(in_three(weight_ED)).t(), out_dtype=torch.float32)
        return out.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Of the input in BF16: two parts of each side are more than it holds. Of the weight in FP32."""
        x_TD, weight_ED = ctx.saved_tensors
        (high, middle, low), (weight_high, weight_middle, _) = in_three(grad_TE), in_three(weight_ED)
        grad_x = torch.cat((high, high, middle), 1) @ torch.cat((weight_high, weight_middle, weight_high))
        parts = torch.cat((high, middle, low), 1)
        grad_weight: Tensor = torch.mm(parts.t(), x_TD, out_dtype=torch.float32)
        return grad_x, grad_weight.unflatten(0, (3, -1)).sum(0)


def in_three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 tensors that add up to one in FP32, to its last bit or nearly so; the first is it, rounded."""
    high = x.bfloat16()
    rest = x.float() - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def serves_in_three(x_TD: Tensor, weight_ED: Tensor) -> str | None:
    """Why it does not."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        return "needs activations in bfloat16 on a GPU"
    return in_training()


linear_fp32 = Operation(
    "linear_fp32",
    [
        Implementation("bf16_in_three", InThree.apply, serves_in_three),
        Implementation("reference", Reference.apply, anything),
    ],
)
"""`linear_fp32(x [T, D], weight [E, D]) -> FP32 [T, E]` = x weight^T in FP32, with gradients. The input is kept in its own dtype."""
