"""Auxiliary-loss-free load balancing (report, section 2.1.2; Wang et al. 2024), and what one reads of any balancing.

The auxiliary losses that it replaces (`training.balance`) are in `ops/router.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model.transformer import DeepSeekV3


@torch.no_grad()
def update_biases(model: DeepSeekV3, load: dict[str, Tensor], speed: float) -> None:
    """Overloaded experts lose `speed` from their routing bias, underloaded ones gain it: `b += speed sign(mean - load)`.

    `load` (int [E] by block) is that of the whole batch: summed over micro-batches and data-parallel ranks. Every MoE
    block is updated, those of the MTP modules included.
    """
    for block in model.blocks():
        if block.moe is not None and block.name in load:
            counts = load[block.name].float()
            block.moe.gate.e_score_correction_bias.add_((counts.mean() - counts).sign(), alpha=speed)


def mean_by_block(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """f of a whole batch from those of its equal parts (FP32 [E] by MoE block)."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


@dataclass(frozen=True)
class BalanceFigures:
    """How one block's experts shared one batch."""

    max_vio: float
    """(maximum load - mean load) / mean load (Wang et al. 2024, section 4); 0 is perfect balance."""
    bias_magnitude: float
    """The largest absolute routing bias."""
    dead_experts: int
    """Experts without a token."""
    load: list[float]
    """Each expert's share of the assignments."""


def balance_figures(model: DeepSeekV3, load: dict[str, Tensor]) -> dict[str, BalanceFigures]:
    """The figures of every MoE block that has a load, by block name."""
    figures = {}
    for block in model.blocks():
        if block.moe is None or block.name not in load:
            continue
        counts = load[block.name].float()
        mean = counts.mean().clamp(min=1e-9)
        figures[block.name] = BalanceFigures(
            max_vio=float(counts.max() / mean - 1),
            bias_magnitude=float(block.moe.gate.e_score_correction_bias.abs().max()),
            dead_experts=int((counts == 0).sum()),
            load=(counts / counts.sum().clamp(min=1e-9)).tolist(),
        )
    return figures
