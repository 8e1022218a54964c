"""Auxiliary-loss-free load balancing (report, section 2.1.2; Wang et al. 2024), and the figures of any balancing.

The auxiliary losses that it replaces (`training.balance`) are in `ops/router.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group

OVERLOADED = 2.0
"""Times the mean load, from which on an expert counts as overloaded."""


@torch.no_grad()
def update_biases(model: DeepSeekV3, load: dict[str, Tensor], speed: float, keep: Tensor | None = None) -> None:
    """Overloaded experts lose `speed` from their routing bias, underloaded ones gain it: `b += speed sign(mean - load)`.

    `load` (int [E] by block) is that of the whole batch: summed over micro-batches and data-parallel ranks. Every MoE
    block is updated, those of the MTP modules included; none where `keep`, a bool scalar of the device, is False.
    """
    for block in model.blocks():
        if block.moe is not None and block.name in load:
            counts = load[block.name].float()
            direction = (counts.mean() - counts).sign()
            direction = direction if keep is None else direction * keep
            block.moe.gate.e_score_correction_bias.add_(direction, alpha=speed)


def routing_biases(model: DeepSeekV3, load: dict[str, Tensor], pipeline: Group | None = None) -> dict[str, Tensor]:
    """The bias (FP32 [E]) of every block that has a load, on whatever rank of the pipeline it is."""
    found = {
        block.name: block.moe.gate.e_score_correction_bias
        for block in model.blocks()
        if block.moe is not None and block.name in load
    }
    if pipeline is None or pipeline.size == 1 or not load:
        return found
    # With the number of ranks that hold it, as DualPipe holds every block twice.
    absent = torch.zeros(next(iter(load.values())).numel() + 1, device=next(model.parameters()).device)
    rows = [torch.cat([found[name], absent.new_ones(1)]) if name in found else absent for name in load]
    summed = pipeline.sum_(torch.stack(rows))
    return dict(zip(load, summed[:, :-1] / summed[:, -1:], strict=True))


def balance_figures(load: Mapping[str, ArrayLike], bias: Mapping[str, ArrayLike]) -> dict[str, dict[str, Any]]:
    """How the experts of every block shared one batch, by figure and block name, from its load and bias (both [E], on the CPU).

    `max_vio`: (maximum load - mean load) / mean load (Wang et al. 2024, section 4), 0 in perfect balance. `bias_magnitude`: the
    largest absolute routing bias. `bias_drift`: the mean routing bias, a move of all together, which selects nothing.
    `dead_experts`: without a token. `overloaded_experts`: with more than `OVERLOADED` times the mean load.
    """
    counts, biases = (
        np.stack([np.asarray(each[name], np.float64) for name in load]) if load else np.zeros((0, 1))
        for each in (load, bias)
    )
    mean = counts.mean(1, keepdims=True).clip(1e-9)
    figures = {
        "max_vio": (counts / mean).max(1) - 1,
        "bias_magnitude": np.abs(biases).max(1),
        "bias_drift": biases.mean(1),
        "dead_experts": (counts == 0).sum(1),
        "overloaded_experts": (counts > OVERLOADED * mean).sum(1),
    }
    return {name: dict(zip(load, values.tolist(), strict=True)) for name, values in figures.items()}


def shares(counts: ArrayLike) -> list[float]:
    """Each expert's share of the assignments, to five digits."""
    found = np.asarray(counts, np.float64)
    return [round(each, 5) for each in (found / found.sum().clip(1e-9)).tolist()]
