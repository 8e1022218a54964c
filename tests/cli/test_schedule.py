"""`--dry-run`: what is printed and drawn, and that nothing else happens."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli import main

REPORT = Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "pretrain.toml"


def test_the_report_s_schedules_are_printed_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", str(REPORT), "--dry-run", "--at", "12.15T", "--plot"]
    assert main.run([*command, "plots/a.svg"]) == 0
    said = capsys.readouterr().out
    assert "14,800,000,000,000 tokens in 243,099 steps, sequences of 4,096" in said
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line[:1] == " " and line.strip()}
    assert lines["469,000,000,000"][:5] == ["15,314", "0.00022", "15,360", "0.3", "0.001"]
    assert lines["10,000,000,000,000"][1:5] == ["0.00022", "15,360", "0.1", "0.001"]
    assert lines["12,150,000,000,000"][1:] == ["0.000121", "15,360", "0.1", "0.001"]
    assert lines["14,300,000,000,000"][1:5] == ["2.2e-05", "15,360", "0.1", "0"]
    assert lines["14,633,000,000,000"][1] == "7.3e-06"
    drawn = Path("plots/a.svg").read_text()
    assert all(title in drawn for title in ("learning rate", "batch, sequences", "weight of the MTP loss"))
    assert main.run([*command, "a.png"]) == 0
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"plots", "a.png"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--at", "15T"], "15T tokens is past the end: expected at most training.tokens = 14.8T"),
        (["--at", "ten"], "--at 'ten': expected a whole number, or text such as"),
        (["--plot", "a.gif"], "cannot draw a.gif: expected a name that ends in .svg or .png"),
        (["--plot", "/dev/null/a.svg"], "cannot be written"),
        (["schedule.learning_rat=1"], "unknown key schedule.learning_rat"),
    ],
)
def test_refusals(options, said, capsys):
    assert main.run(["pretrain", str(REPORT), "--dry-run", *options]) == 2
    assert said in capsys.readouterr().err


def test_options_of_a_dry_run_alone_are_refused(capsys):
    assert main.run(["pretrain", str(REPORT), "--at", "10T"]) == 2
    assert "--at and --plot belong to --dry-run" in capsys.readouterr().err


def test_it_needs_no_torch():
    code = f"import sys; from dsv3.cli import main; main.run(['pretrain', {str(REPORT)!r}, '--dry-run']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
