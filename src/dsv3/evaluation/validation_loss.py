"""Validation loss: nats a token on held-out shards of each source, packed into rows as in training."""

from collections.abc import Mapping

import torch

from dsv3.data.loader import Loader
from dsv3.data.packing import Packing
from dsv3.data.token_shards import ShardSet
from dsv3.evaluation.mode import evaluating
from dsv3.model.micro_batch import targets
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cross_entropy import IGNORE

BATCH_ROWS = 8


class ValidationLoss:
    """Called with a model, gives each source's mean cross-entropy, main model alone; the rows are the same at every call.

    `row` is T + 1; of each source as many rows as hold `tokens` targets are read, at least one.
    """

    def __init__(
        self,
        sets: Mapping[str, ShardSet],
        row: int,
        tokens: int,
        pad_id: int,
        document_mask: bool = False,
        packing: Packing = "best_fit",
    ) -> None:
        self._loaders = {
            name: Loader([(name, each, 1.0)], row, 0, pad_id, document_mask, packing) for name, each in sets.items()
        }
        self._most = max(tokens // (row - 1), 1)

    @torch.no_grad()
    def __call__(self, model: DeepSeekV3) -> dict[str, float]:
        """Source -> nats a token. The model runs in evaluation mode and is put back into its mode after."""
        with evaluating(model) as device:
            return {name: self._loss(model, loader, device) for name, loader in self._loaders.items()}

    def _loss(self, model: DeepSeekV3, loader: Loader, device: torch.device) -> float:
        nats, count = torch.zeros((), dtype=torch.float64, device=device), 0
        rows = min(self._most, loader.plans[0].rows)
        for first in range(0, rows, BATCH_ROWS):
            batch = loader.rows(first, min(BATCH_ROWS, rows - first))
            segments = batch.segment_ids if loader.document_mask else None
            losses = model.loss(
                batch.tokens.to(device),
                valid=batch.valid.to(device),
                positions=batch.positions.to(device),
                segment_ids=None if segments is None else segments.to(device),
                divisor=1.0,
            )
            nats += losses.main.double()
            count += int((targets(batch.tokens, 1, batch.valid, segments) != IGNORE).sum())
        return nats.item() / max(count, 1)
