"""`dsv3 pretrain`: to the end, stopped, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.cli import main

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
SMALL = [
    "model.preset=debug", 'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', 'tokenizer.training_bytes="50K"',
    'evaluation.bits_per_byte_bytes="1K"', "evaluation.tinypy_tasks=0", "evaluation.sample_prompts=[]",
]  # fmt: skip
STEPS = 100
LONG = [*SMALL, f"training.tokens={STEPS * 512}"]
SHORT = [*SMALL, "training.tokens=1024"]


def pretrain(capsys, out, *arguments):
    code = main.run(["pretrain", str(REDUCED), "--out", str(out), *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def steps(out):
    path = out / "pretrain" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_ctrl_c_finishes_the_step_and_saves_and_resume_continues(tmp_path, capsys):
    command = [sys.executable, "-m", "dsv3", "pretrain", str(REDUCED), "--out", str(tmp_path), *LONG]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    done = steps(tmp_path)
    assert 2 <= len(done) < STEPS
    saved = tmp_path / "pretrain" / "checkpoints" / f"step-{len(done):08d}"
    assert said.splitlines()[-1] == f"dsv3: stopped after step {len(done)}; saved in {saved}"
    assert (saved.parent / "latest").read_text().strip() == saved.name

    code, out, err = pretrain(capsys, tmp_path, *LONG)
    assert code == 2
    assert "holds a run already: add --resume to continue it" in err
    assert pretrain(capsys, tmp_path, *LONG, "optimizer.weight_decay=0.3", "--resume")[0] == 2
    code, out, err = pretrain(capsys, tmp_path, *LONG, "--resume")
    assert code == 0
    assert f"pretrain: continuing after step {len(done)}" in err
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert f"dsv3 report {tmp_path}" in out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    assert main.run(["pretrain", str(REDUCED), "--out", str(out), *SHORT]) == 0
    return out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimizer.weight_decay=0.3",
            "pretrain was made from other inputs: optimizer.weight_decay was 0.1 and is 0.3",
        ),
        ("training.tokens=512", "pretrain was made from other inputs: training.tokens was 1024 and is 512"),
        ("--allow=data.fim_rat", "--allow data.fim_rat: no recipe has this key; did you mean 'data.fim_rate'"),
        ("data.fim_rate=0.5", "train was made from other inputs: fim_rate was 0.1 and is 0.5"),
        ("model.vocab_size=600", "tokenizer was made from other inputs: tokenizer.vocab_size was 512 and is 600"),
    ],
)
def test_a_changed_recipe_is_refused_and_nothing_is_lost(run, capsys, override, said):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, _, err = pretrain(capsys, run, *SHORT, override, "--resume")
    assert code == 2
    assert said in err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_what_is_safe_and_with_what_is_allowed(tmp_path, capsys):
    level = [*SHORT, "schedule.learning_rate=1e-3"]
    assert pretrain(capsys, tmp_path, *level)[0] == 0
    code, _, err = pretrain(capsys, tmp_path, *level, "training.tokens=2048", "training.keep_last=1", "--resume")
    assert code == 0
    assert "pretrain: continuing after step 2" in err
    assert "pretrain: training.tokens was 1024 and is 2048" in err
    assert steps(tmp_path) == [1, 2, 3, 4]
    changed = [*level, "training.tokens=3072", "data.fim_rate=0.5", "optimizer.weight_decay=0.2", "--resume"]
    code, _, err = pretrain(capsys, tmp_path, *changed, "--allow", "data.fim_rate")
    assert code == 2
    assert "pretrain was made from other inputs: optimizer.weight_decay was 0.1 and is 0.2." in err
    code, _, err = pretrain(capsys, tmp_path, *changed, "--allow", "data.fim_rate,optimizer")
    assert code == 0
    assert "pretrain: data.fim_rate was 0.1 and is 0.5 (allowed)" in err
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "stages" / "shards.t.train.json").read_text())["inputs"]["fim_rate"] == 0.5
    code, _, err = pretrain(capsys, tmp_path / "new", *SHORT, "--allow", "data")
    assert code == 2
    assert "add --resume" in err


def test_a_checkpoint_of_another_config_is_refused(run, tmp_path, capsys):
    """A stage's record says that it was begun with this recipe, but the checkpoint there is of another one."""
    assert pretrain(capsys, tmp_path, *SHORT, "model.hidden_size=64")[0] == 0
    record = json.loads((run / "stages" / "pretrain.json").read_text())
    (tmp_path / "stages" / "pretrain.json").write_text(json.dumps({**record, "done": False}))
    code, _, err = pretrain(capsys, tmp_path, *SHORT, "--resume")
    assert code == 2
    assert "step-00000002 was trained with another recipe: model.hidden_size was 64 and is 32" in err


def test_a_loss_that_is_not_finite_ends_with_exit_code_1(tmp_path, capsys):
    code, _, err = pretrain(
        capsys,
        tmp_path,
        *SMALL,
        "training.tokens=5120",
        "schedule.learning_rate=1e30",
        "optimizer.kind=adamw",
        "training.precision=fp32",
    )
    assert code == 1
    last = err.splitlines()[-1]
    assert "of step 5 is not finite, as in every step since 2; these were skipped" in last
    assert "t:" in last  # the documents
    assert "The last good checkpoint is none" in last
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_nothing_to_resume(tmp_path, capsys):
    code, _, err = pretrain(capsys, tmp_path / "typo", *SHORT, "--resume")
    assert code == 2
    assert "typo holds no run to continue" in err
    assert not (tmp_path / "typo").exists()
