"""Token by token continuation of a batch of prompts through the latent cache.

Prompts are read in one pass in MLA's expanded form; each later pass reads one token a sequence in the absorbed form.
"""

import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

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
    if not prompts:
        return
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: give it at least one token, such as the beginning-of-sentence token")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise UserError(
                f"prompt {i} holds tokens outside the vocabulary: expected 0 to {model.config.vocab_size - 1}"
            )
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    length = longest + params.max_tokens
    dtype = model.compute_dtype or model.lm_head.weight.dtype
    cache = LatentCache(model.config, [layer.name for layer in model.layers], len(prompts), length, dtype, device)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device).expand_as(tokens)
    hidden = model(tokens, positions=cache.begin(positions, longest), cache=cache).hidden
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    random = [torch.Generator().manual_seed(seed_of(params, i)) for i in range(len(prompts))]
    ends = {*params.stop_token_ids} if params.ignore_eos else {*params.stop_token_ids, model.config.eos_token_id}
    alive = list(range(len(prompts)))
    logits = model.head(hidden)
    recording: Recording | None = None
    steady = 0
    for step in range(params.max_tokens):
        logits = logits.float()
        if params.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            uniform = torch.stack([torch.rand((), generator=random[i], dtype=torch.float64) for i in alive]).to(device)
            chosen = sample(logits, params, uniform)
        last = step == params.max_tokens - 1
        new = [NewToken(i, token, last or token in ends) for i, token in zip(alive, chosen.tolist(), strict=True)]
        stopped = (yield new) or set()
        going = [k for k, each in enumerate(new) if not each.last and each.sequence not in stopped]
        if not going:
            return
        if len(going) < len(alive):
            rows = torch.tensor(going, device=device)
            cache.keep(rows)
            alive, chosen, lengths = [alive[k] for k in going], chosen[rows], lengths[rows]
            recording, steady = None, 0
        end = max(len(prompts[i]) for i in alive) + step + 1
        steady += 1
        if recording is not None and end > recording.end:
            recording = None
        if recording is None and steady > STEADY and pays(model, len(alive), params.max_tokens - step):
            recording = Recording(model, cache, chosen, lengths, end)
        if recording is not None:
            logits = recording(chosen, lengths)
        else:
            positions = cache.begin(lengths.unsqueeze(1), end)
            logits = model.head(model(chosen.unsqueeze(1), positions=positions, cache=cache).hidden[:, 0])
        lengths = lengths + 1


def seed_of(params: SamplingParams, sequence: int) -> int:
    """A sequence's own seed, from its number alone: what else is in the batch does not matter."""
    base = secrets.randbits(63) if params.seed is None else params.seed
    return (base + 0x9E3779B97F4A7C15 * sequence) % 2**63
