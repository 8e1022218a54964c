"""The gradient of a whole batch, micro-batch by micro-batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.model.micro_batch import MicroBatch, targets
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.group import Group
from dsv3.training.device import to_device


class Setting(NamedTuple):
    """What all micro-batches of a step share; see `MicroBatch.of`."""

    mtp_weight: float
    balance_alpha: float
    batch_wise: bool
    scale: float


class Inputs(NamedTuple):
    """A micro-batch on the model's device."""

    tokens: Tensor
    valid: Tensor
    positions: Tensor
    segment_ids: Tensor | None
    divisor: Tensor
    """FP32 scalar."""


Passes = Callable[[DeepSeekV3, Inputs, Setting], tuple[Tensor, dict[str, Tensor]]]
"""Adds a micro-batch's gradients to the parameters'; its losses and load, as `batch_gradients` returns the batch's."""
Together = Callable[[DeepSeekV3, Sequence[MicroBatch]], tuple[Tensor, dict[str, Tensor]]]
"""The same of several micro-batches at once: their mean losses and summed load."""


def micro_batch(
    model: DeepSeekV3, inputs: Inputs, setting: Setting, frequency: Mapping[str, Tensor] | None = None
) -> MicroBatch:
    """The micro-batch as a network reads it."""
    return MicroBatch.of(model.config, **inputs._asdict(), **setting._asdict(), frequency=frequency)


def passes(
    model: DeepSeekV3, inputs: Inputs, setting: Setting, frequency: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `Passes`. For the batch-wise balance loss of several micro-batches, `frequency` is the batch's."""
    losses = model.losses(micro_batch(model, inputs, setting, frequency))
    losses.total.backward()
    return torch.stack([losses.main, losses.balance, *losses.mtp]).detach(), losses.load


def batch_gradients(
    model: DeepSeekV3,
    batch: Batch,
    micro_batch_size: int | None = None,
    *,
    document_mask: bool = False,
    mtp_weight: float = 0.0,
    balance_alpha: float = 0.0,
    batch_wise: bool = False,
    run: Passes = passes,
    data: Group | None = None,
    together: Together | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulates the batch's gradients in the parameters; waits for no GPU.

    Returns its losses (FP32 [2 + MTP depth]: the main one, the balance loss without alpha, MTP's) and its load (int64 [E]
    by block). `batch_wise`: see `MicroBatch.of`. `run` computes one micro-batch's gradients; `together`, if given, those of all.
    With several ranks in `data`, the batch is that of all ranks: so are losses and load, and its gradient is the sum of theirs.
    """
    data = data or Group("data")
    rows, device = len(batch.tokens), next(model.parameters()).device
    micro = micro_batch_size or rows
    count = rows // micro * data.size
    segments = batch.segment_ids if document_mask else None
    target_count = data.sum_((targets(batch.tokens, 1, batch.valid, segments) != IGNORE).sum())
    divisor = to_device(target_count.float() / count, device)
    setting = Setting(mtp_weight, balance_alpha, batch_wise, 1 / count)

    def inputs(start: int) -> Inputs:
        def part(each: Tensor) -> Tensor:
            return to_device(each[start : start + micro], device)

        documents = None if segments is None else part(segments)
        return Inputs(part(batch.tokens), part(batch.valid), part(batch.positions), documents, divisor)

    starts = range(0, rows, micro)
    if together is not None:
        found = [together(model, [micro_batch(model, inputs(start), setting) for start in starts])]
    elif batch_wise and count > 1:
        # The first micro-batch's gradient needs the loads of the last one: they are counted in a pass of their own.
        with torch.no_grad():
            parts = [model.losses(micro_batch(model, inputs(start), setting)).frequency for start in starts]
            means = {name: torch.stack([each[name] for each in parts]).mean(0) for name in parts[0]}
            frequency = {name: data.sum_(each) / data.size for name, each in means.items()}
        found = [passes(model, inputs(start), setting, frequency) for start in starts]
    else:
        found = [run(model, inputs(start), setting) for start in starts]
    load = {name: data.sum_(torch.stack([each[name] for _, each in found]).sum(0)) for name in found[0][1]}
    return data.sum_(torch.stack([figures for figures, _ in found]).mean(0)) / data.size, load
