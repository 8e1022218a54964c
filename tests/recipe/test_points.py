from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.recipe.points import point_at, points_of
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

REPORT = Schedules.resolve(Recipe.load(Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "pretrain.toml"))
B, T = 10**9, 10**12


def test_the_report_s_course():
    """Every token count at which the report changes something, and what it changes."""
    points = points_of(REPORT, 14_800 * B)
    found = {point.tokens: point.changes for point in points}
    warm = next(point for point in points if point.step == 2000)
    assert found == {
        0: (),
        warm.tokens: ("learning_rate",),
        469 * B: ("batch_size",),
        10 * T: ("learning_rate", "mtp_weight"),
        14_300 * B: ("learning_rate", "bias_update_speed"),
        14_633 * B: ("learning_rate",),
        14_800 * B: (),
    }
    assert warm.learning_rate == 2.2e-4
    # 2000 steps that grow from 3072 sequences: a little more than 2000 x 3072 x 4096.
    assert 25 * B < warm.tokens < 29 * B
    assert points[-1].step == REPORT.total_steps == 243_099


def test_values_at_any_count():
    at = point_at(REPORT, 10 * T)
    assert (at.learning_rate, at.batch_size, at.mtp_weight, at.bias_update_speed) == (2.2e-4, 15360, 0.1, 0.001)
    before = point_at(REPORT, 10 * T - 1)
    assert (before.learning_rate, before.mtp_weight) == (2.2e-4, 0.3)
    middle = point_at(REPORT, 12_150 * B)
    assert middle.learning_rate == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert point_at(REPORT, 14_700 * B).learning_rate == 7.3e-6
    assert point_at(REPORT, 234 * B + B // 2).batch_size == 9216


def test_points_asked_for_are_among_them_once_and_in_order():
    points = points_of(REPORT, 14_800 * B, [12 * T, 10 * T, 12 * T])
    tokens = [point.tokens for point in points]
    assert tokens == sorted(set(tokens))
    assert {10 * T, 12 * T} <= set(tokens)
    with pytest.raises(UserError, match=r"15T tokens is past the end: expected at most training.tokens = 14.8T"):
        points_of(REPORT, 14_800 * B, [15 * T])
