"""What a program brings with it: every command waits for that."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "deepseek-v3" / "pretrain.toml"
PLAN = ["plan", "--schedule", "dual_pipe", "--pipeline", "8", "--microbatches", "20"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import dsv3.recipe.load", "torch"),
        ("import dsv3.model.transformer", "torch._dynamo"),
        ("import dsv3.cli.report", "matplotlib"),
        ("import dsv3.stages.extend, dsv3.stages.quickstart", "matplotlib"),
        ("import dsv3.stages.report", "torch"),
        (f"from dsv3.cli import main; main.run({PLAN!r})", "torch"),
        (f"from dsv3.cli import main; main.run(['pretrain', {str(RECIPE)!r}, '--dry-run'])", "torch"),
    ],
)
def test_what_is_not_needed_is_not_imported(code: str, absent: str) -> None:
    code = f"import sys; {code}; sys.exit({absent!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
