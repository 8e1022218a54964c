"""Rotary position embedding of adjacent pairs, with YaRN (report, section 4.3; Peng et al. 2023).

Legend: B sequences, T tokens, H heads, R elements of the rotated part, F = R / 2 frequencies.
"""

import math

import torch
from torch import Tensor

from dsv3.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair of elements, FP32 [F]; the same at every sequence length."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.rope_scaling is None:
        return plain
    low, high = correction_range(config.rope_scaling, dim, base)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - ramp) + plain / config.rope_scaling.factor * ramp


def correction_range(scaling: RopeScaling, dim: int, base: float) -> tuple[float, float]:
    """Pairs up to the first number keep their frequency, pairs from the second on are divided by the factor."""

    def pair_with(rotations: float) -> float:
        """The pair that makes so many rotations over the original length."""
        return (
            dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))
        )

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    return low, high if high > low else low + 0.001


class Rope:
    """cos and sin of the positions of one forward pass, computed once for all blocks."""

    def __init__(self, config: ModelConfig, position_BT: Tensor):
        factor = config.rope_scaling.rotation_factor if config.rope_scaling else 1.0
        angle_BTF = position_BT.unsqueeze(-1).float() * frequencies(config).to(position_BT.device)
        self.cos, self.sin = angle_BTF.cos() * factor, angle_BTF.sin() * factor

    def __getitem__(self, tokens: slice) -> "Rope":
        """The rope of some of the tokens."""
        part = object.__new__(Rope)
        part.cos, part.sin = self.cos[:, tokens], self.sin[:, tokens]
        return part

    def rotate(self, x_BTHR: Tensor) -> Tensor:
        """Turns the pairs (0, 1), (2, 3), ... by the angle of their token: the released weights' interleaved layout."""
        cos, sin = self.cos.unsqueeze(2), self.sin.unsqueeze(2)
        even, odd = x_BTHR[..., 0::2].float(), x_BTHR[..., 1::2].float()
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return turned.flatten(-2).to(x_BTHR.dtype)
