"""Loss by position: does a model predict better, or worse, the further it is from the beginning of its context?

Texts are laid out as in pre-training: each between `bos` and `eos`, one after the other, cut into rows of `length + 1`
tokens without regard to where documents end. At a length the model was made for, loss falls with the position; beyond that
it rises at once.

Some text is harder than other text, by more than what context is worth to a small model. So rows overlap: each starts one
share of the length after the one before, and only tokens that lie in every share of some row are counted, once in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.mode import evaluating
from dsv3.model.transformer import DeepSeekV3

TOKENS_A_PASS = 1 << 13
"""Rows are read together up to so many tokens."""
LOGITS_A_PASS = 1 << 11
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class LossByPosition:
    """Mean loss of equal shares of the positions, in nats a token: `nats[k]` covers `edges[k]` to `edges[k + 1] - 1`."""

    edges: tuple[int, ...]
    nats: tuple[float, ...]
    rows: int


@torch.inference_mode()
def loss_by_position(
    model: DeepSeekV3, tokenizer: Tokenizer, texts: Sequence[str], *, length: int, shares: int = 8
) -> LossByPosition:
    """Scores as many overlapping rows as the texts would fill side by side, and at least two a share if there are so many.

    Raises `UserError` where the texts do not hold one row a share, or `length` is no multiple of `shares`.
    """
    if length % shares:
        raise UserError(f"loss by position over {length} tokens: expected a multiple of {shares}")
    ids = [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
    step = length // shares
    needed = length + (shares - 1) * step + 1
    if len(ids) < needed:
        raise UserError(
            f"loss by position over {length} tokens: the held-out texts have {len(ids)} tokens in all; expected at least "
            f"{needed}: take a shorter length or more text"
        )
    count = min((len(ids) - 1 - length) // step + 1, max((len(ids) - 1) // length, 2 * shares))
    rows = torch.tensor([ids[k * step : k * step + length + 1] for k in range(count)])
    losses_RS = torch.empty(count, shares, dtype=torch.float64)
    with evaluating(model) as device:
        a_pass = max(TOKENS_A_PASS // length, 1)
        for part, into in zip(rows.split(a_pass), losses_RS.split(a_pass), strict=True):
            tokens = part.to(device)
            hidden = model(tokens[:, :-1]).hidden.flatten(0, 1)
            target = tokens[:, 1:].flatten()
            losses = [
                F.cross_entropy(model.head(h).float(), t, reduction="none")
                for h, t in zip(hidden.split(LOGITS_A_PASS), target.split(LOGITS_A_PASS), strict=True)
            ]
            into.copy_(torch.cat(losses).view(len(part), shares, -1).double().mean(2))
    # Share k of row r holds the tokens that lie r + k steps into the text.
    everywhere = count - shares + 1
    nats = [float(losses_RS[shares - 1 - k :][:everywhere, k].mean()) for k in range(shares)]
    return LossByPosition(tuple(range(0, length + 1, step)), tuple(nats), count)
