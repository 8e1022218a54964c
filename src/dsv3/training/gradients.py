"""The gradient of a whole batch, micro-batch by micro-batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.model.micro_batch import MicroBatch, targets
from dsv3.model.transformer import DeepSeekV3, Losses
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.group import Group
from dsv3.training.balance import mean_by_block
from dsv3.training.device import to_device


class Setting(NamedTuple):
    """What the passes of all micro-batches of a step share."""

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
    """FP32 scalar: see `DeepSeekV3.loss`."""


Passes = Callable[[DeepSeekV3, Inputs, Setting], tuple[Tensor, dict[str, Tensor]]]
"""Adds a micro-batch's gradients to the parameters'; its figures and load, as `batch_gradients` returns the batch's."""


Together = Callable[[DeepSeekV3, Sequence[MicroBatch]], tuple[Tensor, dict[str, Tensor]]]
"""The same of several micro-batches at once: their mean figures and summed load."""


def micro_batch(
    model: DeepSeekV3, inputs: Inputs, setting: Setting, frequency: Mapping[str, Tensor] | None = None
) -> MicroBatch:
    """The micro-batch as a network reads it."""
    return MicroBatch.of(
        model.config, inputs.tokens, valid=inputs.valid, positions=inputs.positions, segment_ids=inputs.segment_ids,
        divisor=inputs.divisor, frequency=frequency, **setting._asdict(),
    )  # fmt: skip


def forward(
    model: DeepSeekV3, inputs: Inputs, setting: Setting, frequency: Mapping[str, Tensor] | None = None
) -> Losses:
    """The losses of one micro-batch."""
    return model.losses(micro_batch(model, inputs, setting, frequency))


def passes(
    model: DeepSeekV3, inputs: Inputs, setting: Setting, frequency: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `Passes`. For the batch-wise balance loss of several micro-batches, `frequency` is the batch's."""
    losses = forward(model, inputs, setting, frequency)
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
    by block). `batch_wise`: see `DeepSeekV3.loss`. `run` makes a micro-batch's passes, or `together` those of all. With the ranks
    of `data`, the batch is all of theirs together: losses and load are its, and the sum of the ranks' gradients is its gradient.
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
        part = slice(start, start + micro)
        tokens, valid, positions = (
            to_device(each[part], device) for each in (batch.tokens, batch.valid, batch.positions)
        )
        return Inputs(
            tokens, valid, positions, None if segments is None else to_device(segments[part], device), divisor
        )

    starts = range(0, rows, micro)
    if together is not None:
        found = [together(model, [micro_batch(model, inputs(start), setting) for start in starts])]
    elif batch_wise and count > 1:
        # The first micro-batch's gradient needs the loads of the last one: they are counted in a pass of their own.
        with torch.no_grad():
            frequency = mean_by_block([forward(model, inputs(start), setting).frequency for start in starts])
            frequency = {name: data.sum_(each) / data.size for name, each in frequency.items()}
        found = [passes(model, inputs(start), setting, frequency) for start in starts]
    else:
        found = [run(model, inputs(start), setting) for start in starts]
    load = {name: data.sum_(torch.stack([each[name] for _, each in found]).sum(0)) for name in found[0][1]}
    return data.sum_(torch.stack([figures for figures, _ in found]).mean(0)) / data.size, load
