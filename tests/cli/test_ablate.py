"""`dsv3 ablate` on a mini pair: what one step teaches is nothing; that everything runs, is shared and is continued, is all."""

import json
from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.recipe.schema import Recipe

ABLATIONS = Path(__file__).parents[2] / "recipes" / "ablations"
SMALL = [
    "model.preset=debug", "model.max_position_embeddings=256", 'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', "data.sequence_length=64",
    'tokenizer.training_bytes="20K"', "schedule.learning_rate=0.003", "training.tokens=512", "training.precision=fp32",
    "training.device=cpu", 'evaluation.bits_per_byte_bytes="1K"', "evaluation.tinypy_tasks=1",
]  # fmt: skip


def ablate(capsys, out, *arguments):
    paths = [str(ABLATIONS / f"{name}.toml") for name in ("baseline", "balance-batch")]
    code = main.run(["ablate", *paths, *SMALL, "--out", str(out), *arguments])
    return code, capsys.readouterr()


def test_a_mini_pair(capsys, tmp_path):
    out = tmp_path / "out"
    code, said = ablate(capsys, out, "--seeds", "1", "--jobs", "2")
    assert code == 0, said.err
    names = ["baseline-seed1", "balance-batch-seed1"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted([*names, "shared"])
    for name in names:
        for shards in ("shards/t/train", "shards/t/validation"):
            assert (out / name / shards).resolve() == (out / "shared" / shards).resolve()
        about = json.loads((out / name / "pretrain" / "run.json").read_text())
        recipe = Recipe.from_dict(about["recipe"])
        assert (recipe.training.seed, recipe.data.seed) == (1, 0)
        assert recipe.training.balance == ("batch" if "batch" in name else "bias")
        assert not any(
            line.startswith("shards.") and "cached" not in line
            for line in (out / name / "log.txt").read_text().splitlines()
        )
    content = json.loads((out / "comparison.json").read_text())
    assert {line["figure"] for line in content["lines"]} == {
        "bits per byte, t", "validation loss, t", "pass@1, tinypy", "MaxVio",
    }  # fmt: skip
    assert [line["variant"] for line in content["lines"][:2]] == ["baseline", "balance-batch"]
    assert content["lines"][1]["finding"]["source"] == "section 4.5.3"
    assert (out / "comparison.md").read_text().startswith("| figure |")
    assert "<svg" in (out / "comparison.svg").read_text()
    assert "balance-batch" in said.out

    before = {path: path.stat().st_mtime_ns for name in names for path in (out / name / "pretrain").rglob("*")}
    record = out / names[0] / "stages" / "pretrain.json"
    record.write_text(record.read_text().replace('"done": true', '"done": false'))
    code, said = ablate(capsys, out, "--seeds", "1")
    assert code == 0, said.err
    assert "runs that are finished: 1 of 2" in said.err
    assert [line for line in said.err.splitlines() if line.endswith(": started")] == [f"{names[0]}: started"]
    assert "tokenizer: cached" in said.err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if names[0] not in path.parts)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0,0", "expected different ones"),
        *((each, "expected whole numbers from 0 on") for each in ("", "0,x", "-1", "1-3")),
    ],
)
def test_seeds_are_different_whole_numbers(written, said, capsys):
    assert main.run(["ablate", "recipes", "--seeds", written]) == 2
    assert said in capsys.readouterr().err
