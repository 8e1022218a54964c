"""What `metrics.jsonl` says of a step, from what the device measured and what the schedules asked for."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsv3.planning.flops import training_flops_per_token
from dsv3.recipe.schema import Recipe
from dsv3.training.balance import balance_figures, shares
from dsv3.training.device import device_name, peak_flops, peak_memory
from dsv3.training.health import Health
from dsv3.training.transfer import Transfer


@dataclass(frozen=True)
class Step:
    """A finished step, its figures still on their way to the host."""

    number: int
    """From 1."""
    tokens: int
    """All tokens up to its end."""
    first_row: int
    """Of its batch."""
    scheduled: dict[str, Any]
    transfer: Transfer


class Recorder:
    """Makes the records of one run."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.device, self.length = device, recipe.data.sequence_length
        self.every = recipe.training.load_every_steps
        self.flops = training_flops_per_token(recipe.model.config(), self.length)
        """A token, as DeepSeek counts them: causal, without the MTP modules."""
        peak = peak_flops(device_name(device))
        self.peak = None if peak is None else peak * recipe.parallel.ranks
        self.before = 0.0

    def record(self, step: Step, values: dict[str, np.ndarray], health: Health, seconds: float) -> dict[str, Any]:
        """One line. `seconds` is the training time up to now; what is not finite becomes None.

        Speeds are of the step itself, as a GPU's figures are read a step later. `mfu` is there where the device's peak is known.
        """
        groups = below(values, "norm ")
        norm = float(groups.pop("all"))
        loss, balance, *mtp = values["losses"].tolist()
        load = below(values, "load ")
        took = step.transfer.seconds() or seconds - self.before
        speed = step.scheduled["batch_size"] * self.length / max(took, 1e-9)
        self.before = seconds
        record = {
            "step": step.number, "tokens": step.tokens, "seconds": round(seconds, 3),
            "loss": number(loss), "mtp_losses": [number(each) for each in mtp], "balance_loss": number(balance),
            "grad_norm": number(norm), **step.scheduled, "tokens_per_second": speed,
            **balance_figures(load, below(values, "bias ")),
            "grad_norms": {group: number(float(each)) for group, each in groups.items()},
            **health.step(step.number, loss, norm, bool(values["skipped"])),
            "flops_per_second": speed * self.flops, "peak_memory": peak_memory(self.device),
        }  # fmt: skip
        if self.peak is not None:
            record["mfu"] = speed * self.flops / self.peak
        if step.number % self.every == 0:
            record["load"] = {name: shares(each) for name, each in load.items()}
        return record


def below(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The values whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): each for name, each in values.items() if name.startswith(prefix)}


def number(value: float) -> float | None:
    """JSON knows finite numbers only."""
    return value if math.isfinite(value) else None
