import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.inference.sampling import SamplingParams, sample


def by_the_definition(logits, temperature, top_p, uniform):
    """A plain loop: probabilities, the fewest most likely that reach top_p, the cumulative sum that passes the draw."""
    top = max(logits)
    weights = [math.exp((logit - top) / temperature) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    kept, reached = [], 0.0
    for token in order:
        if reached >= top_p:
            break
        kept.append(token)
        reached += probabilities[token]
    passed = 0.0
    for token in kept:
        passed += probabilities[token]
        if passed > uniform * reached:
            return token
    return kept[-1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12, unique=True),
    st.floats(0.2, 3.0),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_sample_equals_a_plain_loop(logits, temperature, top_p, uniform):
    params = SamplingParams(temperature=temperature, top_p=top_p)
    found = sample(torch.tensor([logits]), params, torch.tensor([uniform], dtype=torch.float64))
    expected = {by_the_definition(logits, temperature, top_p, min(max(uniform + e, 0), 1)) for e in (-1e-9, 0, 1e-9)}
    assert int(found) in expected


def test_rows_are_drawn_alone():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = SamplingParams(temperature=0.8, top_p=0.9)
    together = sample(logits, params, uniform)
    assert together.dtype == torch.int64
    assert together.tolist() == [int(sample(logits[i : i + 1], params, uniform[i : i + 1])) for i in range(5)]


def test_temperature_zero_is_the_largest_and_tiny_ones_come_to_it():
    logits = torch.tensor([[0.0, 3.0, 2.999, -1.0], [5.0, -2.0, 4.0, 0.0]])
    uniform = torch.tensor([0.999, 0.999], dtype=torch.float64)
    for temperature in (0.0, 1e-6, 1e-300, 5e-324):
        assert sample(logits, SamplingParams(temperature=temperature), uniform).tolist() == [1, 0]


def test_draws_follow_the_softmax():
    """Chi-square of 20,000 draws against softmax(logits / T), 7 degrees of freedom; 24.3 is the 99.9% point."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for temperature in (0.7, 1.0, 2.0):
        drawn = sample(logits.expand(count, -1), SamplingParams(temperature=temperature), uniform)
        observed = torch.bincount(drawn, minlength=8).double()
        expected = (logits.double() / temperature).softmax(-1) * count
        assert float(((observed - expected) ** 2 / expected).sum()) < 24.3


def test_nothing_outside_the_nucleus_is_ever_drawn():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for top_p, kept in ((0.4, {0}), (0.5001, {0, 1}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        draws = torch.cat((torch.linspace(0, 0.9999, 400, dtype=torch.float64), edges))
        found = sample(logits.expand(len(draws), -1), SamplingParams(top_p=top_p), draws)
        assert set(found.tolist()) == kept


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0: expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"max_tokens": 0}, "max_tokens = 0: expected 1 or more"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"stop": ""}, "stop holds an empty text"),
    ],
)
def test_refusals(values, said):
    with pytest.raises(UserError, match=said):
        SamplingParams(**values)


def test_one_stop_text_may_stand_alone():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
