"""Token by token continuation of a batch of prompts through the latent cache.

Prompts are read in one pass in MLA's expanded form; each later pass reads one token a sequence in the absorbed form.
Legend: B sequences, V vocabulary.
"""

import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.inference.cache import LatentCache
from dsv3.inference.recording import Recording, pays
from dsv3.inference.sampling import SamplingParams, sample
from dsv3.model.transformer import DeepSeekV3

STEADY = 2
"""Passes of one batch after which it is likely to go on as it is."""


@dataclass(frozen=True)
class NewToken:
    """One step of one sequence."""

    sequence: int
    """Index of the prompt."""
    token: int
    last: bool
    """Whether the continuation ends here: at a stop token, which is `token`, or at max_tokens."""


@torch.inference_mode()
def generate(
    model: DeepSeekV3, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Generator[list[NewToken], set[int] | None, None]:
    """Yields, step by step, one token of every sequence that has not ended. `prompts` are token ids, none empty.

    A caller that wants a sequence to end earlier (at a stop text) sends its index back: `steps.send({3, 5})`.
    """
    check_prompts(prompts, model.config.vocab_size)
    if not prompts:
        return
    ends = {*params.stop_token_ids} if params.ignore_eos else {*params.stop_token_ids, model.config.eos_token_id}
    random = [torch.Generator().manual_seed(seed_of(params, i)) for i in range(len(prompts))]
    alive = list(range(len(prompts)))
    passes = Passes(model, prompts, params.max_tokens)
    logits = passes.first(prompts)
    for left in reversed(range(params.max_tokens)):
        chosen = choose(logits, params, [random[i] for i in alive])
        new = [NewToken(i, token, not left or token in ends) for i, token in zip(alive, chosen.tolist(), strict=True)]
        stopped = (yield new) or set()
        going = [k for k, each in enumerate(new) if not each.last and each.sequence not in stopped]
        if not going:
            return
        if len(going) < len(alive):
            alive, chosen = [alive[k] for k in going], chosen[going]
            passes.keep(going)
        logits = passes.next(chosen, left)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses what the model cannot read."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: give it at least one token, such as the beginning-of-sentence token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"prompt {i} holds tokens outside the vocabulary: expected 0 to {vocab_size - 1}")


def choose(logits_BV: Tensor, params: SamplingParams, random: Sequence[torch.Generator]) -> Tensor:
    """The next token of each sequence, drawn with its own random numbers: int64 [B]."""
    if params.temperature == 0:
        return logits_BV.float().argmax(-1)
    uniform = torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in random])
    return sample(logits_BV.float(), params, uniform.to(logits_BV.device))


class Passes:
    """The passes over one batch: the prompts in one, then one token a sequence, from a recording where that pays."""

    def __init__(self, model: DeepSeekV3, prompts: Sequence[Sequence[int]], max_tokens: int):
        self.model, self.device = model, model.lm_head.weight.device
        self.held = [len(prompt) for prompt in prompts]
        """Tokens that each sequence has in the cache; `position_B` is the same on the device."""
        self.position_B = torch.tensor(self.held, device=self.device)
        dtype = model.compute_dtype or model.lm_head.weight.dtype
        names, length = [layer.name for layer in model.layers], max(self.held) + max_tokens
        self.cache = LatentCache(model.config, names, len(prompts), length, dtype, self.device)
        self.recording: Recording | None = None
        self.steady = 0
        """Passes since a sequence ended."""

    def first(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, V] behind each prompt."""
        longest = max(self.held)
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand_as(tokens)
        hidden = self.model(tokens, positions=self.cache.begin(positions, longest), cache=self.cache).hidden
        return self.model.head(hidden[torch.arange(len(prompts), device=self.device), self.position_B - 1])

    def keep(self, going: list[int]) -> None:
        """Goes on with these rows of the batch alone."""
        rows = torch.tensor(going, device=self.device)
        self.cache.keep(rows)
        self.held, self.position_B = [self.held[k] for k in going], self.position_B[rows]
        self.recording, self.steady = None, 0

    def next(self, tokens_B: Tensor, left: int) -> Tensor:
        """The logits [B, V] behind one more token of each sequence; `left` passes are to come, this one included."""
        self.held = [count + 1 for count in self.held]
        end = max(self.held)
        self.steady += 1
        if self.recording is not None and end > self.recording.end:
            self.recording = None
        if self.recording is None and self.steady > STEADY and pays(self.model, len(self.held), left):
            self.recording = Recording(self.model, self.cache, tokens_B, self.position_B, end)
        if self.recording is not None:
            logits = self.recording(tokens_B, self.position_B)
        else:
            positions = self.cache.begin(self.position_B.unsqueeze(1), end)
            hidden = self.model(tokens_B.unsqueeze(1), positions=positions, cache=self.cache).hidden
            logits = self.model.head(hidden[:, 0])
        self.position_B = self.position_B + 1
        return logits


def seed_of(params: SamplingParams, sequence: int) -> int:
    """A sequence's own seed, from its number alone: what else is in the batch does not matter."""
    base = secrets.randbits(63) if params.seed is None else params.seed
    return (base + 0x9E3779B97F4A7C15 * sequence) % 2**63
