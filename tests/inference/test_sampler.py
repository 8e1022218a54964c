import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.inference.engine import Engine, EngineConfig
from dsv3.inference.params import SamplingParams
from dsv3.inference.plan import Choice, Sampling
from dsv3.inference.sampler import adjusted, choose, logprobs, uniform
from tests.inference.continuing import PROMPT, drive, tokens_of

PLAIN = Choice(Sampling(seed=0, temperature=1.0), drafts=0, step=0)


def plain(**changes):
    """`PLAIN` with other fields of its own or of its `sampling`."""
    own = {name: changes.pop(name) for name in ("drafts", "step", "output", "masks") if name in changes}
    return replace(PLAIN, sampling=replace(PLAIN.sampling, **changes), **own)


def by_the_definition(logits, choice, number):
    """A plain loop: which tokens are kept, and the cumulative sum that passes the random number."""
    top = max(logits)
    weights = [math.exp((logit - top) / choice.sampling.temperature) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    kept, reached = set(), 0.0
    for token in order[: choice.sampling.top_k or None]:
        if reached >= choice.sampling.top_p:
            break
        kept.add(token)
        reached += probabilities[token]
    kept = [token for token in sorted(kept) if probabilities[token] >= choice.sampling.min_p * max(probabilities)]
    total, passed = sum(probabilities[token] for token in kept), 0.0
    for token in kept:
        passed += probabilities[token]
        if passed > number * total:
            return token
    return kept[-1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12, unique=True),
    st.builds(
        plain, step=st.integers(0, 9), seed=st.integers(0, 2**63), temperature=st.floats(0.2, 3.0),
        top_p=st.floats(0.05, 1.0), top_k=st.integers(0, 12), min_p=st.sampled_from([0.0, 0.03, 0.2]),
    ),
)  # fmt: skip
def test_a_draw_is_a_plain_loops(logits, choice):
    [found] = choose(torch.tensor([logits]), [(choice, 0, [])]).tolist()
    number = uniform(choice.sampling.seed, choice.step)
    assert found in {by_the_definition(logits, choice, min(max(number + e, 0), 1)) for e in (-1e-9, 0, 1e-9)}


def test_random_numbers_depend_on_seed_and_step_and_are_even():
    numbers = [uniform(seed, step) for seed in range(40) for step in range(250)]
    assert len(set(numbers)) == len(numbers)
    counts = torch.histc(torch.tensor(numbers), 20, 0, 1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 43.8  # 99.9% of chi-square with 19 degrees of freedom
    pairs = torch.tensor(numbers).view(40, 250)
    assert abs(float(torch.corrcoef(torch.stack((pairs[:, :-1].flatten(), pairs[:, 1:].flatten())))[0, 1])) < 0.04


def test_rows_are_drawn_alone():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    choices = [
        PLAIN,
        plain(temperature=0.0),
        plain(top_p=0.3, step=4),
        plain(top_k=2, seed=9),
        plain(bias=[(3, 50.0)], banned=[7], banned_until=1),
    ]
    places = [(choice, 0, []) for choice in choices]
    before = logits.clone()
    together = choose(logits, places).tolist()
    assert together == [int(choose(logits[k : k + 1], [place])) for k, place in enumerate(places)]
    assert torch.equal(logits, before)
    assert (together[1], together[4]) == (int(logits[1].argmax()), 3)


def test_tiny_temperatures_come_to_the_largest_and_what_is_not_finite_is_told():
    logits = torch.tensor([[0.0, 3.0, 2.999, -1.0], [math.nan, 1.0, 2.0, 3.0], [math.inf, 0.0, 0.0, 0.0]])
    for temperature in (0.0, 1e-6, 1e-300, 5e-324):
        places = [(plain(temperature=temperature), 0, [])] * 3
        assert choose(logits, places).tolist() == [1, -1, -1]


def test_penalties_count_drafts_that_come_before():
    choice = plain(
        prompt=[0, 1],
        output=[1, 2],
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        drafts=2,
    )
    logits = torch.tensor([[4.0, -4.0, 4.0, 4.0, 4.0]])
    expected = [[2.0, -8.75, 1.25, 4.0, 4.0], [2.0, -8.75, 1.25, 1.25, 4.0], [2.0, -8.75, 1.25, 1.0, 4.0]]
    for offset in range(3):
        found = adjusted(logits, [(choice, offset, [3, 3])])
        torch.testing.assert_close(found, torch.tensor([expected[offset]]))


def test_masks_and_bans_end_where_they_should():
    words = [0b1010, 0], [0, 1]
    choice = plain(temperature=0.0, masks=[list(each) for each in words], drafts=1)
    logits = torch.arange(64.0).flip(0).unsqueeze(0)
    assert [choose(logits, [(choice, offset, [1])])[0] for offset in (0, 1)] == [1, 32]
    banned = plain(temperature=0.0, banned=[0], step=3, banned_until=5)
    assert [choose(logits, [(banned, offset, [])])[0] for offset in range(3)] == [1, 1, 0]


def test_logprobs_and_ranks():
    row = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    [found] = logprobs(row, [2], 2)
    log = row.log_softmax(-1)[0]
    assert (found.token_id, found.rank, list(found.top)) == (2, 2, [1, 2])
    assert [found.logprob, *found.top.values()] == pytest.approx([float(log[2]), float(log[1]), float(log[2])])
    assert logprobs(row, [1], 0)[0].top == {}


@pytest.mark.parametrize("drafts", [0, 2])
def test_continuations_follow_the_models_distribution(drafting_model, drafts):
    """Chi-square of the first three tokens after one prompt, against the exact distribution along the way.

    The probability of each token given those before it is computed by full passes; drawn tokens are mapped to eighths of
    that distribution, so that all places add up to one test with 7 degrees of freedom; 24.3 is its 99.9% point.
    """
    engine = Engine(drafting_model, None, EngineConfig(num_blocks=600, num_speculative_tokens=drafts))
    params = SamplingParams(n=400, max_tokens=3, temperature=0.8, ignore_eos=True, seed=5)
    deltas = drive(engine, [PROMPT], params)
    tokens = torch.tensor([PROMPT + tokens_of(own) for own in deltas.values()])
    with torch.inference_mode():
        probability = (drafting_model(tokens).logits[:, len(PROMPT) - 1 : -1] / 0.8).double().softmax(-1)
    chosen = tokens[:, len(PROMPT) :].unsqueeze(2)
    # A token stands for an interval; a point of it, drawn evenly, is even over [0, 1) if the token's probability is right.
    end, share = probability.cumsum(-1).gather(2, chosen), probability.gather(2, chosen)
    noise = torch.rand(end.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.histc((end - share * noise).flatten(), 8, 0, 1)
    assert float(((counts - 150) ** 2 / 150).sum()) < 24.3
    if drafts:
        assert engine.stats().accepted_tokens > 50
