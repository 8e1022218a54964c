"""Linear layer, RMSNorm and embedding. Linear layers have no bias, and cast their weight to the input's dtype: no autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.model.recompute import Recomputation
from dsv3.ops.block_scaled import dequantize, scale_shape
from dsv3.ops.cast import Rows, cast, gradient_dtype
from dsv3.ops.rms_norm import rms_norm
from dsv3.precision.projection import Projection
from dsv3.precision.split import Split
from dsv3.precision.stored import Once, Stored


class Linear(nn.Module):
    """`y = x W^T`; `weight` is [out_features, in_features]."""

    weight_scale_inv: Tensor | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("weight_scale_inv", None)
        self.fp8: Projection | None = None
        self.split: Split | None = None
        """Where the weight's gradient may be deferred; `fp8` defers its own."""
        self.stored = Stored(self)
        self.wide = Once(dequantize)

    def keep_in_fp8(self) -> None:
        """Allocates room for released FP8 weights as they are, not trainable: E4M3 and an FP32 scale a block. `dsv3.precision.stored`
        says how they are multiplied."""
        self.weight, self.weight_scale_inv = fp8_storage(self.weight, tuple(self.weight.shape))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in another dtype; an FP8 weight is dequantised."""
        if self.weight_scale_inv is None:
            return cast(self.weight, dtype)
        return dequantize(self.weight, self.weight_scale_inv, dtype)

    def kept_in(self, dtype: torch.dtype) -> Tensor:
        """`weight_in` for what every step reads: an FP8 weight is dequantised once, and again after it was written to."""
        if self.weight_scale_inv is None:
            return cast(self.weight, dtype)
        return self.wide.of(self.weight, self.weight_scale_inv, option=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        if self.fp8 is not None:
            return self.fp8(x)[0]
        if self.split is not None:
            return self.split(x, [self.weight])
        if self.stored.serves(x):
            return self.stored(x)
        return F.linear(x, self.weight_in(x.dtype))

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` as a function of its weight too, for recomputation."""
        if self.fp8 is not None:
            return self.fp8.multiply(x, weight)[0]
        if self.split is not None:
            return self.split(x, [self.weight], weights=[weight])
        return F.linear(x, cast(weight, x.dtype))


def fp8_storage(weight: Tensor, blocks_of: tuple[int, ...]) -> tuple[nn.Parameter, Tensor]:
    """Uninitialised: a weight in E4M3, and its scales, which are those of a matrix or stack of shape `blocks_of`."""
    scale = torch.empty(scale_shape(blocks_of), dtype=torch.float32, device=weight.device)
    return nn.Parameter(torch.empty_like(weight, dtype=torch.float8_e4m3fn), requires_grad=False), scale


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in FP32; `weight` is [dim], ones at first."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.recomputation: Recomputation | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in x's dtype."""
        if self.recomputation is not None:
            return self.recomputation(self.norm, x, self.weight)
        return rms_norm(x, self.weight, self.eps)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` as a function of its weight too, for recomputation."""
        return rms_norm(x, weight, self.eps)


class Embedding(nn.Embedding):
    """Rows of `weight` [entries, dim], in its dtype; gradients are summed in the dtype of the weight's gradient. On a GPU a
    micro-batch's gradients are added straight to these sums."""

    def forward(self, tokens: Tensor) -> Tensor:
        """int [...] -> [..., dim]."""
        plain = not self.weight.is_cuda and gradient_dtype(self.weight) == self.weight.dtype
        if plain or not torch.is_grad_enabled():
            return super().forward(tokens)
        return Rows.apply(self.weight, tokens)
