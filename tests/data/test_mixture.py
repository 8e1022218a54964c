import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.mixture import LONGEST_CYCLE, interleave, whole_shares


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([2, 4, 6], [1, 2, 3]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([1e-4, 1.0], [1, 10_000]),
        ([1e-9, 1.0, 1.0], [1, 50_000, 49_999]),
    ],
)
def test_weights_are_the_decimals_they_are_written_as(weights, shares):
    assert whole_shares(weights) == shares


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_rounded_shares_are_positive_and_fill_the_cycle(weights):
    shares = whole_shares(weights)
    assert min(shares) >= 1
    assert sum(shares) <= LONGEST_CYCLE
    exact = np.array(weights) / sum(weights)
    # Sources below a row a cycle are raised to one, at the cost of the others: less than a row for each.
    assert np.abs(np.array(shares) / sum(shares) - exact).max() <= (1 + len(weights)) / LONGEST_CYCLE


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_after_any_number_of_rows_each_source_is_within_one_row_of_its_share(weights):
    order, before = interleave(weights)
    cycle = len(order)
    two = np.concatenate([order, order])
    counts = np.stack([np.cumsum(two == source) for source in range(len(weights))], axis=1)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    for source, share in enumerate(shares):
        # count - rows * share lies in (-1, 1), in whole numbers so that nothing is rounded.
        ahead = counts[:, source] * share.denominator - np.arange(1, 2 * cycle + 1) * share.numerator
        assert np.abs(ahead).max() < share.denominator
        assert before[order == source].tolist() == list(range(cycle * share.numerator // share.denominator))


def test_the_longest_cycle_takes_no_time_worth_speaking_of():
    started = time.perf_counter()
    order, _ = interleave([0.123456789, 0.3, 0.57])
    assert len(order) == LONGEST_CYCLE
    assert time.perf_counter() - started < 5
