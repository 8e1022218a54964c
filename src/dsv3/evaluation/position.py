"""Loss by position: does a model predict better, or worse, the further it is from the beginning of its context?

Texts are laid out as pre-training has them: each between `bos` and `eos`, one after the other, cut into rows of
`length + 1` tokens without regard to where documents end. At a length the model was made for, loss falls with the
position; beyond that it rises at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from dsv3.errors import UserError
from dsv3.evaluation.bits_per_byte import Encoder
from dsv3.model.transformer import DeepSeekV3

TOKENS_A_PASS = 1 << 13
"""Rows are read together up to so many tokens, and logits made for as many rows of the head at a time."""
LOGITS_A_PASS = 1 << 11


class Framer(Encoder, Protocol):
    """What is needed of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        ...


@dataclass(frozen=True)
class LossByPosition:
    """Mean loss of equal shares of the positions, in nats a token: `nats[k]` covers `edges[k]` to `edges[k + 1] - 1`."""

    edges: tuple[int, ...]
    nats: tuple[float, ...]
    rows: int

    def between(self, first: int, end: int) -> float:
        """Mean loss over the shares that lie in `first` to `end - 1`; both are edges."""
        chosen = slice(self.edges.index(first), self.edges.index(end))
        return sum(self.nats[chosen]) / len(self.nats[chosen])


@torch.inference_mode()
def loss_by_position(
    model: DeepSeekV3,
    tokenizer: Framer,
    texts: Sequence[str],
    *,
    length: int,
    shares: int = 8,
    device: torch.device | str = "cpu",
) -> LossByPosition:
    """Scores as many whole rows as the texts fill. Raises `UserError` where that is none, or `length` no multiple of `shares`."""
    if length % shares:
        raise UserError(f"loss by position over {length} tokens: expected a multiple of {shares}")
    ids = [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
    count = (len(ids) - 1) // length
    if count == 0:
        raise UserError(
            f"loss by position over {length} tokens: the held-out texts have {len(ids)} tokens in all; expected at least "
            f"{length + 1}: take a shorter length or more text"
        )
    # As in training, every token is a target once: rows share their last and first token.
    rows = torch.tensor([ids[k * length : (k + 1) * length + 1] for k in range(count)])
    was_training = model.training
    model.eval()
    sums = torch.zeros(length, dtype=torch.float64)
    try:
        for part in rows.split(max(TOKENS_A_PASS // length, 1)):
            tokens = part.to(device)
            hidden = model(tokens[:, :-1]).hidden.flatten(0, 1)
            target = tokens[:, 1:].flatten()
            losses = [
                F.cross_entropy(model.head(h).float(), t, reduction="none")
                for h, t in zip(hidden.split(LOGITS_A_PASS), target.split(LOGITS_A_PASS), strict=True)
            ]
            sums += torch.cat(losses).view(len(part), length).double().sum(0).cpu()
    finally:
        model.train(was_training)
    nats = (sums / count).view(shares, -1).mean(1).tolist()
    return LossByPosition(tuple(range(0, length + 1, length // shares)), tuple(nats), count)
