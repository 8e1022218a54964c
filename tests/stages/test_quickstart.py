"""`dsv3 quickstart` as a user runs it, reduced to seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.data.token_shards import ShardSet
from dsv3.data.tokenizer import Tokenizer
from dsv3.recipe.schema import Recipe

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
UNSCORED = ["evaluation.tinypy_tasks=0", "evaluation.sample_prompts=[]", 'evaluation.bits_per_byte_bytes="1K"']
BRIEF = [*UNSCORED, "training.tokens=1024"]


def start(out, *arguments):
    command = [sys.executable, "-m", "dsv3", "quickstart", "--recipe", str(REDUCED), "--out", str(out), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def quickstart(out, *arguments):
    """(stdout, stderr) of a run that must end well."""
    process = start(out, *arguments)
    said = process.communicate(timeout=500)
    assert process.returncode == 0, said[1]
    return said


def refused(capsys, out, *arguments):
    """What a run in this process says that must be refused."""
    assert main.run(["quickstart", "--recipe", str(REDUCED), "--out", str(out), *map(str, arguments)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dsv3: ")
    return said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(out):
    """What training recorded, but for the clock."""
    left_out = ("seconds", "tokens_per_second", "flops_per_second", "peak_memory", "mfu")
    return [
        {key: value for key, value in row.items() if key not in left_out}
        for row in lines(out / "pretrain" / "metrics.jsonl")
    ]


SHARDS = [f"shards.{source}.{split}" for source in ("stdlib", "tinypy") for split in ("train", "validation")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run one"
    return out, *quickstart(out)


def test_from_text_to_a_report(run):
    out, said, progress = run
    recipe = Recipe.load(REDUCED)
    tokenizer = Tokenizer.load(out / "tokenizer")
    assert tokenizer.vocab_size == recipe.model.config().vocab_size
    for source in recipe.data.sources:
        for split in ("train", "validation"):
            assert len(ShardSet.open(out / "shards" / source.name / split, tokenizer.hash)) > 0
    rows = trained(out)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["tokens"] == recipe.training.tokens
    assert sum(row["loss"] for row in rows[-4:]) < 0.9 * sum(row["loss"] for row in rows[:4])
    before, after = lines(out / "pretrain" / "evaluations.jsonl")
    assert (before["step"], after["step"]) == (0, 24)
    for scores in (before, after):
        assert scores["bits_per_byte"].keys() == scores["validation_loss"].keys() == {"stdlib", "tinypy"}
        assert scores["pass_at_1"]["tinypy"]["total"] == 2
        assert [sample["kind"] for sample in scores["samples"]] == ["plain", "fim"]
        assert scores["samples"][0]["prompt"] == "def read_file("
    assert after["validation_loss"]["stdlib"] < before["validation_loss"]["stdlib"] < 8
    assert after["bits_per_byte"]["stdlib"] < before["bits_per_byte"]["stdlib"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5  # loss, optimisation, expert load, bits per byte, pass@1
    assert f"{after['bits_per_byte']['stdlib']:.2f}" in page
    assert f"{out}/report.html" in said
    assert f"dsv3 generate '{out}' --prompt" in said
    for stage in ("tokenizer", *SHARDS, "pretrain", "report"):
        assert f"{stage}: started" in progress


def test_what_was_derived_is_shown_before_the_first_step(run):
    progress = run[2]
    panel = progress[: progress.index("tokenizer: started")]
    assert "12,288 tokens in 24 steps" in panel
    assert "24 steps, because this is a test" in panel
    last = [line for line in progress.splitlines() if line.startswith("pretrain: 12288/12288")]
    assert len(last) == 1
    assert "step 24" in last[0]
    assert "tokens/s" in last[0]


def test_a_second_run_does_nothing(run):
    out = run[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    _, progress = quickstart(out)
    assert [line for line in progress.splitlines() if ": cached" in line] == [
        f"{stage}: cached" for stage in ("tokenizer", *SHARDS, "pretrain", "report")
    ]
    assert "started" not in progress
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(run, tmp_path):
    for part in ("tokenizer", "shards", "stages"):
        shutil.copytree(run[0] / part, tmp_path / part)
    process = start(tmp_path, *UNSCORED)
    while process.poll() is None and count_lines(tmp_path / "pretrain" / "metrics.jsonl") < 8:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _, progress = quickstart(tmp_path, *UNSCORED)
    assert "tokenizer: cached" in progress
    assert all(f"{stage}: cached" in progress for stage in SHARDS)
    assert "pretrain: resumed" in progress
    assert "pretrain: continuing after step " in progress
    assert trained(tmp_path) == trained(run[0])
    assert (tmp_path / "report.html").exists()


def count_lines(path):
    """Of a file that is still being written."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(40):
        words = " ".join(str(number * k) for k in range(60))
        (directory / f"{number}.txt").write_text(f"Multiples of {number}: {words}.\n")
    return directory


def test_the_users_own_texts_with_undecodable_files_among_them(corpus, tmp_path, capsys):
    (corpus / "latin1.txt").write_bytes("naïve café".encode("latin-1"))
    (corpus / "binary.md").write_bytes(b"\xff\xfe\x00")
    out = tmp_path / "out"
    arguments = ["quickstart", "--recipe", str(REDUCED), "--out", str(out), "--data", str(corpus), *BRIEF]
    assert main.run([*arguments, "data.validation_fraction=0.2"]) == 0
    said = capsys.readouterr().err
    assert said.count("skipped 2 files or rows that are no text") == 1
    assert "latin1.txt: not UTF-8" in said
    assert "binary.md: not UTF-8" in said
    assert "half and half" not in said  # the reason for another mixture
    content = json.loads((out / "pretrain" / "run.json").read_text())
    assert content["recipe"]["data"]["sources"] == [{"name": "corpus", "uri": str(corpus), "weight": 1.0, "tokens": None}]  # fmt: skip
    assert lines(out / "pretrain" / "evaluations.jsonl")[-1]["bits_per_byte"].keys() == {"corpus"}
    assert (out / "report.html").exists()


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_bytes(b"\xff")
    said = refused(capsys, tmp_path / "out", "--data", empty)
    assert "holds no text (1 skipped, the first: a.txt: not UTF-8" in said
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.wieght_decay=0.1", "unknown key optimizer.wieght_decay: did you mean 'weight_decay'?"),
        ("model.vocab_size=275", "vocab_size = 275: expected at least 276"),
        ("training.device=cuda:x", "device 'cuda:x': expected 'auto', 'cpu', 'cuda'"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, capsys, override, said):
    assert said in refused(capsys, tmp_path / "out", override)
    assert not (tmp_path / "out" / "tokenizer").exists()
