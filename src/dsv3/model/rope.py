"""Rotary position embedding of adjacent pairs, with YaRN (report, section 4.3; Peng et al. 2023).

Legend: B sequences, T tokens, F frequencies, one for each pair of elements of the rotated part.
"""

import math

import torch
from torch import Tensor

from dsv3.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position for each pair of elements, FP32 [F]; the same at every sequence length, and on every device.

    Powers are taken in FP64, where a GPU's differ from a CPU's in digits that FP32 does not have.
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    if config.rope_scaling is None:
        return plain.float()
    low, high = correction_range(config.rope_scaling, dim, base)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device=device) - low) / (high - low)).clamp(0, 1)
    return (plain * (1 - ramp) + plain / config.rope_scaling.factor * ramp).float()


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


def rotations(config: ModelConfig, position_BT: Tensor) -> Tensor:
    """Those of one forward pass, computed once for all blocks: complex64 [B, T, F] for positions int [B, T], or [1, T, F] for [1, T].

    `dsv3.ops.rotary` applies them: each pair of elements is multiplied by its number.
    """
    factor = config.rope_scaling.rotation_factor if config.rope_scaling else 1.0
    angle_BTF = position_BT.unsqueeze(-1) * frequencies(config, position_BT.device)
    return torch.polar(torch.full(angle_BTF.shape, factor, device=angle_BTF.device), angle_BTF)
