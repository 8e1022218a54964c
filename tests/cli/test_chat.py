import io

import pytest

from dsv3.cli import main
from dsv3.data.tokenizer import ASSISTANT, BOS, EOS, USER
from dsv3.inference.engine import Delta
from dsv3.inference.llm import LLM
from dsv3.inference.params import SamplingParams


@pytest.fixture
def chat(checkpoint, capsys, monkeypatch):
    """Types lines; (exit code, stdout, stderr)."""

    def run(typed, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        code = main.run(["chat", str(checkpoint), "--device", "cpu", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


GREEDY = ["--temperature", "0", "--max-tokens", "8"]
LINES = ["--template", "{}"]


def continued(checkpoint, prompts, ema=False):
    params = SamplingParams(temperature=0, max_tokens=8)
    return [each.outputs[0].text for each in LLM(checkpoint, ema=ema).generate(prompts, params)]


def test_every_line_is_continued_alone(chat, checkpoint):
    first, second = continued(checkpoint, ["def", "x = {"])
    code, out, err = chat("def\nx = {\n", *GREEDY, *LINES)
    assert (code, out) == (0, f"> {first}\n> {second}\n> \n")
    assert "/exit ends" in err


def test_exit_ends(chat, checkpoint):
    [first] = continued(checkpoint, ["def"])
    assert chat("def\n /exit \nmore\n", *GREEDY, *LINES)[:2] == (0, f"> {first}\n> ")


def test_a_template_surrounds_the_line(chat, checkpoint):
    [expected] = continued(checkpoint, ["User: {a}\nAssistant:\n"])
    assert chat("{a}\n/exit\n", *GREEDY, "--template", r"User: {}\nAssistant:\n")[1] == f"> {expected}\n> "
    code, _, err = chat("x\n", "--template", "User:")
    assert code == 2
    assert "has no place for the line: expected one {}" in err


def test_with_the_average_of_the_weights(chat, checkpoint):
    [plain], [average] = (continued(checkpoint, ["def"], ema) for ema in (False, True))
    assert plain != average
    assert chat("def\n/exit\n", *GREEDY, *LINES, "--ema")[:2] == (0, f"> {average}\n> ")


def test_what_is_typed_is_not_unescaped(chat, checkpoint):
    r"""A line may hold \n as a programmer means it; only the template is written on a command line."""
    [expected] = continued(checkpoint, [r"print('\n')"])
    assert chat("print('\\n')\n/exit\n", *GREEDY, *LINES)[1] == f"> {expected}\n> "


def test_a_line_that_is_too_long_does_not_end_the_chat(chat, checkpoint):
    [expected] = continued(checkpoint, ["def"])
    code, out, err = chat("x" * 300 + "\ndef\n/exit\n", *GREEDY, *LINES)
    assert (code, out) == (0, f"> \n> {expected}\n> ")
    assert "are more than the 128 tokens that this engine continues" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat, monkeypatch):
    def stream(llm, prompt, params):
        yield Delta("0", 0, f"<{prompt}", [1])
        if prompt == "long":
            raise KeyboardInterrupt
        yield Delta("0", 0, ">", [1])

    monkeypatch.setattr(LLM, "stream", stream)
    assert chat("long\nshort\n/exit\n", *LINES)[:2] == (0, "> <long\n> <short>\n> ")


def test_a_conversation_goes_on_until_a_new_one_begins(chat, checkpoint):
    llm, params, turns, said = LLM(checkpoint), SamplingParams(temperature=0, max_tokens=8), [], []
    for line in ("def", "x", "def"):
        turns.append({"role": "user", "content": line})
        said.append(llm.chat(turns, params)[0].outputs[0].text)
        turns.append({"role": "assistant", "content": said[-1]})
    code, out, _ = chat("def\nx\n/new\ndef\n/exit\n", *GREEDY)
    assert said[0] != said[2]
    assert (code, out) == (0, f"> {said[0]}\n> {said[1]}\n> > {said[0]}\n> ")


def test_reasoning_is_no_part_of_the_conversation(chat, monkeypatch):
    seen = []

    def stream(llm, prompt, params):
        seen.append(llm.tokenizer.decode(prompt))
        for text in ("<thi", "nk>Hm.</think>", "\n\nYes"):
            yield Delta("0", 0, text, [1])

    monkeypatch.setattr(LLM, "stream", stream)
    assert chat("a\nb\n/exit\n")[1] == "> Hm.Yes\n> Hm.Yes\n> "
    assert seen[1] == f"{BOS}{USER}a{ASSISTANT}Yes{EOS}{USER}b{ASSISTANT}"
