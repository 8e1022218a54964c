import json
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.stages.compare import compare, half_width, verdict
from tests.stages.comparable import write_run


def lines_of(comparison, figure):
    return {line.variant: line for line in comparison.lines if line.figure == figure}


@pytest.fixture
def runs(tmp_path):
    """Three seeds of four variants: (directories, stdlib's bits per byte by variant)."""
    bits = {
        "baseline": [1.80, 1.82, 1.90],
        "mtp-off": [1.81, 1.82, 1.89],
        "balance-sequence": [1.85, 1.88, 1.95],
        "balance-batch": [1.75, 1.78, 1.85],
    }
    passed = {"baseline": 270, "mtp-off": 210, "balance-sequence": 285, "balance-batch": 270}
    paths = [
        write_run(tmp_path / f"{name}-seed{seed}", name, seed, stdlib=value, passed=passed[name] + seed, vio=0.2 + seed / 10)
        for name, values in bits.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    return paths, bits


def test_seeds_are_grouped_and_differences_are_taken_seed_by_seed(runs):
    paths, bits = runs
    comparison = compare(paths)
    assert comparison.tokens == 10000
    assert [each.name for each in comparison.variants] == list(bits)
    assert comparison.notes == []
    for name, line in lines_of(comparison, "bits per byte, stdlib").items():
        assert list(line.values.values()) == bits[name]
        assert line.mean == pytest.approx(mean(bits[name]))
        assert line.spread == pytest.approx(stdev(bits[name]))
        if name == "baseline":
            assert (line.difference, line.margin, line.finding, line.reproduces) == (None,) * 4
            continue
        differences = [a - b for a, b in zip(bits[name], bits["baseline"], strict=True)]
        assert line.difference == pytest.approx(mean(differences))
        assert line.margin == pytest.approx(4.303 * stdev(differences) / 3**0.5)


def test_verdicts_follow_the_reports_signs(runs):
    comparison = compare(runs[0])
    text, tasks = (lines_of(comparison, name) for name in ("bits per byte, stdlib", "pass@1, tinypy"))
    said = {name: (text[name].reproduces, tasks[name].reproduces) for name in text}
    assert said == {
        "baseline": (None, None),
        "mtp-off": ("yes", "yes"),  # no more than the spread apart; fewer tasks
        "balance-sequence": ("yes", "no"),  # worse in text, as published; better in tasks, which is not
        "balance-batch": ("no", None),  # better in text, where the report has no difference
    }


def test_max_vio_is_that_of_the_common_blocks_at_the_end(runs):
    lines = lines_of(compare(runs[0]), "MaxVio")
    assert list(lines["mtp-off"].values.values()) == pytest.approx([0.2, 0.3, 0.4])
    assert lines["baseline"].mean == pytest.approx(0.3)
    assert {line.finding for line in lines.values()} == {None}


def test_the_order_of_the_directories_decides_what_is_first_and_each_counts_once(runs):
    paths, _ = runs
    comparison = compare([*paths[3:6], *paths])
    assert [each.name for each in comparison.variants][:2] == ["mtp-off", "baseline"]
    line = lines_of(comparison, "pass@1, tinypy")["baseline"]
    assert line.difference == pytest.approx(0.2)
    assert (line.finding.sign, line.reproduces) == (1, "yes")


def test_it_is_json(runs):
    content = json.loads(json.dumps(compare(runs[0]).to_dict()))
    assert content["runs"]["mtp-off"]["2"] == str(runs[0][5])
    assert len(content["lines"]) == 5 * 4
    assert content["lines"][1]["finding"] == {"sign": 0, "source": "Table 4"}


def test_runs_of_different_lengths_meet_at_the_last_evaluation_of_all(tmp_path):
    paths = [
        write_run(tmp_path / "a", "baseline", 0),
        write_run(tmp_path / "b", "mtp-off", 0, evaluated=(0, 8000)),
    ]
    comparison = compare(paths)
    assert comparison.tokens == 8000
    assert comparison.notes == ["Not at the end of the training: at 8,000 of 10,000 tokens."]
    line = lines_of(comparison, "bits per byte, stdlib")["b"]
    assert line.mean == pytest.approx(2.0)
    assert (line.spread, line.margin, line.reproduces) == (None, None, "one seed")
    paths.append(write_run(tmp_path / "c", "balance-batch", 0, evaluated=(0, 5000)))
    with pytest.raises(UserError, match=r"no evaluation at the same number of tokens.*c 5000.*evaluate_every_steps"):
        compare(paths)


def test_seeds_that_only_one_variant_has_count_for_its_mean_alone(tmp_path):
    for seed, bits in ((0, 1.8), (1, 1.9)):
        write_run(tmp_path / f"a-{seed}", "baseline", seed, stdlib=bits)
    for seed, bits in ((1, 2.0), (2, 5.0)):
        write_run(tmp_path / f"b-{seed}", "mtp-off", seed, stdlib=bits)
    line = lines_of(compare(sorted(tmp_path.iterdir())), "bits per byte, stdlib")["b"]
    assert line.mean == pytest.approx(3.5)
    assert (line.difference, line.margin) == (pytest.approx(0.1), None)


def test_other_changes_are_named_and_have_no_sign(tmp_path):
    write_run(tmp_path / "a", "baseline", 0)
    write_run(tmp_path / "b", "mtp-off", 0, overrides=("optimizer.weight_decay=0.5",))
    comparison = compare([tmp_path / "a", tmp_path / "b"])
    assert {line.finding for line in comparison.lines} == {None}
    assert comparison.notes == [
        "b differs from a in model.num_nextn_predict_layers, optimizer.weight_decay: the report has no such pair."
    ]


def test_what_cannot_be_compared_is_refused(tmp_path):
    write_run(tmp_path / "a", "baseline", 0)
    write_run(tmp_path / "b", "baseline", 0)
    with pytest.raises(UserError, match=r"a and .*b are runs of one recipe and one seed"):
        compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="is not a run directory"):
        compare([tmp_path])
    (tmp_path / "c" / "tokenizer").mkdir(parents=True)
    with pytest.raises(UserError, match=r"c does not say what it trains: expected pretrain/run.json"):
        compare([tmp_path / "a", tmp_path / "c"])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_the_interval_is_students(differences):
    """Against the quantile's own definition: of the t density's mass, 95% lies inside."""
    degrees = len(differences) - 1
    error = stdev(differences) / len(differences) ** 0.5
    if error < 1e-6:
        return
    quantile = half_width(differences) / error
    grid = np.linspace(-quantile, quantile, 20001)
    density = (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    tails = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 200003)[1:-1])  # the whole line
    whole = np.trapezoid((1 + tails**2 / degrees) ** (-(degrees + 1) / 2), tails)
    assert np.trapezoid(density, grid) / whole == pytest.approx(0.95, abs=2e-3)


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(0, 3), st.sampled_from([-1, 0, 1]))
def test_a_verdict_turns_with_the_direction(difference, margin, sign):
    found = verdict(difference, margin, sign)
    assert verdict(-difference, margin, -sign) == found
    assert (found == "within the spread") == (abs(difference) <= margin and sign != 0)
    assert verdict(difference, None, sign) == "one seed"
