"""The gradient of a whole batch, micro-batch by micro-batch."""

import torch
from torch import Tensor

from dsv3.data.loader import Batch
from dsv3.model.transformer import DeepSeekV3, Losses, targets
from dsv3.ops.cross_entropy import IGNORE
from dsv3.training.balance import mean_by_block
from dsv3.training.device import to_device


def batch_gradients(
    model: DeepSeekV3,
    batch: Batch,
    micro_batch_size: int | None = None,
    *,
    document_mask: bool = False,
    mtp_weight: float = 0.0,
    balance_alpha: float = 0.0,
    batch_wise: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulates the batch's gradients in the parameters; waits for no GPU.

    Returns its losses (FP32 [2 + MTP depth]: the main one, the balance loss without alpha, MTP's) and its load (int64 [E]
    by block). `batch_wise`: see `DeepSeekV3.loss`.
    """
    rows, device = len(batch.tokens), model.lm_head.weight.device
    micro = micro_batch_size or rows
    count = rows // micro
    segments = batch.segment_ids if document_mask else None
    divisor = float((targets(batch.tokens, 1, batch.valid, segments) != IGNORE).sum()) / count

    def forward(start: int, frequency: dict[str, Tensor]) -> Losses:
        part = slice(start, start + micro)
        return model.loss(
            to_device(batch.tokens[part], device),
            valid=to_device(batch.valid[part], device),
            positions=to_device(batch.positions[part], device),
            segment_ids=None if segments is None else to_device(segments[part], device),
            mtp_weight=mtp_weight,
            balance_alpha=balance_alpha,
            batch_wise=batch_wise,
            frequency=frequency,
            scale=1 / count,
            divisor=divisor,
        )

    starts, frequency = range(0, rows, micro), dict[str, Tensor]()
    if batch_wise and count > 1:
        # The first micro-batch's gradient needs the loads of the last one: they are counted in a pass of their own.
        with torch.no_grad():
            frequency = mean_by_block([forward(start, {}).frequency for start in starts])
    figures, load = [], dict[str, Tensor]()
    for start in starts:
        losses = forward(start, frequency)
        losses.total.backward()
        figures.append(torch.stack([losses.main, losses.balance, *losses.mtp]))
        for name, each in losses.load.items():
            load[name] = load[name] + each if name in load else each
    return torch.stack(figures).mean(0), load
