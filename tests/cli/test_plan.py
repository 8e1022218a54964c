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
SHARE = Path(__file__).parents[2] / "docs" / "results" / "share-h200.json"


def test_the_report_s_recipe(capsys):
    assert main.run(["plan", str(RECIPE), "--share", str(SHARE), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["gpus"], len(said["memory"])) == (2048, 16)
    steps = [(each["batch"], each["schedule"], each["micro_batches"]) for each in said["steps"]]
    assert steps == [(3072, "one_f_one_b", 24), (3584, "one_f_one_b", 28), (15360, "dual_pipe", 120)]
    # 62.9M tokens in 19.93 s on the report's machine.
    assert 15 < said["steps"][-1]["total"] < 22
    (measured,) = (each for each in json.loads(SHARE.read_text())["shares"] if each["precision"] == "fp8")
    assert said["machine"]["layers"]["moe_layer"] == pytest.approx(measured["moe_layer"] * 1e-3 / 4096, rel=1e-9)


def test_any_layout_at_any_point(capsys):
    layout = ["parallel.pipeline=8", "parallel.data=64", "parallel.expert=32", "parallel.schedule=dual_pipe_v"]
    assert main.run(["plan", str(RECIPE), *layout, "--at", "200B", "--tflops", "500"]) == 0
    out = capsys.readouterr().out
    assert "512 GPUs, 8 stages x 64, experts over 32" in out
    assert re.search(r"200B +8,192 +dual_pipe_v +128 ", out)
    assert "dispatch of a block, to other nodes: " in out


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
        ([*SCHEDULE, "--costs", "1,2"], "--costs '1,2': expected the times"),
        ([*SCHEDULE, "--costs", "1,1,2,3"], "its part for weights \\(shorter\\)"),
        ([*SCHEDULE, "--pipeline", "7"], "dual_pipe on 7 ranks .*: expected an even number, such as 6 or 8"),
        ([*SCHEDULE, "--microbatches", "8"], "expected 16"),
        ([*SCHEDULE, str(RECIPE)], "expected a recipe, .* or --schedule"),
        ([*SCHEDULE, "--out", "a.gif"], "expected a name that ends in .svg or .png"),
        (["plan"], "expected a recipe, .* or --schedule"),
        (["plan", str(RECIPE), "--pipeline", "8"], "parallel.pipeline=8"),
        (["plan", str(RECIPE), "--tflops", "5", "--share", str(SHARE)], "leave one out"),
        (["plan", str(RECIPE), "--bandwidth", "0"], "expected numbers above 0"),
        (["plan", str(RECIPE), "--share", str(RECIPE)], "expected a file that `dsv3 bench train --share --json` wrote"),
        (["plan", str(RECIPE), "--share", str(SHARE), "training.precision=fp32"], "with times in fp32"),
        (["plan", str(RECIPE), "--share", str(SHARE), "data.sequence_length=2048"], "the recipe is of others"),
        (["plan", str(RECIPE), "parallel.schedule_below=one_f_one"], "expected 'one_f_one_b'"),
        (["plan", str(RECIPE), "--at", "15T"], "15T tokens is past the end"),
    ],
)
def test_refusals(options, said, capsys):
    assert main.run(options) == 2
    assert re.search(said, capsys.readouterr().err)
