"""A linear layer without bias that computes in the dtype of its input: the weight is cast, so that no autocast is needed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.ops.rms_norm import rms_norm


class Linear(nn.Module):
    """`y = x W^T`; `weight` is [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        return F.linear(x, cast(self.weight, x.dtype))


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. Asking is cheaper than a `to` that has nothing to do, which counts where tokens come one by one."""
    return weight if weight.dtype == dtype else weight.to(dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in FP32; `weight` is [dim], ones at first."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in x's dtype."""
        return rms_norm(x, self.weight, self.eps)
