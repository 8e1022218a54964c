import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.stages import charts
from dsv3.stages.drawing import COLOURS, binned, svg
from dsv3.stages.run_directory import read_run


def drawn(chart, rows) -> str:
    return svg(lambda: chart(rows), "name", "label")


def words(drawing: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing)


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_ends_solve_its_equation(score):
    passed, total = score
    for p in charts.wilson(passed, total):
        assert (passed / total - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / total, abs=1e-9)


def test_wilson_holds_the_share_itself():
    for total in range(1, 400):
        for passed in (0, 1, total - 1, total):
            low, high = charts.wilson(passed, total)
            assert low <= passed / total <= high


def test_wilson_has_the_published_value():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, both of 95%.
    assert charts.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert charts.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_binned_equals_a_loop(values, bins):
    mean, least, greatest = binned(np.array(values), bins)
    shares = len(mean)
    assert shares == min(len(values), bins)
    for i in range(shares):
        part = values[i * len(values) // shares : (i + 1) * len(values) // shares]
        assert mean[i] == pytest.approx(sum(part) / len(part), abs=1e-6)
        assert (least[i], greatest[i]) == (min(part), max(part))


def test_load_map_takes_the_nearest_row_relative_to_the_mean():
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.ones(4), size=7)
    tokens = [0, 10, 20, 90, 95, 96, 100]
    rows = [{"tokens": at, "load": {"1": list(share)}} for at, share in zip(tokens, load, strict=True)]
    image, extent = charts.load_map([*rows, {"tokens": 200, "load": {"2": [1.0]}}], "1", columns=5)
    assert image.shape == (4, 5)
    assert extent == (0, 100, -0.5, 3.5)
    for column, middle in enumerate((10, 30, 50, 70, 90)):
        nearest = min(range(7), key=lambda row: abs(tokens[row] - middle))
        np.testing.assert_allclose(image[:, column], load[nearest] * 4)


def test_load_colours_show_every_departure_from_the_mean():
    red, _, blue, _ = charts.LOAD(0.5 + np.array([0.1, -0.1]))[:, [0, 2]].reshape(-1)
    assert red > 0.5
    assert blue < 0.5
    opacity = charts.LOAD(np.linspace(0, 1, 9))[:, 3]
    np.testing.assert_allclose(opacity, np.abs(np.linspace(-1, 1, 9)), atol=0.01)


def test_every_figure_says_what_it_shows(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=60, planned=60))
    assert {"main model", "MTP module 0", "nats a token", "tokens"} <= set(words(drawn(charts.loss, run.metrics)))
    assert {"stdlib", "tinypy", "3.41", "3.31"} <= set(words(drawn(charts.bits_per_byte, run.evaluations)))
    assert {"tinypy", "tasks solved, %"} <= set(words(drawn(charts.pass_at_1, run.evaluations)))
    experts = drawn(charts.expert_load, run.metrics)
    assert {"layer 1", "layer 2", "layer 3", "mtp.0", "MaxVio", "expert", "2 × mean"} <= set(words(experts))
    assert experts.count("<image") == 5  # Four maps and the colour bar.
    panels = {"learning rate", "gradient norm before clipping", "selection bias, mean magnitude", "tokens per second"}
    assert panels <= set(words(drawn(charts.optimisation, run.metrics)))


def test_every_mtp_depth_is_drawn():
    rows = [{"step": i, "tokens": i, "loss": 2.0, "mtp_losses": [3.0, 4.0, 5.0]} for i in (1, 2, 3)]
    assert {"MTP module 0", "MTP module 1", "MTP module 2"} <= set(words(drawn(charts.loss, rows)))


def test_many_blocks_fall_into_rows_of_six():
    blocks = [*map(str, range(3, 17)), "mtp.0"]
    rows = [
        {"tokens": at, "max_vio": dict.fromkeys(blocks, 0.5), "load": {block: [0.5, 0.5] for block in blocks}}
        for at in (1, 2, 3)
    ]
    drawing = drawn(charts.expert_load, rows)
    assert len([word for word in words(drawing) if word.startswith("layer ")]) == 14
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
    assert width / height == pytest.approx(charts.WHOLE / (3 * 3.9), rel=0.01)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("last", [math.inf, None])
def test_a_figure_that_is_not_finite_or_not_there_is_a_gap(make_run, tmp_path, last):
    rows = [dict(row) for row in read_run(make_run(tmp_path / "run", steps=12)).metrics]
    rows[-1] |= {
        "loss": last,
        "grad_norm": last,
        "mtp_losses": [last],
        "max_vio": dict.fromkeys(rows[-1]["max_vio"], last),
    }
    for draw in (charts.loss, charts.optimisation, charts.expert_load):
        assert "<path" in drawn(draw, rows)
        assert "<path" in drawn(draw, rows[:1])


def test_names_from_outside_stay_text():
    name = "\ud800$x$ </text><script>alert(1)</script> & "
    evaluation = {"step": 0, "tokens": 0, "bits_per_byte": {name: 3.0}, "pass_at_1": {name: {"passed": 1, "total": 2}}}
    rows = [{"tokens": 1, "max_vio": {name: 0.5}, "load": {name: [0.5, 0.5]}}]
    for drawing in (
        drawn(charts.bits_per_byte, [evaluation]),
        drawn(charts.pass_at_1, [evaluation]),
        drawn(charts.expert_load, rows),
    ):
        assert "<script" not in drawing
        assert "$x$ &lt;/text&gt;&lt;script" in drawing


def test_drawings_are_repeatable_and_take_their_colours_from_the_page():
    rows = [{"tokens": at, "loss": 2.0} for at in (1, 2, 3)]
    drawing = drawn(charts.loss, rows)
    assert drawing == drawn(charts.loss, rows)
    assert "var(--blue)" in drawing
    assert not any(light in drawing for light, _ in COLOURS.values())
