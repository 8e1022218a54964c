"""`dsv3 plan`: figures and pictures of pipeline schedules, and of a recipe on many GPUs."""

import json
import re
from pathlib import Path

import pytest

from dsv3.cli import main

SCHEDULE = ["plan", "--schedule", "dual_pipe", "--pipeline", "8", "--microbatches", "20"]


def test_the_report_s_example(capsys):
    assert main.run([*SCHEDULE, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["time"], said["bubble"], said["peak_activations"]) == (66, 6, [9] * 8)
    assert main.run([*SCHEDULE, "--costs", "1,2,1,2.5"]) == 0
    assert "8 stages on 8 ranks, 20 micro-batches: time" in capsys.readouterr().out


RECIPE = Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "pretrain.toml"
REPORT = [
    "plan", str(RECIPE), "training.micro_batch_size=1", "--schedule", "dual_pipe", "--pipeline", "16", "--data", "128", "--expert", "64",
]  # fmt: skip


def test_the_report_s_recipe(capsys):
    assert main.run([*REPORT, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["micro_batches"] == 120
    assert len(said["memory"]) == 16
    assert said["memory"][0]["blocks"][-1] == "mtp.0"
    # 62.9M tokens in 19.93 s on the report's machine; here at 400 TFLOP/s and 50 GB/s, and as simulated.
    assert 15 < said["time"] < 30
    assert main.run(REPORT) == 0
    out = capsys.readouterr().out
    assert "2,048 GPUs, batches of 15,360 sequences" in out
    assert "dispatch of a block: " in out


def test_it_is_drawn(tmp_path):
    assert main.run([*SCHEDULE, "--out", str(tmp_path / "a.svg")]) == 0
    drawn = (tmp_path / "a.svg").read_text()
    numbers = [int(each) for each in re.findall(r"<text[^>]*>(\d+)</text>", drawn)]
    # 8 ranks x 20 micro-batches: a forward pass, a backward pass, and for those in halves another; the axes' numbers beside.
    assert len(numbers) > 2 * 8 * 20
    assert all(
        text in drawn for text in ("rank", "time", ">forward<", "backward, weights alone", "forward, second stage")
    )
    assert main.run([*SCHEDULE, "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--costs", "1,2"], "--costs '1,2': expected the times"),
        (["--costs", "1,1,2,3"], "its part for weights \\(shorter\\)"),
        (["--pipeline", "7"], "DualPipe on 7 ranks: expected an even number, such as 6 or 8"),
        (["--microbatches", "8"], "expected at least 16"),
        ([str(RECIPE)], "expected a recipe, .* or --microbatches"),
        (["--out", "a.gif"], "expected a name that ends in .svg or .png"),
    ],
)
def test_refusals(options, said, capsys):
    assert main.run([*SCHEDULE, *options]) == 2
    assert re.search(said, capsys.readouterr().err)
