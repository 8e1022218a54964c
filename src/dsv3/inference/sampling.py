"""From logits to tokens: temperature and nucleus, each sequence with random numbers of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names and meanings as vLLM's users expect."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sampling is among the fewest most likely tokens whose probabilities reach this sum."""
    max_tokens: int = 128
    stop: Sequence[str] = ()
    """Texts (or one text) that end the continuation; they are not part of it."""
    seed: int | None = None
    """Repeats the continuations of a batch, each whatever the other prompts are; None draws new ones each time."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the continuation, beside the end-of-sentence token."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature = {self.temperature}: expected 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected more than 0 and at most 1")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens = {self.max_tokens}: expected 1 or more")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if "" in self.stop:
            raise UserError("stop holds an empty text, which would end every continuation at once: leave it out")


def sample(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor) -> Tensor:
    """One token a row: int64 [B]. `uniform_B` (FP64, in [0, 1)) decides each row's draw, by inverting the cumulative sum."""
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    # Differences from the largest, which no temperature above 0 makes infinite all together.
    difference_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
    probability_BV = (difference_BV / params.temperature).softmax(-1)
    probability, token = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
    cumulative = probability.cumsum(-1)
    # A token stays while those before it have not reached top_p; the first always stays.
    kept = torch.where(cumulative - probability < params.top_p, probability, 0.0).cumsum(-1)
    chosen = (kept <= uniform_B.unsqueeze(-1) * kept[:, -1:]).sum(-1, keepdim=True).clamp(max=kept.shape[1] - 1)
    return token.gather(-1, chosen).squeeze(-1)
