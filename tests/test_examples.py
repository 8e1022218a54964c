"""`examples/`: what a cluster would be told, up to the command line of every process."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from dsv3.cli import main
from dsv3.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain.slurm"
NODES = int(re.search(r"#SBATCH --nodes=(\d+)", SCRIPT.read_text())[1])


@pytest.mark.parametrize("resumed", [False, True])
def test_the_slurm_job_starts_the_recipe_s_ranks(tmp_path, capsys, resumed):
    commands = {"srun": 'printf "%s\\n" "$@"', "scontrol": "printf 'node-7\\nnode-9\\n'"}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    if resumed:
        (tmp_path / "runs/deepseek-v3/stages").mkdir(parents=True)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[7,9]", "SLURM_JOB_NUM_NODES": str(NODES),
        "SLURM_JOB_ID": "12",
    }  # fmt: skip
    asked = ["bash", str(SCRIPT), "optimizer.weight_decay=0.05"]
    done = subprocess.run(asked, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    program, *arguments = done.stdout.splitlines()
    assert program == "torchrun"
    started = get_args_parser().parse_args(arguments)
    assert (started.rdzv_endpoint, started.rdzv_id, started.module) == ("node-7:29500", "12", True)
    module, command, recipe, *rest = [started.training_script, *started.training_script_args]
    assert (module, command, "--resume" in rest) == ("dsv3", "pretrain", resumed)
    assert Recipe.load(ROOT / recipe).parallel.ranks == int(started.nnodes) * int(started.nproc_per_node) == 2048
    assert main.run([command, str(ROOT / recipe), *rest, "--dry-run"]) == 0
    assert "14,800,000,000,000 tokens" in capsys.readouterr().out
