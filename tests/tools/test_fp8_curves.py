import json

import numpy as np
import pytest
from click.testing import CliRunner

from tools.fp8_curves import main, smoothed


def run(directory, losses):
    home = directory / "pretrain"
    home.mkdir(parents=True)
    rows = ({"step": i, "tokens": 8 * i, "loss": loss} for i, loss in enumerate(losses, 1))
    (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "evaluations.jsonl").write_text(
        json.dumps({"step": len(losses), "tokens": 1, "bits_per_byte": {"a": 1.0, "b": 2.0}})
    )
    return directory


def test_smoothing_is_the_average_with_weights_that_fall_by_a_tenth():
    values = np.random.default_rng(0).normal(size=40)
    for end in (1, 7, 40):
        weights = 0.9 ** np.arange(end)[::-1]
        assert smoothed(values)[end - 1] == pytest.approx(np.average(values[:end], weights=weights))


@pytest.mark.parametrize(("difference", "code"), [(1.002, 0), (1.003, 1), (0.997, 1)])
def test_it_fails_when_fp8_leaves_the_band(tmp_path, difference, code):
    losses = np.linspace(6, 3, 400)
    # What is before step 300, even if large, is not what was promised.
    other = losses * np.where(np.arange(400) < 200, 1.1, difference)
    paths = [run(tmp_path / "fp8-seed0", other), run(tmp_path / "baseline-seed0", losses)]
    json_path, plot = tmp_path / "curves.json", tmp_path / "curves.svg"
    result = CliRunner().invoke(main, [*map(str, paths), "--json", str(json_path), "--plot", str(plot)])
    assert result.exit_code == code, result.output
    assert "1.5000 bits per byte" in result.output
    assert f"largest {abs(difference - 1):.2%}" in result.output
    written = json.loads(json_path.read_text())
    assert len(written["losses"]["fp8"]) == 40
    assert "<svg" in plot.read_text()


def test_a_run_without_its_baseline_or_too_short_is_refused(tmp_path):
    alone = CliRunner().invoke(main, [str(run(tmp_path / "fp8-seed0", [1.0] * 400))])
    assert alone.exit_code == 2
    assert "expected baseline-seed0" in alone.output
    short = CliRunner().invoke(main, [str(run(tmp_path / "baseline-seed0", [1.0] * 40))])
    assert short.exit_code != 0
