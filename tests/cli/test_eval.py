"""`dsv3 eval`: every task on a run, and on published weights; what is refused before anything is computed."""

import json
from pathlib import Path

import pytest

from dsv3.cli import main
from dsv3.cli.eval import print_scores
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.recipe.schema import Recipe
from dsv3.stages.scores import held_out
from dsv3.weights.huggingface import save_pretrained
from dsv3.weights.opening import load_model

REDUCED = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
START = [
    "model.preset=debug", "model.max_position_embeddings=512", "training.tokens=512", "training.precision=fp32", "tokenizer.training_bytes=50K",
    'data.sources=[{name="t", uri="builtin:tinypy", tokens="5K"}]', "evaluation.tasks=[]", "evaluation.sample_prompts=[]",
]  # fmt: skip
QUICK = [
    "--bytes",
    "5K",
    "--problems",
    "2",
    "--needle-lengths",
    "160,200",
    "--needle-depths",
    "3",
    "--needle-samples",
    "2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    assert main.run(["pretrain", str(REDUCED), "--out", str(out), *START]) == 0
    return out


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """The same weights without a recipe."""
    out = tmp_path_factory.mktemp("published")
    model, tokenizer = load_model(run)
    save_pretrained(model, out)
    for file in tokenizer.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_every_task_as_json_and_the_heat_map(run, tmp_path, capsys):
    picture = tmp_path / "plots" / "needle.svg"
    command = ["eval", str(run), "--tasks", "bpb,tinypy,needle,position", "--json", "--plot", str(picture), *QUICK]
    assert main.run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        "path", "step", "length", "bits_per_byte", "pass_at_1", "failures", "needle", "loss_by_position",
    }  # fmt: skip
    assert (found["step"], found["length"]) == (1, 128)
    # The recipe's own held-out text, in windows of its length.
    model, tokenizer = load_model(run)
    recipe = Recipe.load(REDUCED, START)
    texts = held_out(recipe, 5000)["t"]
    expected = bits_per_byte(model, Tokenizer.load(tokenizer), texts, sequence_length=128, batch_rows=16)
    assert found["bits_per_byte"] == {"t": pytest.approx(expected, rel=1e-6)}
    score = found["pass_at_1"]["tinypy"]
    assert score["total"] == 2 == score["passed"] + sum(found["failures"]["tinypy"].values())
    assert (found["needle"]["lengths"], found["needle"]["depths"]) == ([160, 200], [0.0, 0.5, 1.0])
    assert len(found["loss_by_position"]["t"]["nats"]) == 8
    drawn = picture.read_text()
    assert "depth of the needle" in drawn
    assert all(text in drawn for text in ("160", "200", "50%"))

    print_scores(found)
    said = capsys.readouterr().out
    assert "tinypy: 0 of 2 tasks solved (else: " in said
    for text in ("t: ", "bits per byte", "160 tokens", "0/2", "nats a token, from"):
        assert text in said


def test_drafts_are_counted_on_the_held_out_text_without_another_task(run, capsys):
    assert main.run(["eval", str(run), "--tasks", "mtp", *QUICK]) == 0
    assert "t: accepted of the MTP modules' drafts: draft 1 " in capsys.readouterr().out


def test_published_weights_on_named_texts(published, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("some words of mine\n" * 300)
    command = ["eval", str(published), "--tasks", "bpb", "--json", "--length", "32"]
    assert main.run([*command, "--data", str(tmp_path / "mine.txt"), "--data", "builtin:tinypy", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"].keys() == {str(tmp_path / "mine.txt"), "builtin:tinypy"}
    assert (found["step"], found["length"]) == (None, 32)
    assert main.run(["eval", str(published), "--tasks", "needle", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["needle"]["samples"] == 2
    assert main.run(command) == 2
    assert "comes without a recipe that names its held-out texts: name some with --data" in capsys.readouterr().err


def test_the_average_of_the_weights(checkpoint, run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("some words of mine\n" * 30)
    mine = str(tmp_path / "mine.txt")
    command = ["eval", str(checkpoint), "--tasks", "bpb", "--json", "--length", "32", "--data", mine]
    model, tokenizer = load_model(checkpoint, ema=True)
    texts = [(tmp_path / "mine.txt").read_text()]
    expected = bits_per_byte(model, Tokenizer.load(tokenizer), texts, sequence_length=32, batch_rows=16)
    assert main.run([*command, "--ema"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"][mine] == pytest.approx(expected, rel=1e-6)
    assert main.run(command) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"][mine] != pytest.approx(expected, rel=1e-4)
    assert main.run(["eval", str(run), "--tasks", "bpb", "--ema"]) == 2
    assert "holds no average of the weights: its run had no training.ema_decay" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "bpb,neddle"], "--tasks 'neddle': did you mean 'needle'?"),
        (["--tasks", ","], "--tasks ',': legal are: bpb, mtp, needle, position, tinypy"),
        (["--tasks", "bpb", "--plot", "a.svg"], "--plot a.svg draws the needle's heat map: add needle to --tasks"),
        (["--plot", "a.pdf"], "cannot draw a.pdf: expected a name that ends in .svg or .png"),
        (["--needle-lengths", "64,x"], "--needle-lengths '64,x': expected whole numbers"),
        (["--bytes", "many"], "--bytes 'many': expected a whole number"),
        (["--tasks", "needle", "--needle-lengths", "20"], "a needle in 20 tokens: expected at least"),
        (["--tasks", "position", "--length", "4096"], "tokens in all; expected at least 7681"),
    ],
)
def test_refusals(run, options, said, capsys):
    assert main.run(["eval", str(run), "--bytes", "5K", *options]) == 2
    assert said in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    assert main.run(["eval", str(tmp_path / "typo")]) == 2
    assert "typo does not exist; expected a run, a checkpoint or a Hugging Face directory" in capsys.readouterr().err
