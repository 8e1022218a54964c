"""Rows of tokens as a training pass reads them: inputs, targets, and the blocks' arguments.

Legend: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.block import Pass
from dsv3.model.config import ModelConfig
from dsv3.model.rope import rotations
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy


@dataclass(frozen=True)
class MicroBatch:
    """Rows of T + 1 tokens: T are read, T predicted."""

    tokens: Tensor
    """int [B, T + 1]."""
    shared: Pass
    """The arguments of the main model's blocks."""
    valid: Tensor | None
    segment_ids: Tensor | None
    mtp_weight: float
    scale: float
    divisor: float | Tensor
    """See `of`."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mtp_weight: float = 0.0,
        balance_alpha: float = 0.0,
        batch_wise: bool = False,
        frequency: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        divisor: float | Tensor | None = None,
    ) -> "MicroBatch":
        """From rows of T + 1 tokens (int [B, T + 1]).

        `valid` (bool [B, T + 1]) excludes tokens as targets, for instance padding; with `segment_ids` (int [B, T + 1])
        the first token of a document is no target either. `divisor` is the number of targets that the main loss is
        divided by, this micro-batch's own by default; equation (24) divides every MTP loss by the same. `scale`
        multiplies all gradients, the balance loss's too: with gradient accumulation, one over the number of
        micro-batches, and `divisor` the whole batch's targets divided by that number. `mtp_weight` is lambda (0 leaves
        the MTP modules out). `balance_alpha` is alpha, of the sequence-wise balance loss, or of the batch-wise one
        (section 4.5.3), whose f and P are taken over all tokens together. For one micro-batch of several, `frequency` holds
        f of the whole batch (the mean of all `Losses.frequency`): then the micro-batches' gradients and losses are exactly
        the whole batch's. Raises `UserError` for rows too short for the deepest MTP module.
        """
        depth, length = config.num_nextn_predict_layers, tokens.shape[1] - 1
        if mtp_weight > 0 and length <= depth:
            raise UserError(f"rows of {tokens.shape[1]} tokens: MTP depth {depth} needs at least {depth + 2}")
        positions = default_positions(tokens[:, :-1]) if positions is None else positions[:, :-1]
        segments = None if segment_ids is None else segment_ids[:, :-1]
        if divisor is None:
            divisor = float((targets(tokens, 1, valid, segment_ids) != IGNORE).sum().clamp(min=1))
        shared = Pass(
            rotations(config, positions), segments, None, balance_alpha * scale, batch_wise, frequency or {}
        )  # fmt: skip
        return cls(tokens, shared, valid, segment_ids, mtp_weight, scale, divisor)

    @property
    def inputs(self) -> Tensor:
        """int [B, T]."""
        return self.tokens[:, :-1]

    def shorter(self, ahead: int) -> Pass:
        """`shared` for the MTP module that reads tokens `ahead` of the main model's, without the last `ahead` positions."""
        length, segments = self.tokens.shape[1] - 1 - ahead, self.shared.segment_ids
        segments = None if segments is None else segments[:, :length]
        return replace(self.shared, rope=self.shared.rope[:, :length], segment_ids=segments)

    def loss(self, hidden: Tensor, head: Tensor, ahead: int) -> Tensor:
        """Cross-entropy of the tokens `ahead`, nats, from normed states [B, T + 1 - ahead, D] and the head's weight [V, D]."""
        target = targets(self.tokens, ahead, self.valid, self.segment_ids)
        return linear_cross_entropy(hidden.flatten(0, 1), head, target.flatten(), self.divisor)


def default_positions(tokens: Tensor) -> Tensor:
    """0 .. T-1 for every row: int [1, T], which broadcasts."""
    return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)


def targets(tokens: Tensor, ahead: int, valid: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The tokens `ahead` of each input position, `IGNORE` where they do not count. [B, T + 1 - ahead]"""
    target = tokens[:, ahead:]
    if valid is not None:
        target = target.masked_fill(~valid[:, ahead:], IGNORE)
    if segment_ids is not None:
        target = target.masked_fill(segment_ids[:, ahead:] != segment_ids[:, :-ahead], IGNORE)
    return target
