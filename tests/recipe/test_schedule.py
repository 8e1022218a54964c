"""Schedules against loops that take one step after another and know nothing of pieces, units or runs."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

REPORT = Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "pretrain.toml"
B, T = 10**9, 10**12


def resolved(tokens: int = 100_000, length: int = 10, **schedule: Any) -> Schedules:
    values = {
        "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": length},
        "schedule": {"learning_rate": 1e-3, "batch_size": 8, **schedule},
        "training": {"tokens": tokens},
    }
    return Schedules.resolve(Recipe.from_dict(values))


@pytest.fixture(scope="module")
def report() -> Schedules:
    return Schedules.resolve(Recipe.load(REPORT))


@pytest.mark.parametrize(
    ("step", "tokens", "value"),
    [
        (0, 0, 0.0),
        (1, 3072 * 4096, 2.2e-4 / 2000),
        (1000, 13 * B, 1.1e-4),
        (1999, 27 * B, 2.2e-4 * 1999 / 2000),
        (2000, 27 * B, 2.2e-4),
        (160_000, 10 * T - 1, 2.2e-4),
        (160_000, 10 * T, 2.2e-4),
        (190_000, 10 * T + 2150 * B, (2.2e-4 + 2.2e-5) / 2),
        (190_000, 10 * T + 1075 * B, 2.2e-5 + 1.98e-4 * (1 + math.cos(math.pi / 4)) / 2),
        (230_000, 14300 * B - 1, 2.2e-5),
        (230_000, 14300 * B, 2.2e-5),
        (235_000, 14633 * B - 1, 2.2e-5),
        (235_000, 14633 * B, 7.3e-6),
        (240_000, 14800 * B - 1, 7.3e-6),
        (240_000, 15000 * B, 7.3e-6),
    ],
)
def test_the_report_s_learning_rate(report: Schedules, step: int, tokens: int, value: float) -> None:
    assert report.learning_rate.at(step, tokens) == pytest.approx(value, rel=1e-12)


def test_the_report_s_weights(report: Schedules) -> None:
    assert [report.mtp_weight.at(9, t) for t in (0, 10 * T - 1, 10 * T, 15 * T)] == [0.3, 0.3, 0.1, 0.1]
    assert [report.bias_update_speed.at(9, t) for t in (0, 14300 * B - 1, 14300 * B)] == [0.001, 0.001, 0.0]


def test_the_report_s_batch_size_step_by_step(report: Schedules) -> None:
    step = tokens = 0
    while tokens < 469 * B:
        size = math.floor(3072 + 12288 * tokens / (469 * B)) // 256 * 256
        assert report.batch_size.at(step, tokens) == size
        assert report.timeline.tokens_at(step) == tokens
        assert report.timeline.steps_until(tokens) == step
        assert report.timeline.steps_until(tokens + 1) == step + 1
        step, tokens = step + 1, tokens + size * 4096
    # A ramp linear in tokens: the integral of dt / batch(t) is 469B / (4096 x 12288) x ln 5 = 14,997 steps; 2% more rounded down.
    assert step == 15_314
    assert report.batch_size.at(step, tokens) == 15360
    assert report.total_steps == step + math.ceil((14800 * B - tokens) / (15360 * 4096)) == 243_099
    assert report.timeline.tokens_at(report.total_steps - 1) < 14800 * B <= report.timeline.tokens_at(243_099)


@pytest.mark.prove
def test_every_step_of_the_report_s_training(report: Schedules) -> None:
    step = tokens = 0
    while tokens < 14800 * B:
        size = math.floor(3072 + 12288 * tokens / (469 * B)) // 256 * 256 if tokens < 469 * B else 15360
        rate = report.learning_rate.at(step, tokens)
        assert report.batch_size.at(step, tokens) == size
        assert (report.timeline.tokens_at(step), report.timeline.steps_until(tokens)) == (tokens, step)
        if step < 2000:
            expected = 2.2e-4 * step / 2000
        elif tokens < 10 * T:
            expected = 2.2e-4
        elif tokens < 14300 * B:
            expected = 2.2e-5 + 0.5 * 1.98e-4 * (1 + math.cos(math.pi * (tokens - 10 * T) / (4300 * B)))
        else:
            expected = 2.2e-5 if tokens < 14633 * B else 7.3e-6
        assert math.isclose(rate, expected, rel_tol=1e-12)
        step, tokens = step + 1, tokens + size * 4096
    assert step == report.total_steps


def test_a_ramp_in_steps_then_tokens_then_steps() -> None:
    schedules = resolved(
        batch_size=[{"kind": "linear", "from": 4, "to": 8, "steps": 10}, {"kind": "constant", "value": 8}],
        learning_rate=[
            {"kind": "linear", "from": 0.0, "to": 1.0, "steps": 15},
            {"kind": "cosine", "from": 1.0, "to": 0.5, "tokens": 1005},
            {"kind": "linear", "from": 0.5, "to": 0.0, "steps": 20},
            {"kind": "constant", "value": 0.125},
        ],
    )
    sizes = [4 + (4 * step) // 10 for step in range(10)] + [8] * 90
    tokens = [sum(sizes[:step]) * 10 for step in range(100)]
    assert [schedules.batch_size.at(step, tokens[step]) for step in range(100)] == sizes
    second_from, second_to = tokens[15], tokens[15] + 1005
    third_from = next(step for step in range(100) if tokens[step] >= second_to)
    for step in range(100):
        if step < 15:
            expected = step / 15
        elif tokens[step] < second_to:
            done = (tokens[step] - second_from) / (second_to - second_from)
            expected = 0.75 + 0.25 * math.cos(math.pi * done)
        elif step < third_from + 20:
            expected = 0.5 * (1 - (step - third_from) / 20)
        else:
            expected = 0.125
        assert schedules.learning_rate.at(step, tokens[step]) == pytest.approx(expected, abs=1e-12)


segment_limits = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(1, 60)}), st.fixed_dictionaries({"tokens": st.integers(1, 6000)})
)
ramps = st.fixed_dictionaries(
    {"kind": st.sampled_from(["linear", "cosine"]), "from": st.integers(4, 40), "to": st.integers(4, 40)}
)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(ramps, segment_limits), min_size=0, max_size=3),
    last=st.integers(4, 40),
    multiple=st.sampled_from([1, 4]),
    total=st.integers(1, 20_000),
)
def test_the_timeline_is_what_taking_steps_gives(
    parts: list[tuple[dict[str, Any], dict[str, int]]], last: int, multiple: int, total: int
) -> None:
    segments = [{**ramp, **limit} for ramp, limit in parts] + [{"kind": "constant", "value": last}]
    schedules = resolved(total, batch_size=segments, batch_size_multiple=multiple)
    step = tokens = 0
    while tokens < total:
        size = schedules.batch_size.at(step, tokens)
        assert size % multiple == 0
        assert multiple <= size <= 40
        assert (schedules.timeline.tokens_at(step), schedules.timeline.steps_until(tokens)) == (tokens, step)
        step, tokens = step + 1, tokens + size * 10
    assert schedules.total_steps == step


def test_cost_does_not_grow_with_the_number_of_steps() -> None:
    schedules = resolved(
        tokens=14 * T, length=8, batch_size=[{"kind": "linear", "from": 8, "to": 64, "tokens": 14 * T}]
    )
    assert schedules.total_steps > 4 * 10**10


def test_an_open_ramp_lasts_until_the_training_does() -> None:
    schedules = resolved(learning_rate=[{"kind": "linear", "from": 1.0, "to": 0.0}])
    assert [schedules.learning_rate.at(0, t) for t in (0, 25_000, 99_999, 100_000, 200_000)] == [
        1.0, 0.75, pytest.approx(1e-5), 0.0, 0.0,
    ]  # fmt: skip


def test_a_training_shorter_than_its_warm_up() -> None:
    segments = [{"kind": "linear", "from": 0.0, "to": 1.0, "steps": 1000}, {"kind": "cosine", "from": 1.0, "to": 0.1}]
    assert resolved(tokens=800, learning_rate=segments).learning_rate.at(9, 720) == 0.009


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            {"learning_rate": [{"kind": "constant", "value": 1.0, "tokens": "99K"}]},
            ["learning_rate ends", "99K tokens"],
        ),
        (
            {"mtp_weight": [{"kind": "linear", "from": 1.0, "to": 0.0, "steps": 1249}]},
            ["mtp_weight ends", "1249 steps"],
        ),
        ({"batch_size": [{"kind": "constant", "value": 8, "steps": 10}]}, ["batch_size ends", "10 steps", "100K"]),
        ({"batch_size": 6, "batch_size_multiple": 8}, ["batch_size reaches 6", "at least 8"]),
        (
            {
                "learning_rate": [
                    {"kind": "constant", "value": 1.0, "tokens": "5K"},
                    {"kind": "constant", "value": 1.0, "until_tokens": "5K"},
                    {"kind": "constant", "value": 1.0},
                ]
            },
            ["schedule.learning_rate.1.until_tokens = 5K", "more than the 5K tokens"],
        ),
        ({"learning_rate": [{"kind": "linear", "from": 1.0}]}, ["learning_rate.0", "'from' and 'to'"]),
        ({"learning_rate": [{"kind": "constant", "to": 1.0}]}, ["learning_rate.0", "'value'"]),
        ({"learning_rate": [{"kind": "linear", "from": 1.0, "to": 0.0, "steps": 3, "tokens": 3}]}, ["not several"]),
        ({"learning_rate": []}, ["learning_rate", "at least 1"]),
        ({"learning_rate": [{"kind": "constant", "value": -1.0}]}, ["learning_rate.0.value = -1.0"]),
    ],
)
def test_refusals(schedule: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        resolved(**schedule)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_schedule_may_end_with_the_training() -> None:
    assert resolved(mtp_weight=[{"kind": "linear", "from": 1.0, "to": 0.0, "steps": 1250}]).total_steps == 1250
    assert resolved(mtp_weight=[{"kind": "constant", "value": 1.0, "tokens": "100K"}])
