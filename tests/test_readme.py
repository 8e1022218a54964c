"""Every command of the README runs, at a fraction of its size, and its Python does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.huggingface import save_pretrained

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line
]
SMALL = [
    "training.tokens=8K",
    "evaluation.tinypy_tasks=2",
    "evaluation.bits_per_byte_bytes=2K",
    "tokenizer.training_bytes=300K",
]
SMALL_TASKS = ["data.sources.1.tokens=10K"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory that looks like a checkout, where the commands run one after the other."""
    home = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "docs"):
        (home / name).symlink_to(ROOT / name)
    return home


def reduced(command: str) -> list[str]:
    """The command for this interpreter, with less of everything."""
    words = shlex.split(command)
    if words == ["make", "quickstart"]:
        words = [".venv/bin/dsv3", "quickstart"]
    assert words[0] == ".venv/bin/dsv3", f"the README has a command that this test does not know: {command}"
    own_data = "--data" in words
    match words[1]:
        case "quickstart" | "pretrain":
            words += SMALL if own_data else SMALL + SMALL_TASKS
        case "generate" | "chat":
            words += ["--max-tokens", "8"]
        case "bench":
            words += ["--rounds", "1", "--preset", "debug", *(["--tokens", "8"] if words[2] == "decode" else [])]
    return [sys.executable, "-m", "dsv3", *words[1:]]


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "make test"])
def test_readme_command(command, home):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        reduced(command), cwd=home, env=environment, input="hello\n/exit\n", capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if command == "make quickstart":
        assert "bits per byte" in (home / "runs/quickstart/report.html").read_text()
    if " generate " in command:
        assert done.stdout.startswith("def ")


def test_readme_python(tmp_path):
    save_pretrained(DeepSeekV3(ModelConfig.preset("debug")).initialize(), tmp_path)
    code = next(block for language, block in BLOCKS if language == "python")
    scope = {"tokens": torch.zeros(1, 4, dtype=torch.int64)}
    exec(code.replace("path/to/a/deepseek_v3/directory", str(tmp_path)), scope)
    assert scope["model"].config == ModelConfig.preset("debug")


def test_readme_names_every_folder():
    folders = {path.name for path in (ROOT / "src/dsv3").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
