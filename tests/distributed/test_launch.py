"""`torchrun -m dsv3 pretrain`: to the end, refused, with a rank that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.parallel.watchdog import EVERY
from tests.distributed.ranks import Ranks
from tests.distributed.refusals import hang, lose, other_recipes, wait_in_a_pipeline

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
SMALL = [
    "model.preset=debug", 'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', 'tokenizer.training_bytes="50K"',
    'evaluation.bits_per_byte_bytes="1K"', "evaluation.tinypy_tasks=0", "evaluation.sample_prompts=[]", "training.device=cpu",
    "training.precision=fp32", "optimizer.kind=adamw", "schedule.learning_rate=0.003", "parallel.data=2", "parallel.expert=2",
]  # fmt: skip


def start(out, *overrides, restarts=0):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(restarts),
        "-m",
        "dsv3",
        "pretrain",
    ]
    command += [str(REDUCED), "--out", str(out), *SMALL, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def steps(out):
    path = out / "pretrain" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_a_checkpoint(process, out):
    while process.poll() is None and not (out / "pretrain" / "checkpoints" / "latest").exists():
        time.sleep(0.02)


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.prove
def test_a_killed_rank_ends_the_job_and_its_checkpoint_goes_on(tmp_path):
    """One message of ours before torchrun's own; the run goes on from the last checkpoint."""
    process = start(tmp_path, "training.tokens=10M", "training.checkpoint_every_steps=2")
    wait_for_a_checkpoint(process, tmp_path)
    time.sleep(3 * EVERY)  # every rank has noted since that it is at a step
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank      : 1 (local_rank: 1)" in said
    assert "exitcode  : -9" in said
    ours = [line for line in said.splitlines() if line.startswith("dsv3: ") and " -> " not in line]
    assert len(ours) == 1
    assert "the job ends" in ours[0] or "lost the others in 'step" in ours[0]
    assert "1: step " in ours[0]
    assert "starting" not in ours[0]
    done = len(steps(tmp_path))
    again = start(tmp_path, f"training.tokens={(done + 2) * 512}", "--resume")
    out, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "pretrain: continuing after step" in said
    assert out.count("The model is in") == 1
    assert steps(tmp_path) == list(range(1, done + 3))
    assert "0-3" in out  # the table: rank 0's experts
    assert "4-7" in out


@pytest.mark.prove
def test_a_job_that_torchrun_starts_again_goes_on_from_the_last_checkpoint(tmp_path):
    layout = [
        "model.num_hidden_layers=4",
        'evaluation.sample_prompts=["def "]',
        "parallel.data=1",
        "parallel.expert=1",
        "parallel.pipeline=2",
    ]
    layout += ["training.micro_batch_size=1", "training.tokens=16384", "training.checkpoint_every_steps=2"]
    process = start(tmp_path, *layout, restarts=1)
    wait_for_a_checkpoint(process, tmp_path)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "pretrain: continuing after step" in said
    assert out.count("The model is in") == 1
    assert steps(tmp_path) == list(range(1, 33))


def test_ranks_with_different_recipes_are_refused_on_all(two_ranks):
    for said in two_ranks.run(other_recipes):
        assert "rank 1 of 2 has another recipe than rank 0" in said


def test_the_watchdog_names_what_each_rank_is_at(two_ranks, tmp_path):
    (said, _), (quiet, _) = two_ranks.run(hang, str(tmp_path / "store"))
    assert quiet == []
    assert len(said) == 1
    assert "rank 0: step 7: sum over data; rank 1: step 7" in said[0]


def test_the_watchdog_names_a_pipeline_s_instructions(two_ranks, tmp_path):
    (said, _), _ = two_ranks.run(wait_in_a_pipeline, str(tmp_path / "store"))
    assert len(said) == 1
    assert (
        "rank 0: step 7: Backward(stage=0, micro_batch=0): waiting for the gradient of micro-batch 0; rank 1: step 7"
        in said[0]
    )


def test_a_rank_that_loses_the_others_says_what_it_was_at():
    with Ranks(2) as ranks:
        said, _ = ranks.run(lose)
    assert "rank 0 lost the others in 'step 3: sum over data'" in said
    assert "--resume" in said
