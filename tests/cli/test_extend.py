"""`dsv3 extend`: begun, refused to begin again, continued."""

from pathlib import Path

import pytest

from dsv3.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
START = [
    "model.preset=debug", "training.tokens=512", "training.precision=fp32", "tokenizer.training_bytes=50K",
    'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', "evaluation.tasks=[]", "evaluation.sample_prompts=[]",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_phase_from_a_run_and_its_default_place(home, capsys):
    assert main.run(["pretrain", str(RECIPES / "quickstart-reduced.toml"), "--out", "runs/start", *START]) == 0
    command = ["extend", str(RECIPES / "extend-reduced.toml"), "evaluation.tasks=[]"]
    assert main.run(command) == 0
    out = Path("runs/recipes/extend-reduced")
    assert (out / "extend" / "checkpoints" / "latest").is_file()
    assert f"dsv3 eval {out} --tasks needle,position" in capsys.readouterr().out
    assert main.run(command) == 2
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert main.run([*command, "--resume"]) == 0
    assert "extend: cached" in capsys.readouterr().err
    changed = [*command, "training.tokens=2048", "optimizer.weight_decay=0.2", "--resume"]
    assert main.run([*changed, "--allow", "training.tokens,optimizer"]) == 0
    assert "extend: optimizer.weight_decay was 0.1 and is 0.2 (allowed)" in capsys.readouterr().err
    # What a phase leaves is a run for the report, and a model for everything else.
    assert main.run(["report", str(out)]) == 0
    assert "is not there yet" not in (out / "report.html").read_text()
    assert main.run(["generate", str(out), "--prompt", "def ", "--max-tokens", "2"]) == 0


def test_a_start_that_is_not_there(home, capsys):
    assert main.run(["extend", str(RECIPES / "extend-reduced.toml")]) == 2
    assert "extension.initial_from = 'runs/start' is not there" in capsys.readouterr().err
    assert not list(home.iterdir())


def test_dry_run_needs_no_start(home, capsys):
    assert main.run(["extend", str(RECIPES / "extend-reduced.toml"), "--dry-run"]) == 0
    assert "1,536 tokens in 3 steps, sequences of 256" in capsys.readouterr().out
    assert not list(home.iterdir())
