import re

import pytest

from dsv3.cli import main
from dsv3.cli.generate import unescape
from dsv3.data.fim import fim_prompt
from dsv3.inference.engine import Delta
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams


def generate(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = main.run(["generate", *map(str, arguments), "--device", "cpu"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_prompt_and_its_continuation(checkpoint, capsys):
    arguments = [checkpoint, "--prompt", r"def add(\n\t", "--temperature", 0, "--max-tokens", 12]
    params = SamplingParams(temperature=0, max_tokens=12)
    [expected] = LLM(checkpoint).generate(["def add(\n\t"], params)
    assert generate(capsys, *arguments) == (0, f"def add(\n\t{expected.outputs[0].text}\n", "")
    [newest] = checkpoint.glob("pretrain/checkpoints/step-*")
    assert generate(capsys, newest, *arguments[1:])[1] == f"def add(\n\t{expected.outputs[0].text}\n"
    [average] = LLM(checkpoint, ema=True).generate(["def add(\n\t"], params)
    assert (
        generate(capsys, *arguments, "--ema")[1]
        == f"def add(\n\t{average.outputs[0].text}\n"
        != f"def add(\n\t{expected.outputs[0].text}\n"
    )
    stop = expected.outputs[0].text[3]
    shown = generate(capsys, *arguments, "--stop", stop)[1]
    assert shown == f"def add(\n\t{expected.outputs[0].text[: expected.outputs[0].text.index(stop)]}\n"


def test_it_is_shown_piece_by_piece(checkpoint, capsys, monkeypatch):
    seen = []

    def stream(llm, prompt, params):
        for piece in ("one ", "two ", "three"):
            yield Delta("0", 0, piece, [1])
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(LLM, "stream", stream)
    generate(capsys, checkpoint, "--prompt", "zero ")
    assert seen == ["zero one ", "two ", "three"]


def test_drafts_change_nothing_and_how_many_were_right_is_told(checkpoint, capsys):
    arguments = [checkpoint, "--prompt", "def", "--temperature", 0, "--max-tokens", 12]
    _, plain, nothing = generate(capsys, *arguments)
    code, drafted, told = generate(capsys, *arguments, "--num-speculative-tokens", 2)
    assert (code, drafted, nothing) == (0, plain, "")
    assert re.fullmatch(r"\n\d+ of \d+ drafts accepted \(\d+%; by position \d+%, \d+%\)\n", told)


def test_an_fp8_cache_can_be_asked_for(checkpoint, capsys):
    code, _, said = generate(capsys, checkpoint, "--prompt", "def", "--fp8-cache")
    assert code == 2
    assert "an FP8 cache has a scale for every 128 elements of a latent" in said


def test_a_suffix_makes_it_fill_the_middle(checkpoint, capsys):
    arguments = ["--prompt", "def add(", "--suffix", r"\n    return first", "--seed", 3, "--max-tokens", 10]
    code, out, _ = generate(capsys, checkpoint, *arguments)
    llm = LLM(checkpoint)
    encode = llm.tokenizer.encode
    ids = [llm.tokenizer.bos_id, *fim_prompt(encode("def add("), encode("\n    return first"), llm.tokenizer)]
    [middle] = llm.generate([ids], SamplingParams(temperature=0.7, top_p=0.95, max_tokens=10, seed=3))
    assert (code, out) == (0, f"def add({middle.outputs[0].text}\n    return first\n")


def test_a_seed_repeats(checkpoint, capsys):
    def run(*seed):
        return generate(capsys, checkpoint, "--prompt", "def", "--temperature", 1.5, "--max-tokens", 16, *seed)[1]

    assert run("--seed", 1) == run("--seed", 1)
    assert run("--seed", 1) != run("--seed", 2)
    assert len({run() for _ in range(3)}) > 1


def test_escapes_are_pythons_and_everything_else_stays():
    assert unescape(r"a\nb\tc\\n\d\x41") == "a\nb\tc\\n\\d\\x41"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x" * 200], "are more than the 128 tokens that this engine continues"),
        (["--prompt", "x", "--temperature", -1], "temperature = -1.0: expected 0 or more"),
        (["--prompt", "x", "--top-p", 0], "top_p = 0.0"),
        (["--prompt", "x", "--stop", ""], "stop holds an empty text"),
        (["--prompt", "x", "--max-tokens", 0], "0 is not in the range"),
        ([], "Missing option '--prompt'"),
    ],
)
def test_refusals(checkpoint, capsys, arguments, said):
    code, _, err = generate(capsys, checkpoint, *arguments)
    assert code == 2
    assert said in err


def test_no_model_there(tmp_path, capsys):
    code, out, err = generate(capsys, tmp_path, "--prompt", "x")
    assert (code, out) == (2, "")
    assert "holds no model" in err
