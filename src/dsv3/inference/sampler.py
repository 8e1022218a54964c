"""From logits to tokens, each drawn with a random number that depends on seed and position alone, not on the batch.

A draft is accepted when it is the token that would have been chosen without it. As drafts are deterministic, each is accepted
with its own probability, and the distribution of the others stays as it is: this is rejection sampling (Leviathan et al.
2023), and a seed gives the same tokens with and without drafts.

Legend: N choices, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.inference.plan import Choice, Sampling, TokenLogprobs

Place = tuple[Choice, int, Sequence[int]]
"""(how to choose, number of drafts before this choice, all drafts)."""


def uniform(seed: int, step: int) -> float:
    """In [0, 1): splitmix64 of the pair, so that every draw is independent of all others."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float((z ^ (z >> 31)) >> 11) / 2**53


def choose(logits_NV: Tensor, places: Sequence[Place]) -> Tensor:
    """int64 [N]: the token of each choice; -1 where its logits are not finite. `logits_NV` is not changed."""
    finite = logits_NV.sum(-1, dtype=torch.float32).isfinite()
    logits_NV = adjusted(logits_NV, places)
    tokens = logits_NV.max(-1).indices  # on a CPU in a third of argmax's time
    rows = [n for n, (choice, _, _) in enumerate(places) if choice.sampling.temperature > 0]
    if rows:
        at = slice(None) if len(rows) == len(places) else torch.tensor(rows, device=logits_NV.device)
        tokens[at] = draw(logits_NV[at], [places[n] for n in rows])
    return torch.where(finite, tokens, -1)


def adjusted(logits_NV: Tensor, places: Sequence[Place]) -> Tensor:
    """Logits in FP32 after penalties, biases, bans and grammars."""
    logits_NV = logits_NV.float()
    copied = False
    for n, (choice, offset, drafts) in enumerate(places):
        sampling = choice.sampling
        banned = sampling.banned if choice.step + offset < sampling.banned_until else []
        if not (sampling.prompt or sampling.bias or banned or choice.masks):
            continue
        if not copied:
            logits_NV, copied = logits_NV.clone(), True
        row = logits_NV[n]
        if sampling.prompt:
            penalise(row, sampling, [*choice.output, *drafts[:offset]])
        for token, value in sampling.bias:
            row[token] += value
        if choice.masks:
            row.masked_fill_(~allowed(choice.masks[offset], len(row), row.device), float("-inf"))
        if banned:
            row[torch.tensor(banned, device=row.device)] = float("-inf")
    return logits_NV


def penalise(row_V: Tensor, sampling: Sampling, output: Sequence[int]) -> None:
    """In place: repetition penalty for tokens of prompt and continuation, the others for the continuation's alone."""
    seen = torch.tensor(sorted({*sampling.prompt, *output}), device=row_V.device)
    values, factor = row_V[seen], sampling.repetition_penalty
    row_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if output:
        counts = Counter(output)
        tokens = torch.tensor(list(counts), device=row_V.device)
        times = torch.tensor(list(counts.values()), dtype=row_V.dtype, device=row_V.device)
        row_V[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times


def allowed(words: Sequence[int], size: int, device: torch.device) -> Tensor:
    """bool [V] from a mask of 32 tokens a word."""
    bits = torch.tensor(words, dtype=torch.int64, device=device).unsqueeze(1) >> torch.arange(32, device=device)
    return (bits & 1).bool().flatten()[:size]


def draw(logits_NV: Tensor, places: Sequence[Place]) -> Tensor:
    """int64 [N]: sampled from the kept probabilities by inverting their cumulative sum in order of token ids."""
    each = [choice.sampling for choice, _, _ in places]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_NV.device).unsqueeze(1)

    # Differences from the largest logit: no temperature above 0 makes all of them infinite.
    difference_NV = logits_NV.double() - logits_NV.double().amax(-1, keepdim=True)
    probability_NV = (difference_NV / column([sampling.temperature for sampling in each])).softmax(-1)
    if any(sampling.top_p < 1 or sampling.top_k for sampling in each):
        sorted_NV, token_NV = torch.sort(probability_NV, dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached top_p; the first always stays.
        size = logits_NV.shape[1]
        last = column([sampling.top_k or size for sampling in each])
        out_NV = sorted_NV.cumsum(-1) - sorted_NV >= column([sampling.top_p for sampling in each])
        out_NV |= torch.arange(size, device=logits_NV.device) >= last
        out_NV[:, 0] = False
        sorted_NV.masked_fill_(out_NV, 0.0)
        probability_NV = torch.zeros_like(probability_NV).scatter_(1, token_NV, sorted_NV)
    if any(sampling.min_p for sampling in each):
        least = probability_NV.amax(-1, keepdim=True) * column([sampling.min_p for sampling in each])
        probability_NV = probability_NV.masked_fill(probability_NV < least, 0.0)
    cumulative_NV = probability_NV.cumsum(-1)
    number = column([uniform(choice.sampling.seed, choice.step + offset) for choice, offset, _ in places])
    chosen = (cumulative_NV <= number * cumulative_NV[:, -1:]).sum(-1)
    # Rounding must not lead past the last token kept.
    kept = torch.arange(probability_NV.shape[1], device=chosen.device) * (probability_NV > 0)
    return torch.minimum(chosen, kept.amax(-1))


def logprobs(logits_NV: Tensor, tokens: Sequence[int], wanted: int) -> list[TokenLogprobs]:
    """Of each token under its row of logits, with so many of the likeliest tokens."""
    if not tokens:
        return []
    log_NV = logits_NV.float().log_softmax(-1)
    own_N1 = log_NV.gather(1, torch.tensor(tokens, device=log_NV.device).unsqueeze(1))
    rank = (log_NV > own_N1).sum(-1) + 1
    values, top = log_NV.topk(min(wanted, log_NV.shape[1]), dim=-1)
    rows = zip(tokens, own_N1[:, 0].tolist(), rank.tolist(), top.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, own, place, dict(zip(ids, logs, strict=True))) for token, own, place, ids, logs in rows
    ]
