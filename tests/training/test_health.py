import json
import math
import statistics
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dsv3.training.health import COUNTED, LEAST, SIGMA, WINDOW, Health, Window


def test_a_deviation_is_counted_in_robust_standard_deviations():
    rng = Random(0)
    values = [rng.gauss(5.0, 0.5) for _ in range(100)]
    window = Window()
    found = [window.deviation(value) for value in values]
    assert found[:LEAST] == [None] * LEAST
    before = values[:60]
    middle = statistics.median(before)
    spread = SIGMA * statistics.median([abs(each - middle) for each in before])
    assert math.isclose(found[60], (values[60] - middle) / spread)
    assert abs(statistics.mean(found[LEAST:])) < 0.4
    assert 0.7 < statistics.stdev(found[LEAST:]) < 1.6  # about 1: that is what a standard deviation means


def test_spikes_do_not_hide_the_next_one():
    """With mean and standard deviation, ten spikes in the window would make the eleventh look usual."""
    rng, window = Random(0), Window()
    for step in range(100):
        window.deviation(rng.gauss(5.0, 0.1) + (4.0 if step % 10 == 0 else 0.0))
    assert window.deviation(9.0) > 20
    assert abs(window.deviation(5.0)) < 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=LEAST, max_size=40), st.floats(-1e6, 1e6))
def test_a_deviation_is_a_number_whatever_came_before(values, value):
    window = Window()
    for each in values:
        window.deviation(each)
    assert math.isfinite(window.deviation(value))


def run(health, steps, rng):
    rows = []
    for step in steps:
        bad = step % 50 == 0
        loss = math.nan if bad else 3 + rng.gauss(0, 0.1) + 5 * (step in (120, 121))
        rows.append(health.step(step, loss, 1 + rng.gauss(0, 0.1), bad))
    return rows


def test_spikes_and_skipped_steps_are_counted():
    rows = run(Health(), range(1, 201), Random(1))
    assert rows[-1]["skipped_steps"] == 4
    assert rows[118]["spike_score"] == 2 / 119
    assert rows[120]["spike_score"] == 4 / 121
    assert rows[120]["loss_deviation"] > 20
    assert rows[49]["loss_deviation"] is None
    health = Health()
    for step in range(1, COUNTED + 50):
        score = health.step(step, 3.0, 1.0, step <= 10)["spike_score"]
    assert score == 0  # forgotten


def test_a_row_of_skipped_steps_begins_and_ends():
    health = Health()
    for step, skipped, first in [(1, True, 1), (2, False, None), (3, True, 3), (4, True, 3), (5, True, 3), (6, False, None)]:  # fmt: skip
        health.step(step, 1.0, 1.0, skipped)
        assert health.skipped_from == first
    assert health.skipped == 4


def test_what_it_knows_goes_through_json():
    rng, again = Random(2), Random(2)
    whole = run(Health(), range(1, 301), rng)
    first = Health()
    rows = run(first, range(1, 151), again)
    rows += run(Health(json.loads(json.dumps(first.state()))), range(151, 301), again)
    assert rows == whole
    assert len(first.state()["loss"]) <= WINDOW
