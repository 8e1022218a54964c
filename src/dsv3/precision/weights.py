"""FP8 copies of weights in 128 x 128 blocks, made once for each value that a weight has: once an optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv3.ops.block_scaled import transpose_blocks
from dsv3.precision.scaling import Quantizers


@dataclass(frozen=True)
class Blocks:
    """A weight in FP8."""

    values: Tensor
    """E4M3 [..., N, K], contiguous."""
    scale: Tensor
    """FP32 [..., ceil(N / 128), ceil(K / 128)]."""

    @cached_property
    def transposed(self) -> "Blocks":
        """[..., K, N], for the input's gradient: blocks stay blocks, so no value is rounded again."""
        return Blocks(*transpose_blocks(self.values, self.scale))

    def take(self, new: "Blocks") -> None:
        """Another weight's blocks in this one's memory, where recorded passes look for them."""
        self.values.copy_(new.values)
        self.scale.copy_(new.scale)
        if "transposed" in vars(self):
            self.transposed.take(new.transposed)


class BlockCache:
    """The newest copy of a weight, which may be several stacked along their outputs."""

    def __init__(self, quantizers: Quantizers) -> None:
        self.quantizers = quantizers
        self.key: tuple[tuple[int, int], ...] | None = None
        self.blocks: Blocks | None = None
        self.weights: Sequence[Tensor] = ()

    def refresh(self) -> None:
        """`of` the weights that it was asked for last."""
        if self.weights:
            self.of(self.weights)

    # A copy first made while a model is evaluated must be one that training may update.
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(self, weights: Sequence[Tensor]) -> Blocks:
        """Of FP32 or BF16 [..., N, K] as they are now: a new copy where one was written to since, or is another tensor."""
        key = tuple((each.data_ptr(), each._version) for each in weights)
        if self.blocks is None or key != self.key:
            stacked = weights[0] if len(weights) == 1 else torch.cat(tuple(weights), dim=-2)
            self.weights = weights
            self.key, blocks = key, Blocks(*self.quantizers.weight(stacked))
            if self.blocks is None or self.blocks.values.device != blocks.values.device:
                self.blocks = blocks
            else:
                self.blocks.take(blocks)
        return self.blocks
