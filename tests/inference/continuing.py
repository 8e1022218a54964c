"""Prompts through engines of all sizes, and what a full forward pass without a cache says to them."""

import random

import torch

from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.params import SamplingParams

CLOSE = 1e-4
"""Between the two highest logits: below it, the order of additions may decide."""


def random_prompts(count, longest, vocab_size=320, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def drive(engine, prompts, params, **options):
    """All deltas of each prompt, joined by index: {(prompt, index): [deltas]}."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    deltas = {}
    for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
        engine.add(str(number), prompt, own, **options)
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault((int(delta.request_id), delta.index), []).append(delta)
    return deltas


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.token_ids]


def continued(model, prompts, params, tokenizer=None, **sizes):
    """(tokens of each prompt's first continuation, the engine, which has everything back)."""
    engine = Engine(model, tokenizer, EngineConfig(**{"num_blocks": 64, **sizes}))
    deltas = drive(engine, prompts, params)
    pool = engine.scheduler.pool
    assert len(pool.free) == len(pool.blocks)
    assert not any(block.users for block in pool.blocks)
    return [tokens_of(deltas[number, 0]) for number in range(len(prompts))], engine


@torch.inference_mode()
def greedy(model, prompt, count):
    """By full forward passes: (tokens, how far the highest logit is from the next at each)."""
    tokens, gaps = list(prompt), []
    for _ in range(count):
        top = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
    return tokens[len(prompt) :], gaps


def assert_greedy(model, prompts, found):
    """Each is the greedy continuation, up to a choice that is too close; hardly any may be."""
    stopped = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        expected, gaps = greedy(model, prompt, len(tokens))
        clear = next((k for k, gap in enumerate(gaps) if gap < CLOSE), len(gaps))
        stopped += clear < len(gaps)
        assert tokens[:clear] == expected[:clear]
    assert stopped <= max(len(prompts) // 100, 1)


GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPT = [3, 14, 15, 92, 65]
